from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from conftest import Doit, free_port

from pipeline.core.store import stat_cache
from pipeline.models import chat_template
from pipeline.models import gguf as ggufs
from pipeline.serve import flags

pytestmark = pytest.mark.build

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
)
LOOP = "{% for a in range(1000000000) %}{% for b in range(1000000000) %}{% endfor %}{% endfor %}"
DOUBLE = (
    "{% set ns = namespace(s='aaaaaaaa') %}"
    "{% for a in range(90) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
)


@pytest.fixture(scope="module")
def server(built: Path) -> Path:
    (folder,) = (path for path in built.iterdir() if path.name.endswith("-cpu"))
    return folder / ("llama-server.exe" if os.name == "nt" else "llama-server")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 2.0)


@pytest.mark.parametrize(
    "text",
    [
        CHATML,
        "",
        "{{ raise_exception('only one turn') }}",
        "{{ this is not a template",
        "grüße {{ 1 }}",
    ],
    ids=["chatml", "empty", "refuses", "broken", "letters"],
)
def test_templates_that_end_are_served(server: Path, text: str) -> None:
    assert chat_template.problem_of(server, text) == ""


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (LOOP, "does not end"),
        (DOUBLE, "does not end|takes more than"),
        # with a second turn, with a system's, and where thinking is on
        ("{% if messages|length > 2 %}" + LOOP + "{% endif %}", "does not end"),
        ("{% if messages[0].role == 'system' %}" + LOOP + "{% endif %}", "does not end"),
        (f"{{% if enable_thinking and messages[3] %}}{LOOP}{{% endif %}}", "does not end"),
        ("{{ " + "(" * 200_000 + "1" + ")" * 200_000 + " }}", "crashes llama.cpp"),
    ],
    ids=["loop", "doubled", "turns", "system", "thinking", "nested"],
)
def test_templates_that_run_on_are_refused(server: Path, text: str, wrong: str) -> None:
    began = time.monotonic()
    assert re.search(wrong, chat_template.problem_of(server, text))
    assert time.monotonic() - began < 30


def test_the_templates_of_a_model() -> None:
    values = {
        "general.name": "a",
        "tokenizer.chat_template": "x",
        "tokenizer.chat_template.tool_use": "y",
        "tokenizer.chat_templates": ["tool_use"],
    }
    templates = list(chat_template.templates(values))
    assert templates == [("chat template", "x"), ("chat template tool_use", "y")]


@pytest.mark.parametrize(
    ("words", "is_overridden"),
    [
        (["--model", "m"], False),
        (["--chat-template", "chatml"], True),
        (["--chat-template-file", "x"], True),
    ],
)
def test_a_template_of_the_users_own_is_not_tried(words: list[str], is_overridden: bool) -> None:
    assert chat_template.is_overridden(words) is is_overridden


def test_a_file_is_tried_once_for_each_server(server: Path, gguf: Path, tmp_path: Path) -> None:
    options = flags.read(server, "x", tmp_path)

    def require(build: str) -> None:
        chat_template.require_ends(server, build, options, gguf, tmp_path)

    book = tmp_path / "templates.json"
    require("one")
    assert stat_cache.recall(book, gguf) == "one"
    stamp = book.stat().st_mtime_ns
    require("one")
    assert book.stat().st_mtime_ns == stamp
    require("another")
    assert stat_cache.recall(book, gguf) == "another"


def with_template(model: Path, text: str) -> None:
    file = model / "tokenizer_config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**data, "chat_template": text}), encoding="utf-8")
    (model / "chat_template.jinja").unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.usefixtures("converter")
def test_no_server_is_started_with_one_that_runs_on(doit: Doit, own_tiny: Path) -> None:
    with_template(own_tiny, LOOP)
    port = free_port()
    refused = doit("serve", f"model={own_tiny}", "quant=q8_0", f"port={port}", status=1)
    assert "its chat template does not end" in refused.err
    assert "server.chat_template=chatml" in refused.err
    assert not (doit.home / "logs" / f"serve-{port}.log").exists()
    (model,) = (doit.home / "models" / "gguf").rglob("*.gguf")
    assert ggufs.read(model).has_chat_template

    config = doit.home / "one.toml"
    config.write_text(
        f'[instance.tiny.server]\nmodel = "{model.as_posix()}"\nport = {port}\n', encoding="utf-8"
    )
    refused = doit("up", f"config={config}", status=1)
    assert "its chat template does not end" in refused.err
    assert not list((doit.home / "logs").glob("tiny.log"))

    with doit.serving(f"model={own_tiny}", "quant=q8_0", "server.chat_template=chatml"):
        assert doit.summary["sandbox"].startswith(("Landlock", "none", "bubblewrap"))


def test_what_cannot_try_a_template_is_not_asked(gguf: Path, tmp_path: Path) -> None:
    chat_template.require_ends(tmp_path / "missing", "b", {}, gguf, tmp_path)
    assert not (tmp_path / "templates.json").exists()


@pytest.mark.usefixtures("impatient")
@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script")
def test_a_program_that_never_answers_is_no_fault_of_the_template(tmp_path: Path) -> None:
    slow = tmp_path / "llama-server"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    assert chat_template.problem_of(slow, CHATML) == ""


def test_a_damaged_model_is_left_to_the_server(server: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("no GGUF")
    options = flags.read(server, "x", tmp_path)
    chat_template.require_ends(server, "b", options, tmp_path / "m.gguf", tmp_path)
    assert not (tmp_path / "templates.json").exists()
