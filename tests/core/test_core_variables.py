from __future__ import annotations

import pytest

from pipeline.core.errors import UsageError
from pipeline.core.variables import (
    Group,
    Variable,
    choice,
    fill,
    flag,
    integer,
    read,
    text,
    variable,
    variables,
)

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
        ("port", " 8080\t", 8080),
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
        ("port", "٨٠٨٠", "port=٨٠٨٠: must be a whole number from 1 to 65535"),
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


class Run(Group):
    force: bool = variable(flag, "again", False)
    names: tuple[str, ...] = variable(str.split, "these alone", (), name="name")


class Request(Run):
    model: str = variable(text, "a reference", "")
    besides: str = ""


def test_a_group_has_the_defaults_of_its_variables() -> None:
    assert (Request().force, Request().names, Request().model) == (False, (), "")
    assert list(variables(Request)) == ["force", "names", "model"]
    assert [each.name for each in variables(Request).values()] == ["force", "name", "model"]


def test_a_group_takes_its_own_values() -> None:
    read = {"name": ("a", "b"), "model": "demo", "of another group": 1}
    filled = fill(Request, read, besides="here")
    assert filled == Request(names=("a", "b"), model="demo", besides="here")
    assert fill(Run, read) == Run(names=("a", "b"))
    assert filled.replace(model="") == Request(names=("a", "b"), besides="here")
    assert Request(force=False) == Request() != Request(force=True)
    assert Request() != Run()


def test_a_group_stays_as_it_was_made() -> None:
    request = Request(model="demo")
    with pytest.raises(AttributeError, match=r"Request\.model cannot be changed"):
        request.model = "other"  # type: ignore[misc]
    with pytest.raises(TypeError, match="Request has no modle"):
        fill(Request, {}, modle="demo")
