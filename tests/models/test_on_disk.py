"""Which files belong together, and which ones a reference means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from pipeline.core.paths import Home
from pipeline.core.store import receipts
from pipeline.models import on_disk
from pipeline.models.reference import FileFilter, parse
from pipeline.models.resolve import local_slug

COMMITS = ("0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98")


def put(home: Home, slug: str, names: list[str], recipe: dict[str, Any], **source: str) -> None:
    for name in names:
        path = home.models / "gguf" / slug / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF" + name.encode())
        receipts.change(path, receipts.stamp(path, recipe, seconds=0, source=source))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Two revisions of a repository, one of them split and with a projector, and a model that was
    quantized from the user's own file."""
    home = Home(tmp_path / "hôme")
    for commit in COMMITS:
        source = {"type": "hf", "ref": "Org/The__Model", "revision": commit}
        slug = f"Org__The__Model__{commit[:12]}"
        names = [
            "sub/the-model-Q4_K_M-00001-of-00002.gguf",
            "sub/the-model-Q4_K_M-00002-of-00002.gguf",
        ]
        names += ["the-model-Q8_0.gguf", "mmproj-f16.gguf"] if commit == COMMITS[0] else []
        put(home, slug, names, {"step": "fetch", **source}, **source)
    own = tmp_path / "own.gguf"
    own.write_bytes(b"GGUF")
    recipe = {"step": "quantize", "type": "Q4_K_M", "input": "sha256:0", "tool": {}}
    put(home, local_slug(own), ["model.q4_k_m.gguf"], recipe, type="file", ref=str(own))
    return home


def meant(home: Home, text: str, **files: str) -> list[str]:
    stored = on_disk.look(home).models
    found = [x for x in stored if on_disk.means(parse(text), x, home)]
    chosen = on_disk.narrow(found, FileFilter(**files))
    return sorted(f"{x.revision[:4]} {x.kind} {x.quant}" for x in chosen)


def test_what_belongs_together(home: Home) -> None:
    stored = on_disk.look(home)
    split = next(x for x in stored.models if len(x.files) > 1)
    assert [path.name[-19:] for path in split.files] == [
        f"-0000{n}-of-00002.gguf"[-19:] for n in (1, 2)
    ]
    assert (split.name, split.quant, split.kind) == ("The__Model", "Q4_K_M", "model")
    assert split.bytes == sum(path.stat().st_size for path in split.files)
    assert stored.unknown == stored.unfinished == ()


ALL = ["0123 model Q4_K_M", "0123 model Q8_0", "0123 projector F16", "fedc model Q4_K_M"]


@pytest.mark.parametrize(
    ("text", "files", "found"),
    [
        ("Org/The__Model", {}, ALL),
        ("org/the__model", {}, ALL),
        ("Org/The__Model@main", {}, ALL),
        (f"Org/The__Model@{COMMITS[1]}", {}, ALL[3:]),
        (f"Org/The__Model@{COMMITS[0][:7]}", {}, ALL[:3]),
        ("Org/The__Model", {"quant": "Q8_0"}, ["0123 model Q8_0"]),
        ("Org/The__Model", {"filename": "the-model-Q8_0.gguf"}, ["0123 model Q8_0"]),
        ("Org/The__Model", {"pattern": "sub/*"}, [ALL[0], ALL[3]]),
        ("Org/The__Model", {"pattern": "*-q8_0*"}, ["0123 model Q8_0"]),
        ("Org/The__Model", {"pattern": "*Org*"}, []),  # the folder in the home
        ("Org/The__Model", {"quant": "Q4-K-M"}, [ALL[0], ALL[3]]),
        ("Org/The__Model", {"quant": "Q4_K"}, [ALL[0], ALL[3]]),
        ("Org/The__Model", {"filename": "the-model-Q4_K_M-00001-of-00002.gguf"}, [ALL[0], ALL[3]]),
        ("Org/Other", {}, []),
        ("demo", {}, []),
    ],
)
def test_what_a_reference_means(
    home: Home, text: str, files: dict[str, str], found: list[str]
) -> None:
    assert meant(home, text, **files) == found


def test_a_projector_that_was_converted_is_no_model(tmp_path: Path) -> None:
    home, source = Home(tmp_path / "home"), {"type": "folder", "ref": "/sees"}
    made = {"step": "convert", "outtype": "F16"}
    put(home, "local__sees__01234567", ["model.f16.gguf"], made, **source)
    put(home, "local__sees__01234567", ["mmproj.f16.gguf"], {**made, "projector": True}, **source)
    stored = on_disk.look(home)
    assert [(x.files[0].name, x.kind, x.quant) for x in stored.models] == [
        ("model.f16.gguf", "model", "F16"),
        ("mmproj.f16.gguf", "projector", "F16"),
    ]
    assert [x.files[0].name for x in on_disk.by_name(stored).values()] == ["model.f16.gguf"]


def test_each_model_has_a_name_of_its_own(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")

    def fetched(owner: str, commit: str, *names: str) -> str:
        source = {"type": "hf", "ref": f"{owner}/M", "revision": commit}
        slug = f"{owner}__M__{commit[:12]}"
        put(home, slug, [*names], {"step": "fetch", **source}, **source)
        return slug

    def named() -> dict[str, str]:
        models = on_disk.by_name(on_disk.look(home))
        return {name: f"{x.slug} {x.names[0]}" for name, x in models.items()}

    old = fetched("A", COMMITS[1], "m-Q8_0.gguf")
    assert named() == {"M": f"{old} m-Q8_0.gguf"}
    path = home.models / "gguf" / old / "m-Q8_0.gguf"
    entry = receipts.load(path.parent)[path.name]
    receipts.change(path, replace(entry, made_at="2020-01-01T00:00:00+00:00"))
    new = fetched("A", COMMITS[0], "m-Q8_0.gguf")
    revisions = {"M": f"{new} m-Q8_0.gguf", f"{old}-Q8_0": f"{old} m-Q8_0.gguf"}
    assert named() == revisions

    other = fetched("B", COMMITS[0], "m-Q8_0.gguf")
    assert named() == {
        "A__M-Q8_0": revisions["M"],
        f"{old}-Q8_0": revisions[f"{old}-Q8_0"],
        "B__M-Q8_0": f"{other} m-Q8_0.gguf",
    }
    fetched("B", COMMITS[0], "n-Q8_0.gguf", "n-Q4_0.gguf")
    names = named()
    assert names["M-Q4_0"] == f"{other} n-Q4_0.gguf"
    assert names[f"{other}-n-Q8_0.gguf"] == f"{other} n-Q8_0.gguf" and len(names) == 5


def test_a_name_means_the_file_without_a_folder_first(tmp_path: Path) -> None:
    home, source = Home(tmp_path / "home"), {"type": "hf", "ref": "Org/M", "revision": COMMITS[0]}
    names = ["m-Q8_0.gguf", "sub/m-Q8_0.gguf", "sub/n-Q8_0.gguf"]
    put(home, f"Org__M__{COMMITS[0][:12]}", names, {"step": "fetch", **source}, **source)
    stored = on_disk.look(home).models
    for name, found in {names[0]: [names[0]], "n-Q8_0.gguf": [names[2]]}.items():
        chosen = on_disk.narrow(stored, FileFilter(filename=name))
        assert [each for x in chosen for each in x.names] == found


def test_the_size_of_a_mix_is_read_with_its_point(tmp_path: Path) -> None:
    home, recipe = Home(tmp_path / "home"), {"step": "quantize", "type": "4.8BPW"}
    put(home, "local__m__01234567", ["model.4.8bpw.gguf"], recipe, type="folder", ref="/m")
    stored = on_disk.look(home).models
    assert on_disk.narrow(stored, FileFilter(quant="4.8BPW")) == [*stored]
    assert on_disk.narrow(stored, FileFilter(quant="48BPW")) == []


def test_the_users_own_file(home: Home, tmp_path: Path) -> None:
    own = tmp_path / "own.gguf"
    assert meant(home, str(own)) == [" model Q4_K_M"]
    own.unlink()  # what was made from it is still known by its path, name and slug
    named = [x for x in on_disk.look(home).models if on_disk.is_named(str(own), x)]
    assert [x.name for x in named] == ["own"] and on_disk.is_named(named[0].slug, named[0])


def test_what_is_unfinished_or_changed_is_no_model(home: Home) -> None:
    path = next((home.models / "gguf").rglob("the-model-Q8_0.gguf"))
    path.rename(path.with_name(f".{path.name}.part"))
    other = next((home.models / "gguf").rglob("model.q4_k_m.gguf"))
    other.write_bytes(b"GGUF, and longer than it was")
    stored = on_disk.look(home)
    assert [left.name for left in stored.unfinished] == [f".{path.name}.part"]
    assert stored.unknown == (other,)
    assert "Q8_0" not in {x.quant for x in stored.models} and len(stored.models) == 3


def test_what_another_run_removes_meanwhile_is_not_old(home: Home) -> None:
    (made,) = [x for x in on_disk.look(home).models if x.files[0].name == "model.q4_k_m.gguf"]
    assert not on_disk.is_up_to_date(made, {}, {"commit": "another one"})
    receipts.change(made.files[0], None)
    assert on_disk.is_up_to_date(made, {}, {"commit": "another one"})


def test_what_may_not_be_listed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk has a `lost+found` that only root may list, and a folder may be another user's: what
    is beside them is found as before."""
    closed = {home.models / "gguf" / "lost+found", home.models / "gguf" / "theirs"}
    for folder in closed:
        folder.mkdir()
    before, of_path = on_disk.look(home), Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:
        if folder in closed:
            raise PermissionError(13, "Permission denied", str(folder))
        return of_path(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    found = on_disk.look(home)
    assert found.models == before.models and len(found.models) == 5
    assert [path.name for path in found.unknown] == ["theirs"]
    assert not list(on_disk.empty(home))
