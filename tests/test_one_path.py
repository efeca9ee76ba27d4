"""One model on the command line, in a file and in a profile: the same server comes of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Doit, chat, free_port
from msgspec import convert
from msgspec.structs import replace

from pipeline.core.paths import Home
from pipeline.serve.supervisor import state
from pipeline.serve.supervisor.state import Folder

pytestmark = pytest.mark.build
NAMES = ("url", "model", "log", "ready in")  # what need not be the same in two summaries


@pytest.fixture
def file(gguf: Path, tmp_path: Path) -> Path:
    """Two instances, one of them not to be started."""
    path = tmp_path / "two ü.toml"
    path.write_text(
        f"""
        [instance.tiny.model]
        ref = {json.dumps(str(gguf))}
        [instance.tiny.server]
        port = {free_port()}
        threads = 1
        [instance.other.control]
        enabled = false
        [instance.other.server]
        model = {json.dumps(str(gguf))}
        port = {free_port()}
        """,
        encoding="utf-8",
    )
    return path


@pytest.fixture
def profile(doit: Doit, gguf: Path, tmp_path: Path) -> str:
    """The same as a profile."""
    path = tmp_path / "profiles.yaml"
    table = {"gguf_path": str(gguf), "port": free_port(), "threads": 1}
    path.write_text(json.dumps({"profiles": {"tiny": {"backend": "llamacpp", "llamacpp": table}}}))
    doit.env["LLM_PROFILES_CONFIG_PATH"] = str(path)
    return "profile=tiny"


def planned(doit: Doit, *words: str) -> dict[str, Any]:
    answer = doit("plan", "format=json", *words).json()
    return dict(answer[0] if isinstance(answer, list) else answer)


def words(plan: dict[str, Any]) -> list[str]:
    """The command line without what each is called and reached by, in the order of the names."""
    cmd, found = plan["cmd"], []
    for at, word in enumerate(cmd):
        if word.startswith("--") and word not in ("--port", "--alias"):
            value = cmd[at + 1] if at + 1 < len(cmd) and not cmd[at + 1].startswith("--") else ""
            found.append(f"{word} {value}")
    return sorted(found)


def test_one_command_line(doit: Doit, gguf: Path, file: Path, profile: str) -> None:
    plans = [
        planned(doit, f"model={gguf}", "threads=1"),
        planned(doit, f"config={file}"),
        planned(doit, profile),
    ]
    assert words(plans[0]) == words(plans[1]) == words(plans[2])
    assert {"--metrics ", "--threads 1"} <= set(words(plans[0]))
    assert any(word.startswith("--ctx-size ") for word in words(plans[0]))
    assert plans[0]["env"] == plans[1]["env"] == plans[2]["env"]


def test_one_summary(doit: Doit, gguf: Path, profile: str) -> None:
    with doit.serving(f"model={gguf}", "threads=1") as url:
        assert chat(url)
        first = doit.summary
    with doit.serving(profile) as url:
        assert chat(url)
        second = doit.summary
    assert {"file", "quant", "size", "backend", "device", "threads", "context"} <= first.keys()
    assert first.keys() == second.keys()
    rest = [{k: v for k, v in rows.items() if k not in NAMES} for rows in (first, second)]
    assert rest[0] == rest[1]


def test_the_log_of_the_run_before_is_kept(doit: Doit, gguf: Path) -> None:
    port = free_port()
    for _ in range(2):
        with doit.start("serve", f"model={gguf}", f"port={port}", "format=json") as process:
            assert process.stdout is not None
            log = Path(json.loads(process.stdout.readline())["log"])
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=120)
    (before,) = log.parent.glob(f"serve-{port}.*-*.log")
    assert log.stat().st_size and before.stat().st_size
    assert "listening on" in before.read_text(encoding="utf-8")


@pytest.fixture
def down(doit: Doit, file: Path) -> Iterator[None]:
    yield
    doit("down", f"config={file}", status=None)


@pytest.mark.usefixtures("down")
def test_up_says_what_serve_says(doit: Doit, file: Path) -> None:
    run = doit("up", f"config={file}")
    lines = [line.split("  ")[1].strip() for line in run.err.splitlines() if line.startswith("  ")]
    assert {"file", "quant", "size", "backend", "device", "threads", "context", "log"} <= {*lines}
    assert "not started: other (two ü.toml: instance.other.control.enabled = false)" in run.err


def test_a_fitted_context_stays(doit: Doit, file: Path) -> None:
    """Free memory is another one at each `up`: that alone restarts no server."""
    source, context = f"config={file}", "--ctx-size"
    (server,) = doit_servers(doit, source)
    at = state.folder(Home(doit.home), str(file))
    cmd = list(server["cmd"])
    cmd[cmd.index(context) + 1] = "1024"
    remember(at, server, tuple(cmd))
    (again,) = doit_servers(doit, source)
    assert again["cmd"] == cmd, "as it was fitted before"
    file.write_text(file.read_text(encoding="utf-8").replace("threads = 1", "threads = 2"))
    (changed,) = doit_servers(doit, source)
    assert changed["cmd"][changed["cmd"].index(context) + 1] != "1024", "it is started anew"


def test_a_fitted_context_of_an_embedding_model_stays(demo: Doit, tmp_path: Path) -> None:
    """Its batch is as long as its context, and stays with it."""
    path = tmp_path / "embed.toml"
    path.write_text(f'[instance.embed]\nmodel.ref = "demo-embed"\nserver.port = {free_port()}\n')
    source = f"config={path}"
    (server,) = doit_servers(demo, source)
    cmd = ["256" if word == "512" else word for word in server["cmd"]]
    assert cmd.count("256") == 3, "the context and both batches"
    at = state.folder(Home(demo.home), str(path))
    try:
        remember(at, server, tuple(cmd))
        (again,) = doit_servers(demo, source)
        assert again["cmd"] == cmd
    finally:
        at.wanted.unlink()


def doit_servers(doit: Doit, source: str) -> list[dict[str, Any]]:
    return list(doit("plan", "format=json", source).json())


def remember(at: Folder, server: dict[str, Any], cmd: tuple[str, ...]) -> None:
    """As `up` notes what it starts."""
    from pipeline.serve.server import Server

    kept = replace(convert(server, Server), cmd=cmd)
    state.write_wanted(at, state.DesiredState(config="", instances=(kept,)))
