"""Code that a model names is found and taken out, however it is written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.core.errors import PipelineError
from pipeline.models import foreign_code
from pipeline.models.contents import Readable

EVIL = "org/evil--tok.Evil"
NAMES_ONE = {"auto_map": {"AutoTokenizer": [EVIL, None]}}
DEEP = 100_000


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def file(name: str, data: bytes) -> Readable:
    return Readable(name=name, size=len(data), read=lambda start, stop: data[start:stop])


@pytest.mark.parametrize(
    ("data", "left"),
    [
        (text({"a": 1, **NAMES_ONE}), {"a": 1}),
        (
            text({"text_config": {"b": [1, {**NAMES_ONE, "c": 2}]}}),
            {"text_config": {"b": [1, {"c": 2}]}},
        ),
        (text([NAMES_ONE, 3]), [{}, 3]),
        (text({"auto_map": {"auto_map": {}}}), {}),
        (text(dict.fromkeys(foreign_code.KEYS, "x") | {"a": 1}), {"a": 1}),
        (rb'{"\u0061uto_map": {}, "a": 1}', {"a": 1}),
        (rb'{"auto\u005Fmap": {}, "a": 1}', {"a": 1}),
        (rb'{"trust_\u0072\u0065mote_code": true, "a": 1}', {"a": 1}),
        (b'{"auto_map": 1, "auto_map": 2, "a": 1}', {"a": 1}),
        # What comes last counts, for all who read it.
        (b'{"x": {"auto_map": 1}, "x": {"a": 1}, "auto_map": 1}', {"x": {"a": 1}}),
        (text({**NAMES_ONE, "a": "größe \ud800 \u2028"}), {"a": "größe \ud800 \u2028"}),
        (
            text({**NAMES_ONE, "a": [1e-5, -0.0, 1 << 70, True, None]}),
            {"a": [1e-5, -0.0, 1 << 70, True, None]},
        ),
    ],
)
def test_what_names_code_is_taken_out(data: bytes, left: Any) -> None:
    assert json.loads(foreign_code.without("tokenizer_config.json", data)) == left


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b'{ "a":\t1.0e-5 }',
        text({"a": "auto_map"}),
        text({"auto_maps": 1, "automap": 2, "Auto_Map": 3}),
        rb'{"a": "caf\u00e9 \u0041"}',
        b'{"auto_map": 1',
        b"auto_map",
        b'\xff{"auto_map": 1}',
        json.dumps(NAMES_ONE).encode("utf-16"),  # transformers reads UTF-8 alone
        json.dumps(NAMES_ONE).encode("utf-8-sig"),  # and takes no byte order mark
        b"",
    ],
)
def test_all_else_keeps_its_bytes(data: bytes) -> None:
    assert foreign_code.without("config.json", data) is data


@pytest.mark.parametrize("name", [*foreign_code.VOCABULARIES, "sub/vocab.json"])
def test_a_word_of_a_vocabulary_is_no_name_of_code(name: str) -> None:
    data = text({"auto_map": 5, "model": {"vocab": {"trust_remote_code": 6}}})
    assert foreign_code.without(name, data) is data
    assert not foreign_code.may_name(name)


@pytest.mark.parametrize("name", ["config.json", "1_Pooling/config.json", "anything.json"])
def test_every_other_json_file_may_name_code(name: str) -> None:
    assert foreign_code.may_name(name)
    assert foreign_code.without(name, text(NAMES_ONE)) == b"{}"


@pytest.mark.parametrize("depth", [400, 600, 990, DEEP])
@pytest.mark.parametrize("inside", ["[", '{"a":'], ids=["lists", "objects"])
def test_what_is_nested_without_end_is_an_error(depth: int, inside: str) -> None:
    """Or is looked through: never a traceback."""
    nested = inside * depth + "1" + {"[": "]", '{"a":': "}"}[inside] * depth
    data = f'{{"auto_map": 1, "b": {nested}}}'.encode()
    for do in (
        lambda: foreign_code.without("a.json", data),
        lambda: foreign_code.classes([file("a.json", data)]),
    ):
        try:
            assert b"auto_map" not in (do() or b"")
        except PipelineError as error:
            assert str(error) == "a.json: is nested too deep"
            continue
        assert depth < DEEP


@pytest.mark.parametrize(
    ("auto_map", "named"),
    [
        ({"AutoTokenizer": [EVIL, None]}, [("AutoTokenizer", EVIL)]),
        ({"AutoTokenizer": [None, "tok.Fast"]}, [("AutoTokenizer", "tok.Fast")]),
        ({"AutoTokenizer": ["a.A", "b.B"]}, [("AutoTokenizer", "a.A"), ("AutoTokenizer", "b.B")]),
        (
            {"AutoConfig": "conf.C", "AutoModel": "mod.M"},
            [("AutoConfig", "conf.C"), ("AutoModel", "mod.M")],
        ),
        ([EVIL, None], [("AutoTokenizer", EVIL)]),
        ({"AutoConfig": {"no": "text"}}, []),
        ({"AutoConfig": 5}, []),
        ("tok.Evil", []),
        (None, []),
    ],
)
def test_the_classes_that_are_named(auto_map: Any, named: list[tuple[str, str]]) -> None:
    for document in ({"auto_map": auto_map}, {"text_config": [{"auto_map": auto_map}]}):
        code = foreign_code.classes([file("config.json", text(document))])
        assert code == [f"config.json names {name} for {use}" for use, name in named]


def test_files_are_told_apart() -> None:
    named = {"a.json": NAMES_ONE, "b.json": {}, "c.json": NAMES_ONE, "vocab.json": NAMES_ONE}
    assert foreign_code.classes(file(name, text(value)) for name, value in named.items()) == [
        f"{name} names {EVIL} for AutoTokenizer" for name in ("a.json", "c.json")
    ]


def test_a_failure_is_explained_by_the_code_that_was_missing() -> None:
    code = [f"config.json names m.M{n} for AutoModel" for n in range(5)]
    message, hint = foreign_code.explained("org/m", code, "it failed", "see the log")
    assert message.splitlines()[0] == "it failed"
    assert "org/m brings code of its own, which never runs here" in message
    assert "config.json names m.M0 for AutoModel" in message and "m.M3" not in message
    assert "where you trust its code" in hint
    assert foreign_code.explained("org/m", [], "it failed", "see") == ("it failed", "see")
