"""`graph`: the steps of a request, with the states that `list --status` has."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import Doit

OTHER = ("model=demo-embed", "quant=q5_k_m")  # which is not there
STATES = {"U": "up to date", "R": "to do"}


def states(doit: Doit, *words: str) -> dict[str, str]:
    return {node["name"]: node["state"] for node in doit("graph", *words, "format=json").json()}


@pytest.mark.build
@pytest.mark.parametrize("words", [(), ("model=demo-embed",), OTHER])
def test_the_states_are_those_of_the_list(demo: Doit, words: tuple[str, ...]) -> None:
    listed = dict(
        reversed(line.split()[:2]) for line in demo("list", "--status", *words).out.splitlines()
    )
    shown = states(demo, *words)
    assert "build_bins" in shown and "quantize" in shown
    known = {name: state for name, state in shown.items() if state in STATES.values()}
    groups = {"prepare"}  # doit has no state for these
    assert {n: s for n, s in known.items() if n not in groups} == {
        name: STATES[listed[name]] for name in known if name not in groups
    }


@pytest.mark.build
def test_a_model_shows_what_serve_takes_and_why(demo: Doit) -> None:
    nodes = {n["name"]: n for n in demo("graph", *OTHER, "format=json").json()}
    assert "package" not in nodes and nodes["serve"]["state"] == "always runs"
    assert nodes["fetch"]["state"] == "up to date" and nodes["fetch"]["why"] == ""
    assert (nodes["quantize"]["state"], nodes["quantize"]["why"]) == ("to do", "missing")
    assert nodes["quantize"]["after"] == ["convert"]
    text = demo("graph", *OTHER).out
    assert text.splitlines()[0].split() == ["serve", "always", "runs"]
    assert "quantize" in text and "missing" in text


def test_an_empty_home_has_everything_to_do(bare: Doit) -> None:
    shown = {n["name"]: n for n in bare("graph", "bins=prebuilt", "format=json").json()}
    assert shown["build_bins"]["state"] == "to do" and shown["build_bins"]["why"]
    assert not any(name.startswith("_") for name in shown)
    assert "ps" not in shown, "it runs after nothing"


def test_a_file_of_servers_has_a_state_for_all_its_models(bare: Doit, tmp_path: Path) -> None:
    file = tmp_path / "two ü.toml"
    file.write_text(
        '[instance.a.model]\nref = "demo"\n[instance.b.model]\nref = "demo-embed"\n', "utf-8"
    )
    nodes = {n["name"]: n for n in bare("graph", f"config={file}", "format=json").json()}
    assert nodes["up"]["state"] == "always runs"
    assert nodes["fetch"]["state"] == "to do"
    assert nodes["fetch"]["why"].startswith("a: ") and "; b: " in nodes["fetch"]["why"]


def test_pictures_are_written_into_the_named_file(bare: Doit, tmp_path: Path) -> None:
    for suffix in ("svg", "html", "dot"):
        file = tmp_path / "neü" / f"steps.{suffix}"
        run = bare("graph", f"out={file}")
        assert str(file) in run.err and run.out == ""
        first = file.read_bytes()
        assert b"build_bins" in first and not [*file.parent.glob("*.part")]
        bare("graph", f"out={file}")
        assert file.read_bytes() == first
    ElementTree.parse(tmp_path / "neü" / "steps.svg")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("out=steps.png",), "out=steps.png: the file's name must end in .svg, .html, .dot"),
        (("quants=q4_0",), "quants"),
        (("model=nowhere/",), "nowhere/"),
    ],
)
def test_wrong_words_are_answered(bare: Doit, words: tuple[str, ...], said: str) -> None:
    run = bare("graph", *words, status=3)
    assert said in run.err


def test_a_folder_is_no_file_to_write(bare: Doit, tmp_path: Path) -> None:
    folder = tmp_path / "folder.svg"
    folder.mkdir()
    assert "is a folder" in bare("graph", f"out={folder}", status=3).err
