from __future__ import annotations

import pytest

from pipeline.core.errors import UsageError
from pipeline.core.variables import Variable, choice, flag, integer, read, text

TABLE = (
    Variable("model", text),
    Variable("force", flag),
    Variable("port", integer(1, 65535)),
    Variable("format", choice("text", "json")),
)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model", " org/model ", "org/model"),
        ("model", "größe=1", "größe=1"),
        ("force", "1", True),
        ("force", "Yes", True),
        ("force", "off", False),
        ("force", "", False),
        ("port", "1", 1),
        ("port", "65535", 65535),
        ("format", "JSON", "json"),
    ],
)
def test_values(name: str, text: str, value: object) -> None:
    assert read({name: text}, TABLE) == {name: value}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("model", "  ", "model=  : must be a value; leave the variable out to get the default"),
        ("force", "2", "force=2: must be 1 or 0 (also true, false, yes, no, on, off)"),
        ("port", "0", "port=0: must be a whole number from 1 to 65535"),
        ("port", "65536", "port=65536: must be a whole number from 1 to 65535"),
        ("port", "8080.0", "port=8080.0: must be a whole number from 1 to 65535"),
        ("port", "", "port=: must be a whole number from 1 to 65535"),
        pytest.param("port", "9" * 5000, "must be a whole number from 1 to 65535", id="huge"),
        ("port", "8_080", "port=8_080: must be a whole number from 1 to 65535"),
        ("format", "jsn", "format=jsn: must be one of text, json; did you mean json?"),
        ("format", "xml", "format=xml: must be one of text, json"),
        ("prot", "1", "prot: there is no such variable; did you mean port?"),
        ("zzz", "1", "zzz: there is no such variable"),
    ],
)
def test_errors(name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read({name: text}, TABLE)
    assert caught.value.message.endswith(message)


def test_all_errors_at_once() -> None:
    requested = {"modle": "x", "port": "x", "format": "xml", "model": "fine", "force": "maybe"}
    with pytest.raises(UsageError) as caught:
        read(requested, TABLE)
    lines = caught.value.message.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *("modle", "port=x", "format=xml", "force=maybe")
    ]
    assert "docs/variables.md" in str(caught.value)


def test_nothing_given_is_nothing_read() -> None:
    assert read({}, TABLE) == {}
