"""How files and folders are published, for the test of power cuts: what is there before, what runs,
and what the next run makes of what is left.

`after` gets a folder as a power cut may have left it, uses what the next run uses, and says whether
that took it for the `OLD` or the `NEW`, or made it `AGAIN`. It raises AssertionError where
something else was taken for good.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.bins.compile import git_tree, source
from pipeline.core.paths import Home
from pipeline.core.store import artifacts, publish, receipts, stat_cache

OLD, NEW, AGAIN = "old", "new", "made again"
BLOCKS = 3  # of a file of ours


@dataclass(frozen=True)
class Sequence:
    """`lasts`: what the run has done is there after it ended, whatever happens then. `notices`:
    what is torn is seen even where nothing was flushed."""

    before: Callable[[Path], None]
    act: Callable[[Path], None]
    after: Callable[[Path], str]
    lasts: bool = True
    notices: bool = False


def content(name: str, version: str, blocks: int = BLOCKS) -> bytes:
    """Bytes of which no block is like another's."""
    blocks_of = (hashlib.sha256(f"{name} {version} {n}".encode()).digest() for n in range(blocks))
    return b"".join(digest * 128 for digest in blocks_of)


def is_version(path: Path, version: str) -> bool:
    return path.read_bytes() == content(path.name, version)


# A file, and the receipts beside it


def recipe(version: str) -> dict[str, str]:
    return {"step": "test", "version": version}


def make_file(target: Path, version: str) -> None:
    def maker(path: Path) -> None:
        path.write_bytes(content(target.name, version))

    artifacts.make(target, recipe(version), maker)


def use_file(target: Path) -> str:
    """What the next run takes the file for; it must be that."""
    for version in (NEW, OLD):
        if receipts.revalidate(target, recipe(version)):
            assert is_version(target, version), f"{target.name} is torn, and passes for {version}"
            return version
    return AGAIN


def after_file(top: Path) -> str:
    target = top / "gguf" / "model ü.gguf"
    verdict = use_file(target)
    make_file(target, NEW)
    assert is_version(target, NEW)
    return verdict


FILE = Sequence(
    before=lambda top: make_file(top / "gguf" / "model ü.gguf", OLD),
    act=lambda top: make_file(top / "gguf" / "model ü.gguf", NEW),
    after=after_file,
)
FIRST_FILE = Sequence(
    before=lambda top: None,
    act=lambda top: make_file(top / "gguf" / "model ü.gguf", NEW),
    after=after_file,
)


def act_receipts(top: Path) -> None:
    for name in "cde":
        make_file(top / name, NEW)
    artifacts.take_away(top / "a")
    artifacts.discard(top / "b")


def after_receipts(top: Path) -> str:
    entries = receipts.load(top)
    assert {"b"} <= entries.keys() <= set("abcde"), entries.keys()
    verdicts = [use_file(top / name) for name in "cde"]
    first_missing = verdicts.index(AGAIN) if AGAIN in verdicts else 3
    assert set(verdicts[first_missing:]) <= {AGAIN}, "a later one was kept, an earlier one was not"
    assert {use_file(top / name) for name in "ab"} <= {OLD, AGAIN}
    return NEW if first_missing == 3 and "a" not in entries and not (top / "b").exists() else OLD


RECEIPTS = Sequence(
    before=lambda top: [make_file(top / name, OLD) for name in "ab"] and None,
    act=act_receipts,
    after=after_receipts,
)


# A folder with a receipt for each file, and one with a receipt for one file, as of the converter,
# Node.js and CUDA

STAMP = "stamp"


def fill(made: Path, version: str) -> None:
    (made / "lib" / "deep").mkdir(parents=True)
    (made / "server").write_bytes(content("server", version))
    (made / "lib" / "deep" / "library").write_bytes(content("library", version))
    (made / "lib" / "link").symlink_to("deep/library")
    (made / STAMP).write_text(version)


def make_folder(target: Path, version: str, every_file: bool) -> None:
    with artifacts.locked_folder(target):
        if folder_is(target, version, every_file):
            return
        with artifacts.new_folder(target) as made:
            fill(made, version)
            if every_file:
                receipts.record_folder(made, recipe(version), seconds=0)
            else:
                entry = receipts.stamp(made / STAMP, recipe(version), seconds=0)
                receipts.save(made, {STAMP: entry})


def folder_is(target: Path, version: str, every_file: bool) -> bool:
    """As the pipeline looks at it: by all receipts, or by that of the stamp."""
    if every_file:
        return receipts.folder_is_current(target, recipe(version), ["server"])
    entry = receipts.load(target).get(STAMP)
    return entry is not None and entry.recipe == recipe(version) and (target / "server").exists()


def use_folder(target: Path, every_file: bool) -> str:
    for version in (NEW, OLD):
        if folder_is(target, version, every_file):
            files = (target / "server", target / "lib" / "deep" / "library")
            whole = all(file.exists() and is_version(file, version) for file in files)
            assert whole and (target / "lib" / "link").is_symlink(), (
                f"torn, and passes for {version}"
            )
            return version
    return AGAIN


def folder_sequence(every_file: bool, exchange: bool = True, first: bool = False) -> Sequence:
    def act(top: Path) -> None:
        if not exchange:
            publish._exchange = lambda first, second: False
        make_folder(top / "bins ü", NEW, every_file)

    def after(top: Path) -> str:
        target = top / "bins ü"
        use_folder(target, every_file)  # as whoever reads it does, without repairing anything
        with artifacts.locked_folder(target):
            verdict = use_folder(target, every_file)
        make_folder(target, NEW, every_file)
        assert use_folder(target, every_file) == NEW
        left = {path.name for path in top.iterdir()} - {target.name, f".{target.name}.lock"}
        assert not left, left
        return verdict

    def before(top: Path) -> None:
        if not first:
            make_folder(top / "bins ü", OLD, every_file)

    return Sequence(before=before, act=act, after=after)


def after_taken_away(top: Path) -> str:
    for path in top.glob(".*.part"):
        artifacts.finish(path)
    return NEW if use_folder(top / "cuda", False) == AGAIN else OLD


TAKEN_AWAY = Sequence(
    before=lambda top: make_folder(top / "cuda", OLD, False),
    act=lambda top: artifacts.take_away(top / "cuda"),
    after=after_taken_away,
)


# What somebody copied or restored, without flushing it


def before_copied(top: Path) -> None:
    for name, version in (("backup", NEW), ("home", NEW)):
        make_file(top / name / "model", version)
        make_folder(top / name / "bins", version, True)
    for path in (top / "home" / "model", top / "home" / "bins"):
        publish.remove(path)


def act_copied(top: Path) -> None:
    """The copy has the times of now, as `cp -r` gives them."""
    shutil.copyfile(top / "backup" / "model", top / "home" / "model")
    shutil.copytree(
        top / "backup" / "bins", top / "home" / "bins", copy_function=shutil.copyfile, symlinks=True
    )
    assert receipts.revalidate(top / "home" / "model", recipe(NEW))
    assert receipts.revalidate_folder(top / "home" / "bins", recipe(NEW), ["server"])


def after_copied(top: Path) -> str:
    home = top / "home"
    if receipts.status(home / "model", recipe(NEW)) is receipts.Status.CURRENT:
        assert is_version(home / "model", NEW), "a torn copy passes for whole"
    if receipts.folder_is_current(home / "bins", recipe(NEW), ["server"]):
        assert is_version(home / "bins" / "server", NEW), "a torn copy passes for whole"
        return NEW
    return AGAIN


COPIED = Sequence(before=before_copied, act=act_copied, after=after_copied, lasts=False)


def act_source(top: Path) -> None:
    """A source tree that was copied into its place, and is taken as it is."""
    tree = git_tree.folder_hash(top / "backup")
    shutil.copytree(top / "backup", top / "llama.cpp", copy_function=shutil.copyfile)
    source.fetch(
        source.Source(folder=top / "llama.cpp", commit="c", tree=tree, fetched=True), Home(top)
    )


def after_source(top: Path) -> str:
    tree = git_tree.folder_hash(top / "backup")
    copied = source.Source(folder=top / "llama.cpp", commit="c", tree=tree, fetched=True)
    if not source.is_current(copied):
        return AGAIN
    assert git_tree.folder_hash(copied.folder) == tree, "a torn copy passes for whole"
    return NEW


def before_source(top: Path) -> None:
    (top / "backup" / "ggml").mkdir(parents=True)
    for name in ("CMakeLists.txt", "ggml/ggml.c"):
        (top / "backup" / name).write_bytes(content(name, NEW))


SOURCE = Sequence(before=before_source, act=act_source, after=after_source, lasts=False)


def act_stat_cache(top: Path) -> None:
    """A user's model, that was just copied to its place."""
    (top / "own.gguf").write_bytes(content("own.gguf", NEW))
    stat_cache.identity(top / "run" / "sha256.json", top / "own.gguf")


def after_stat_cache(top: Path) -> str:
    file, cache = top / "own.gguf", top / "run" / "sha256.json"
    known = stat_cache.recall(cache, file) if file.exists() else None
    if known is None:
        return AGAIN
    assert known == hashlib.sha256(file.read_bytes()).hexdigest(), "the hash is another file's"
    return NEW


STAT_CACHE = Sequence(
    before=lambda top: None, act=act_stat_cache, after=after_stat_cache, lasts=False
)
