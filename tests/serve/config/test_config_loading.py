"""The keys that say when an instance is loaded and unloaded, and what models may take."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_tools import checked, one, wrong

from pipeline.serve.config.tables import ControlTable
from pipeline.serve.server import Control

SERVER = "[instance.chat.server]\nmodel_url = 'x'\n"


def test_they_reach_the_server(tmp_path: Path) -> None:
    control = "start = 'demand'\nidle_timeout = 300\npriority = -3"
    server = one(tmp_path, f"[instance.control]\n{control}\n{SERVER}")
    assert (server.start, server.idle_timeout, server.priority) == ("demand", 300, -3)
    server = one(tmp_path, f"{SERVER}[instance.chat.control]\npinned = true")
    assert (server.start, server.idle_timeout, server.pinned) == ("boot", 0, True)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("start = 'later'", "instance.chat.control.start = \"later\": must be 'boot' or 'demand'"),
        ("idle_timeout = -1", "instance.chat.control.idle_timeout = -1: must be at least 0"),
        ("gpu_ids = '٠'", """instance.chat.control.gpu_ids = "٠": must be "all", "none", or ids"""),
        ("pinned = 1", "instance.chat.control.pinned = 1: must be true or false"),
        ("priority = 5000", "instance.chat.control.priority = 5000: must be at most 1000"),
        ("keep = 1", "instance.chat.control.keep: there is no such key"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, text: str, line: str) -> None:
    (found,) = wrong(tmp_path, f"{SERVER}[instance.chat.control]\n{text}")
    assert line in found


@pytest.mark.parametrize("value", ['"auto"', '"20GiB"', '"1.5 TB"', '"80%"', "{ram = '8GiB'}"])
def test_memory_may_be(tmp_path: Path, value: str) -> None:
    from config_tools import read

    assert read(tmp_path, f"[master]\nmemory = {value}\n{SERVER}").master.memory


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ('"20"', 'must be "auto", a size such as "20GiB", or a share such as "80%"'),
        ('"101%"', 'must be "auto", a size'),
        ('"0%"', 'must be "auto", a size'),
        ('"0GiB"', 'must be "auto", a size'),
        ('"-1GB"', 'must be "auto", a size'),
        ('"1e1%"', 'must be "auto", a size'),
        ("20", 'must be "auto", a size'),
        ("{ram = 'auto'}", 'ram: must be a size such as "20GiB", or a share such as "80%"'),
        ('"٢٠GiB"', 'must be "auto", a size'),
        ('"٨٠%"', 'must be "auto", a size'),
        ("{'gpu٠' = '8GiB'}", "gpu٠: must be ram, gpu0, gpu1 and so on"),
        ("{gpu = '8GiB'}", "gpu: must be ram, gpu0, gpu1 and so on"),
    ],
)
def test_a_wrong_memory_is_named(tmp_path: Path, value: str, line: str) -> None:
    (found,) = wrong(tmp_path, f"[master]\nmemory = {value}\n{SERVER}")
    assert found.startswith("models.toml: master.memory") and line in found


def test_an_instance_and_a_model_on_the_command_line_have_the_same_defaults() -> None:
    """`Control` is `ControlTable` without what checks it."""
    table, record = ControlTable(), Control()
    assert set(ControlTable.model_fields) == set(Control.__struct_fields__)
    others = {
        name: (value, of_record)
        for name, value in table
        if value != (of_record := getattr(record, name)) and value != [*(of_record or ())]
    }
    assert others == {"probe_timeout": (60.0, None)}, "None: 60, or 0 where it may sleep"


def test_contradictions(tmp_path: Path) -> None:
    gateway = "[gateway]\nenable = true\n"
    idle = f"{SERVER}[instance.chat.control]\nidle_timeout = 60\n"
    (found,) = (line for line in checked(tmp_path, idle) if "idle_timeout" in line)
    assert found.endswith("the gateway counts the requests; enable it: [gateway] enable = true")
    assert not [line for line in checked(tmp_path, gateway + idle) if "idle_timeout" in line]
    both = checked(tmp_path, f"{gateway}{idle}pinned = true")
    (found,) = (line for line in both if "idle_timeout" in line)
    assert found.endswith("idle_timeout = 60: a pinned instance is never unloaded; leave one out")
