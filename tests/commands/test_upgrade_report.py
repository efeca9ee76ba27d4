"""What two llama-servers' options have apart, and how it is told."""

from __future__ import annotations

import pytest

from pipeline.commands.upgrade_report import Comparison, SpeedChange, listed, lost, moved, text
from pipeline.serve.flags import parse_help

OLD = """\
-m, --model FNAME            model path
-c, --ctx-size N             size of the context (default: 4096, 0 = from the model)
--port PORT                  port to listen (default: 8080)
-dm, --draft N               tokens to draft
--old-words TEXT             words that are said (default: 'none')
--gone                       of no use
"""
NEW = """\
-m, --model FNAME            model path
-c, --ctx-size N             size of the context in tokens (default: 4096)
--port PORT                  port to listen (default: 9931)
-dm, --spec-draft N          how many tokens to draft
--new-words TEXT             words that are said (default: 'none')
--fresh                      of much use
--gone                       the argument has been removed
"""


def test_options_that_are_gone_or_renamed() -> None:
    gone, renamed = lost(parse_help(OLD), parse_help(NEW))
    assert gone == ["gone"]
    assert renamed == {"draft": "spec-draft", "old-words": "new-words"}
    assert lost(parse_help(NEW), parse_help(NEW)) == ([], {})


def test_defaults_that_moved() -> None:
    assert dict(moved(parse_help(OLD), parse_help(NEW))) == {"port": ("8080", "9931")}


def test_as_text() -> None:
    told = text(
        Comparison(
            before="pinned 1",
            after="b2 2",
            renamed={"draft": "spec-draft"},
            refused=["a.toml: instance.x.server.gone: llama-server has no --gone"],
            defaults={"port": ("8080", "9931")},
            models_failing={"/m.gguf": "unknown architecture"},
            speed=[SpeedChange(what="m.gguf, reading", before=100, after=90)],
        )
    )
    for line in (
        "llama.cpp         pinned 1 -> b2 2",
        "refused           a.toml: instance.x.server.gone: llama-server has no --gone",
        "renamed           --draft -> --spec-draft",
        "defaults          --port 8080 -> 9931",
        "does not load     /m.gguf: unknown architecture",
        "m.gguf, reading   100.0 -> 90.0 tokens/s (-10 %)",
        "options gone      none",
    ):
        assert line in told.splitlines()


@pytest.mark.parametrize(("count", "shown"), [(0, "none"), (1, "x"), (14, ", and 2 more")])
def test_long_lists_are_cut(count: int, shown: str) -> None:
    assert listed(["x"] * count).endswith(shown)
