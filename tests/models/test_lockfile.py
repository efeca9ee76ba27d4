"""pipeline.lock: written, read, and held against what is here."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.models import lockfile
from pipeline.models.lockfile import LockedModel
from pipeline.models.resolve import ModelFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"
A, B, BLOB = "a" * 64, "b" * 64, "c" * 40


def entry(**asked: str) -> LockedModel:
    """As `doit lock` writes one of a repository of safetensors."""
    return {
        "asked": {"model": "org/model", **asked},
        "name": "model",
        "kind": "safetensors",
        "precision": "BF16",
        "source": {"type": "hf", "ref": "org/model", "revision": COMMIT},
        "llama_cpp": {"commit": "c1", "tree": "t1"},
        "files": [
            {"name": "config.json", "size": 3, "blob": BLOB, "sha256": B},
            {"name": "model.safetensors", "size": 9, "sha256": A},
        ],
        "converter": {"requirements_sha256": "r1"},
        "quantization": {"type": "Q4_K_M", "imatrix_sha256": "i1"},
        "result": {"name": "model.q4_k_m.gguf", "sha256": B},
    }


def of_gguf(*names: str, **more: Any) -> LockedModel:
    return {
        **entry(),
        "kind": "gguf",
        "files": [{"name": name, "size": 5, "sha256": A} for name in names],
        **more,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mein häus" / "pipeline.lock"


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_written_is_read(path: Path) -> None:
    assert lockfile.read(path) == []
    lockfile.write(path, entry())
    assert lockfile.read(path) == [entry()]
    assert lockfile.find(path, {"model": "org/model"}) == entry()


def test_locking_twice_gives_the_same_bytes(path: Path) -> None:
    lockfile.write(path, entry())
    first = path.read_bytes()
    lockfile.write(path, entry())
    assert path.read_bytes() == first
    assert first.startswith(b"# Written by `doit lock`")
    assert os.fsencode(path.parent) not in first


def test_the_order_of_locking_does_not_matter(path: Path, tmp_path: Path) -> None:
    entries = [entry(), entry(quant="q8_0"), entry(quant="q4_k_m"), entry(filename="é.gguf")]
    other = tmp_path / "other" / "pipeline.lock"
    for one, two in zip(entries, reversed(entries), strict=True):
        lockfile.write(path, one)
        lockfile.write(other, two)
    assert path.read_bytes() == other.read_bytes()
    assert len(lockfile.read(path)) == 4


def test_an_entry_is_replaced_by_the_one_for_the_same_request(path: Path) -> None:
    lockfile.write(path, entry(quant="q8_0"))
    lockfile.write(path, entry())
    newer = {**entry(), "precision": "F16"}
    lockfile.write(path, newer)
    assert lockfile.find(path, newer["asked"]) == newer
    assert lockfile.find(path, {"model": "org/model", "quant": "q8_0"}) == entry(quant="q8_0")
    assert len(lockfile.read(path)) == 2


def test_odd_texts_survive(path: Path) -> None:
    odd = entry(pattern='"[*]\\ \n\t é 模 # = \x7f')
    odd["files"][1]["name"] = 'a "b"/c[1].gguf'
    lockfile.write(path, odd)
    assert lockfile.read(path) == [odd]


def test_nothing_is_left_beside(path: Path) -> None:
    lockfile.write(path, entry())
    beside = {file.name for file in path.parent.iterdir()} - {path.name}
    assert all(name.startswith(".") and name.endswith(".lock") for name in beside)


def test_a_file_that_cannot_be_read_is_not_overwritten(path: Path) -> None:
    written(path, "schema = 2\nmodel = []\n")
    with pytest.raises(UsageError, match="cannot be read as a lock file"):
        lockfile.write(path, entry())
    assert path.read_text(encoding="utf-8") == "schema = 2\nmodel = []\n"


def test_a_file_that_an_editor_saved_in_another_way(path: Path) -> None:
    lockfile.write(path, entry())
    text = path.read_text(encoding="utf-8").replace("\n", "\r\n")
    path.write_bytes(text.encode("utf-8-sig"))
    assert lockfile.read(path) == [entry()]
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(UsageError, match="is UTF-16; save it as UTF-8"):
        lockfile.read(path)


def test_a_request_that_is_not_pinned(path: Path) -> None:
    with pytest.raises(UsageError, match="does not pin this request; it is missing or empty"):
        lockfile.find(path, {"model": "org/model"})
    lockfile.write(path, entry())
    lockfile.write(path, entry(quant="q8_0"))
    for asked in (
        {},
        {"model": "org/other"},
        {"model": "org/model", "quant": "q4_k_m"},
        {"model": "org/model", "quant": "q8_0", "mmproj": "none"},
    ):
        with pytest.raises(UsageError, match="does not pin this request; it holds:") as caught:
            lockfile.find(path, asked)
        lines = caught.value.message.splitlines()
        assert "  model=org/model" in lines
        assert "  model=org/model quant=q8_0" in lines
        assert "./doitw lock" in caught.value.hint


WHOLE = "[[model]]\nasked={}\nname='n'\nkind='gguf'\nprecision=''\nsource={}\nfiles=[]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "schema"),
        ("schema = 1\n", "model"),
        ("schema = 2\nmodel = []\n", "schema 2, this version reads 1"),
        ("schema = '1'\nmodel = []\n", "this version reads 1"),
        ("schema = 1\nmodel = 5\n", "not iterable"),
        ("schema = 1\nmodel = [5]\n", "keys"),
        ("schema = 1\n[model]\na = 1\n", "keys"),
        ("schema = 1\n[[model]]\n", "lacks asked, files, kind, name, precision, source"),
        ("schema = 1\n" + WHOLE.replace("name='n'\n", ""), "lacks name"),
        ("schema = 1\n" + WHOLE.replace("files=[]\n", ""), "lacks files"),
        ("schema = 1\n" + WHOLE.replace("asked={}", "asked='x'"), "must be tables"),
        ("schema = 1\n" + WHOLE.replace("source={}", "source=[]"), "must be tables"),
        ("schema = 1\n" + WHOLE[:-4], "end of document"),
        ("schema = 1\nschema = 1\n", "overwrite"),
        ("<<<<<<< HEAD\nschema = 1\n", "line 1"),
        ("schema = 1\nx = " + "[" * 100_000, "recursion"),
        ('{"schema": 1}', "line 1"),
    ],
    ids=range(17),
)
def test_what_is_no_lock_file(path: Path, text: str, said: str) -> None:
    written(path, text)
    for use in (lockfile.read, lambda path: lockfile.find(path, {}), lambda path: write(path)):
        with pytest.raises(UsageError, match="cannot be read as a lock file") as caught:
            use(path)
        assert said in caught.value.message
        assert str(path) in caught.value.message
        assert caught.value.hint
    assert path.read_text(encoding="utf-8") == text


def write(path: Path) -> None:
    lockfile.write(path, entry())


def test_a_lock_file_that_is_no_text(path: Path) -> None:
    written(path, "").write_bytes(b"\xff\xfe\x00schema")
    with pytest.raises(UsageError, match="cannot be read as a lock file"):
        lockfile.read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match="cannot be read as a lock file"):
        lockfile.read(path)


def test_the_model_of_an_entry(path: Path) -> None:
    lockfile.write(path, entry())
    resolved = lockfile.resolved(lockfile.read(path)[0], Home(Path("home")))
    assert resolved is not None
    assert (resolved.kind, resolved.name, resolved.precision) == ("safetensors", "model", "BF16")
    assert resolved.slug == "org__model__0123456789ab"
    assert resolved.folder == Path("home") / "models" / "source" / resolved.slug
    assert resolved.files == (
        ModelFile("config.json", 3, "", BLOB),
        ModelFile("model.safetensors", 9, A),
    ), "a small file is what it is for the hub: its receipts stay current"
    assert resolved.source == entry()["source"]
    assert not resolved.local
    assert not resolved.mmproj
    assert "pipeline.lock" in resolved.why


def test_a_gguf_with_its_projector_in_the_order_of_its_parts() -> None:
    names = ("b/M-00001-of-00002.gguf", "b/M-00002-of-00002.gguf", "a-mmproj.gguf")
    locked = of_gguf(*names, mmproj=names[2], name="renamed")
    resolved = lockfile.resolved(locked, Home(Path("home")))
    assert resolved is not None
    assert tuple(file.name for file in resolved.files) == names
    assert (resolved.kind, resolved.mmproj, resolved.name) == ("gguf", names[2], "renamed")
    assert resolved.folder == Path("home") / "models" / "gguf" / resolved.slug


@pytest.mark.parametrize("kind", ["folder", "file", "package", "", None])
def test_an_entry_of_no_repository_has_nothing_to_resolve(kind: str | None) -> None:
    source = {} if kind is None else {"type": kind}
    assert lockfile.resolved({**entry(), "source": source}, Home(Path("home"))) is None


@pytest.mark.parametrize(
    "name",
    [
        *("../x.gguf", "/etc/x.gguf", "C:/x.gguf", "a\\..\\x.gguf", "a/../../x.gguf", "x.gguf."),
        *("con.gguf", ".x.gguf", "x\n.gguf", "", "a//x.gguf"),
    ],
)
def test_a_hostile_name_in_a_lock(name: str) -> None:
    with pytest.raises(PipelineError, match="not safe to write"):
        lockfile.resolved(of_gguf("x.gguf", name), Home(Path("home")))


def test_two_names_of_one_file_in_a_lock() -> None:
    with pytest.raises(PipelineError, match="the same file on some disks"):
        lockfile.resolved(of_gguf("x.gguf", "X.gguf"), Home(Path("home")))


@pytest.mark.parametrize(
    "change",
    [
        {"ref": "../../x/y"},
        {"ref": "/etc/passwd"},
        {"revision": "../../../../"},
        {"revision": "/x/y"},
        {"revision": "..\\..\\.."},
    ],
    ids=str,
)
def test_no_path_is_made_of_what_a_lock_calls_a_commit(change: dict[str, str]) -> None:
    source = {**entry()["source"], **change}
    try:
        resolved = lockfile.resolved({**entry(), "source": source}, Home(Path("home")))
    except PipelineError:
        return  # refused is fine too
    assert resolved is not None
    assert resolved.folder.parent == Path("home") / "models" / "source"
    assert not {"/", "\\", ":"} & set(resolved.folder.name)


@pytest.mark.parametrize(
    "files",
    [
        *([{"name": "x.gguf", "size": 5}], [{"name": "x.gguf", "sha256": A}], [{"size": 5}], [7]),
        *(["x.gguf"], 5, [{"name": 5, "size": 5, "sha256": A}], [None]),
        [{"name": "x.gguf", "size": 5, "sha256": ""}],
        [{"name": "x.gguf", "size": 5, "sha256": "sha256"}],
        [{"name": "x.gguf", "size": 5, "sha256": A.upper()}],
        [{"name": "x.gguf", "size": 5, "sha256": 5}],
        [{"name": "x.gguf", "size": 5, "blob": ""}],
        [{"name": "x.gguf", "size": 5, "blob": A}],
    ],
    ids=ascii,
)
def test_files_that_cannot_be_checked(files: Any) -> None:
    """A lock that says nothing of a file's bytes pins nothing; no traceback either."""
    with pytest.raises(PipelineError):
        lockfile.resolved({**entry(), "files": files}, Home(Path("home")))


@pytest.mark.parametrize("source", [{"type": "hf"}, {"type": "hf", "ref": "org/model"}])
def test_a_source_that_names_no_commit(source: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"source\.revision is not a commit"):
        lockfile.resolved({**entry(), "source": source}, Home(Path("home")))


@pytest.mark.parametrize("size", ["5", -5, 1.5, True])
def test_a_size_that_is_none(size: Any) -> None:
    with pytest.raises(PipelineError):
        lockfile.resolved(
            {**entry(), "files": [{"name": "x.gguf", "size": size, "sha256": A}]},
            Home(Path("home")),
        )


def differing(path: Path, locked: LockedModel, here: LockedModel) -> list[str]:
    """The lines that name what differs; empty where nothing does."""
    try:
        lockfile.require_same(path, locked, here)
    except UsageError as error:
        first, *lines = error.message.splitlines()
        assert first.startswith(f"frozen=1: {path}")
        assert "./doitw lock" in error.hint
        assert lines, "every refusal names something"
        return lines
    return []


def test_the_same_is_the_same(path: Path) -> None:
    assert not differing(path, entry(), entry())
    backwards = dict(reversed(entry().items()))
    backwards["files"] = backwards["files"][::-1]
    assert not differing(path, entry(), backwards)


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        (("precision",), "F16", "precision: locked is BF16, here is F16"),
        (("source", "revision"), "other", f"source.revision: locked is {COMMIT}, here is other"),
        (("llama_cpp", "tree"), "t2", "llama_cpp.tree: locked is t1, here is t2"),
        (("converter", "requirements_sha256"), "r2", "converter.requirements_sha256: locked is r1"),
        (("quantization", "type"), "Q8_0", "quantization.type: locked is Q4_K_M, here is Q8_0"),
        (("quantization", "imatrix_sha256"), "i2", "imatrix_sha256: locked is i1, here is i2"),
        (("result", "sha256"), A, f"result.sha256: locked is {B}, here is {A}"),
        (("files", 1, "sha256"), B, f"files[model.safetensors].sha256: locked is {A}, here is {B}"),
        (("files", 1, "size"), 10, "files[model.safetensors].size: locked is 9, here is 10"),
        (("files", 0, "blob"), "d" * 40, f"files[config.json].blob: locked is {BLOB}, here is ddd"),
        (("files", 0, "sha256"), A, f"files[config.json].sha256: locked is {B}, here is {A}"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_differs_is_named(
    path: Path, where: tuple[str | int, ...], value: Any, named: str
) -> None:
    here: Any = copy.deepcopy(entry())
    inner = here
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    (line,) = differing(path, entry(), here)
    assert named in line


def test_everything_that_differs_is_named(path: Path) -> None:
    here = {**entry(), "precision": "F16", "llama_cpp": {"commit": "c2", "tree": "t2"}}
    named = [line.split(":")[0].strip() for line in differing(path, entry(), here)]
    assert named == ["llama_cpp.commit", "llama_cpp.tree", "precision"]


def test_what_only_one_of_them_has(path: Path) -> None:
    more = {**entry(), "mmproj": "mmproj.gguf"}
    assert differing(path, more, entry()) == ["  mmproj: locked is mmproj.gguf, here is nothing"]
    assert differing(path, entry(), more) == ["  mmproj: locked is nothing, here is mmproj.gguf"]
    plain = entry()
    del plain["quantization"]["imatrix_sha256"]
    (line,) = differing(path, entry(), plain)
    assert "quantization.imatrix_sha256: locked is i1, here is nothing" in line


def test_a_file_more_or_less_is_named(path: Path) -> None:
    two, three = of_gguf("a.gguf", "b.gguf"), of_gguf("a.gguf", "b.gguf", "results.gguf")
    for lines in (differing(path, two, three), differing(path, three, two)):
        assert lines
        assert all("files[results.gguf]" in line for line in lines)


def test_the_result_is_compared_once_it_is_made(path: Path) -> None:
    before = entry()
    del before["result"]
    assert not differing(path, entry(), before), "not made yet"
    (line,) = differing(path, entry(), {**entry(), "result": {**entry()["result"], "sha256": A}})
    assert "result.sha256" in line


def test_a_name_that_contains_the_word_result(path: Path) -> None:
    locked = of_gguf("M-result.gguf")
    here = copy.deepcopy(locked)
    del here["result"]
    assert not differing(path, locked, here)
    here["files"][0]["sha256"] = B
    (line,) = differing(path, locked, here)
    assert "files[M-result.gguf].sha256" in line


def test_a_small_file_is_told_by_its_blob_until_it_is_here(path: Path) -> None:
    here = copy.deepcopy(entry())
    del here["files"][0]["sha256"]
    assert not differing(path, entry(), here)
    here["files"][0]["blob"] = "d" * 40
    assert any("files[config.json].blob" in line for line in differing(path, entry(), here))
    large = copy.deepcopy(entry())
    del large["files"][1]["sha256"]
    (line,) = differing(path, entry(), large)
    assert "files[model.safetensors].sha256" in line


def test_a_lock_written_before_the_model_was_made_here(path: Path) -> None:
    """As `ray` writes it: nodes make the model, and know its small files and its result first."""
    early = copy.deepcopy(entry())
    del early["result"], early["files"][0]["sha256"]
    assert not differing(path, early, entry())
    other = copy.deepcopy(entry())
    other["files"][1]["sha256"] = B
    (line,) = differing(path, early, other)
    assert "files[model.safetensors].sha256" in line


def test_a_text_has_each_request_once(path: Path) -> None:
    lockfile.write(path, entry())
    assert lockfile.text([entry(), entry()]) == path.read_text("utf-8")
