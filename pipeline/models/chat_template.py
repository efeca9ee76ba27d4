"""A model's chat template is a program: it is run once, within bounds, before its server starts.

llama-server runs it while it loads, and with each conversation; a template that does not end, or
doubles a text without end, takes the machine with it. It is tried with llama-server's own engine,
which reads a template file before it looks at anything else.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.process import outcome
from pipeline.core.store import stat_cache

from . import gguf, tools
from .gguf_format import TEMPLATE

NEEDED = ("chat-template-file", "completion-bash")  # options of the llama-server that tries it
OVERRIDES = ("--chat-template", "--chat-template-file")  # with these the model's own is not used
SECONDS = 10.0  # for a conversation; a usual template takes 0.02
MEMORY = 2 * tools.GIB  # a usual template takes 0.1

# What the server tries it with: one question, and a conversation that begins with the system.
TURNS = (("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "How are you?"))
CONVERSATION = json.dumps([{"role": role, "content": text} for role, text in TURNS])
STARTS = (
    "",
    f"{{%- set messages = {CONVERSATION} -%}}",
    f"{{%- set messages = {CONVERSATION} -%}}{{%- set enable_thinking = true -%}}",
)
HARMLESS = "{{ messages[0].content }}"
HINT = "use another one: server.chat_template_file=PATH, or server.chat_template=chatml"


def require_ends(
    server: Path, build: str, options: Collection[str], model: Path, run: Path
) -> None:
    """Raise PipelineError where a template of `model` does not end within SECONDS and MEMORY.

    `build` names the llama-server, `options` are those that it knows; where they cannot try a
    template, nothing is checked. The result is cached in the folder `run` until the file changes.
    """
    if any(name not in options for name in NEEDED):
        return
    try:
        if not gguf.read_cached(model, run).has_chat_template:
            return
    except PipelineError:
        return  # the server reports it, and the other servers may go on
    cache = run / "templates.json"
    if stat_cache.recall(cache, model) == build:
        return
    stamp = stat_cache.stamp(model)
    for name, text in templates(gguf.read(model).values):
        if problem := problem_of(server, text):
            raise PipelineError(f"{model.name}: its {name} {problem}", HINT)
    stat_cache.remember(cache, model, build, stamp)


def is_overridden(arguments: Sequence[str]) -> bool:
    """Whether a command line brings another template than the model's."""
    return any(word in OVERRIDES for word in arguments)


def templates(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each template of a GGUF's metadata with what to call it."""
    for key, text in values.items():
        if key.startswith(TEMPLATE) and isinstance(text, str) and text:
            name = key.removeprefix(TEMPLATE).lstrip(".")
            yield f"chat template {name}" if name else "chat template", text


def problem_of(server: Path, template: str) -> str:
    """Why a template must not run; empty where it ends. An error that it raises is no reason: the
    server reports it, and some templates refuse conversations that they were not made for. Nor is
    a failure that a harmless template shares."""
    problem = _try(server, template)
    return problem if problem and not _try(server, HARMLESS) else ""


def refusal(server: Path, options: Collection[str], template: str) -> str:
    """Why llama-server does not take a template of the user's; empty where it does, or where its
    `options` cannot try it."""
    if any(name not in options for name in NEEDED):
        return ""
    if problem := problem_of(server, template):
        return f"the template {problem}"
    _, out, err = _run(server, template)
    if "template is not supported" not in err:
        return ""
    reasons = re.findall(r"(?:_init: error|failed to apply template): (.+)", out + err)
    # its log may end before it is written
    return ": ".join(["the template is not supported", *reasons[:1]])


def _try(server: Path, template: str) -> str:
    for start in STARTS:
        status, out, err = _run(server, start + template)
        if status == -1:
            return f"does not end: it was stopped after {SECONDS:g} s"
        if "bad_alloc" in out + err:
            return f"takes more than {MEMORY // tools.GIB} GiB of memory"
        if status < 0:
            return f"crashes llama.cpp (signal {-status})"
    return ""


def _run(server: Path, template: str) -> tuple[int, str, str]:
    """What llama-server says of a template, which it reads before it prints something and ends."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "template.jinja"
        file.write_bytes(template.encode("utf-8", "surrogateescape"))
        return outcome(
            [server, "--jinja", "--chat-template-file", file, "--completion-bash"],
            timeout=SECONDS,
            env=tools.env(),
            sandbox=tools.sandbox(server, read=[file], memory=MEMORY),
        )
