"""What was measured of quants, and for mixes: kept while a model on disk is of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.commands import check, leftovers, prune, quality, quality_setup
from pipeline.commands.model import Model
from pipeline.commands.programs import Programs
from pipeline.commands.request import Request, request
from pipeline.commands.session import Session
from pipeline.core.errors import UsageError
from pipeline.core.paths import Home
from pipeline.core.store import receipts
from pipeline.core.store.locks import only_one
from pipeline.models import on_disk
from pipeline.report.quality import Kind

INPUT = f"sha256:{'1' * 64}"
OLD = 31 * 86400


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home with a mix and its GGUF."""
    monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(tmp_path / "cache"))
    home = Home(tmp_path / "hôme")
    folder = home.models / "gguf" / "org__m__0123456789ab"
    folder.mkdir(parents=True)
    recipes = {"model.4.8bpw.gguf": "quantize", "mix.4.8bpw.json": "mix"}
    for name, step in recipes.items():
        (folder / name).write_text(name)
        recipe = {"step": step, "input": INPUT, "type": "4.8BPW"}
        receipts.change(folder / name, receipts.stamp(folder / name, recipe, seconds=1))
    return home


def write(file: Path, value: Mapping[str, object], age: float = OLD) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
    os.utime(file, (time.time() - age,) * 2)
    return file


def pruned(home: Home) -> set[Path]:
    found = prune.of_measurements(home, on_disk.look(home), 30)
    return {path for each in found for path in each.paths}


def test_prune_takes_what_no_model_on_disk_is_of(home: Home) -> None:
    (made,) = home.models.rglob("*.gguf")
    mixes, qualities = home.run / "mix", home.run / "quality"
    write(mixes / "here.json", {"input": INPUT, "errors": {}})
    write(qualities / "here.json", {"of": receipts.known_sha256(made), "pieces": []})
    gone = {
        write(mixes / "gone.json", {"input": "sha256:2", "errors": {}}),
        write(mixes / "unknown.json", {"errors": {}}),
        write(qualities / "gone.json", {"of": "2", "pieces": []}),
    }
    write(qualities / "new.json", {"of": "2", "pieces": []}, age=0)
    assert pruned(home) == gone


@contextmanager
def answers(home: Home) -> Iterator[tuple[Path, Path]]:
    """What two models answered: one is still being compared with."""
    left, used = (home.run / "quality" / f"base-{name}.logits" for name in ("0", "1"))
    for file in (left, left.with_suffix(".txt"), used):
        write(file, {}, age=0)
    with only_one(used.with_suffix("")):
        yield left, used


def test_what_a_killed_run_compared_with_goes(home: Home) -> None:
    with answers(home) as (left, used):
        assert pruned(home) == {left, left.with_suffix(".txt")}
        leftovers.clear(home)
        assert left.exists(), "no run was killed"
        record = write(home.run / "active" / "1.json", {"command": "quality"})
        os.utime(record, (0, 0))  # before the process of that number began
        leftovers.clear(home)
        assert not left.exists() and not left.with_suffix(".txt").exists() and used.exists()


@pytest.mark.parametrize("measures", [False, True])
def test_a_text_is_for_what_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measures: bool
) -> None:
    monkeypatch.setenv("LLAMA_PIPELINE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.argv", ["doit", "prepare", "name=quality", "quality"])
    text = tmp_path / "text.txt"
    text.write_text("Some words.")
    requested = request({"text": str(text)}).replace(measures=measures)
    model = Model(requested, Programs(requested, Home(tmp_path / "home")))
    if measures:
        check.check_limit(model)
        return
    with pytest.raises(UsageError, match="text=: not used without max_kld="):
        check.check_limit(model)


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        ({"model": "org/m:Q8_0@v1"}, ["model=org/m", "revision=v1"]),
        (
            {"model": "org/m@v1+x", "pattern": "*it*"},
            ["model=org/m", "revision=v1+x", "pattern=*it*"],
        ),
        ({"model": "hf.co/org/m:a.gguf"}, ["model=org/m", "filename=a.gguf"]),
        ({"hf_model": "here/m"}, ["model=hf:here/m"]),
        ({"model": "demo-embed", "imatrix": "text.txt"}, ["model=demo-embed", "imatrix=text.txt"]),
    ],
)
def test_the_command_that_repeats_a_measurement_names_the_same_model(
    words: dict[str, str], typed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_PIPELINE_CWD", str(tmp_path))
    monkeypatch.setenv("LLAMA_PIPELINE_HOME", str(tmp_path / "home"))
    (tmp_path / "here" / "m").mkdir(parents=True)
    (tmp_path / "text.txt").write_text("words " * 1000)
    model = Session(request(words), words).model
    assert quality.named(model) == typed
    again = request(dict(word.split("=", 1) for word in (*typed, "quants=q8_0")))
    first = model.request
    assert again.reference and first.reference and again.reference.repo == first.reference.repo
    assert again.reference.revision == first.reference.revision
    assert again.wanted.imatrix == first.wanted.imatrix
    assert quality.requested(Session(again, words).model) == ("Q8_0",)
    if first.reference.kind == "hub":
        commit = "a" * 40
        assert f"revision={commit}" in quality.named(model, commit)


def test_what_is_kept_of_passages_is_known_by_the_passages(tmp_path: Path) -> None:
    """How prose is told from the rest may change, and with it what was measured."""
    prose = "This is a paragraph of plain words, long enough that it counts as prose.\n\n"
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text(prose * 2)
    second.write_text(prose + "| a | table |\n\n" + prose)

    def digest(file: Path, kind: Kind) -> str:
        return quality_setup.text_digest(Request(sample_text=file), Home(tmp_path), kind)

    assert digest(first, "embedding") == digest(second, "embedding")
    assert digest(first, "language") != digest(second, "language")
    second.write_text(prose)
    assert digest(first, "embedding") != digest(second, "embedding")
