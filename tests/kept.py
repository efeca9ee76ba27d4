"""What takes minutes to make, and what later runs of the tests take from the user's cache folder.

Compiled programs, for what no compiler cache saves, such as minutes of Vulkan's shaders,
llama.cpp's page, which npm builds, large models that the official converter made, how large
llama-quantize made what, and wine's drives. Each lies under a key that changes whenever it would
be made otherwise, and is put into a home with its receipts: doit itself says whether anything is
to be done, and what it made anew, or otherwise, is kept in its place. What compiles is tested
without it, each time that a clean checkout builds for the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from conftest import REPOSITORY, Doit

from pipeline.bins.compile import git_tree, node, source, web_ui
from pipeline.core.paths import Home, cache
from pipeline.core.store.hashing import sha256
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import (
    part,
    publish_folder,
    publish_text,
    recover_folder,
    remove,
)
from pipeline.models import convert, run_converter, staging
from pipeline.models.convert import Conversion

FOLDER = cache(Home(REPOSITORY)) / "tests"
MOST = 3  # of a kind that are kept
LONGEST = 3500  # seconds for a build, without anything kept and beside other tests
MOST_CONVERTED = 24  # models, of some hundred MB at most
RECEIPTS = ".state.json"


def build(doit: Doit, *words: str) -> None:
    """`build_bins` with these words, which finds all of it done where an earlier run kept it."""
    key = doit("recipe", *words).out.strip()
    tag, kept = key.rpartition("-")[0], FOLDER / "programs" / key
    with only_one(kept):
        recover_folder(kept)
        if kept.is_dir():
            os.utime(kept)  # used last
            shutil.copytree(kept, doit.home / "bins" / tag)
            assert doit("build_bins", *words).steps == [], "what was kept is not what is built"
            return
        doit("build_bins", *words, timeout=LONGEST)
        keep(doit.home / "bins" / tag, kept)


def build_with_page(doit: Doit) -> None:
    """`build_bins`, which finds llama.cpp's page done where an earlier run kept it."""
    place, kept = doit.home / "bins" / ".ui", FOLDER / "pages" / page_key(doit.home)
    with only_one(kept):
        recover_folder(kept)
        if kept.is_dir() and not place.exists():
            os.utime(kept)
            put(kept, place)
        doit("build_bins")
        if receipts_of(place) not in (b"", receipts_of(kept)):
            keep(place, kept)


def page_key(top: Path) -> str:
    """A hash of all that the page depends on, and of the code that makes it."""
    ui, why = web_ui.choose("auto", source.find(Home(top)), Home(top))
    return key_of([web_ui.recipe(ui) if ui else why, *code_of(git_tree, node, web_ui)])


def code_of(*modules: ModuleType) -> list[str]:
    return [Path(str(module.__file__)).read_text("utf-8") for module in modules]


def key_of(recipe: object) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def converted(made: Conversion, home: Home) -> None:
    """The official converter's result, at the conversion's target and without a receipt where an
    earlier run kept it. For reading only."""
    folder = made.resolved.folder
    files = {file.name: sha256(folder / file.name) for file in made.resolved.files}
    code = code_of(convert, run_converter, staging)
    kept = FOLDER / "converted" / key_of([made.recipe, files, *code])
    with only_one(kept):
        recover_folder(kept)
        if kept.is_dir():
            os.utime(kept)
            made.target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(kept / made.target.name, made.target)
            return
        convert.make(made, home)
        remove(part(kept))
        part(kept).mkdir(parents=True)
        link_or_copy(made.target, part(kept) / made.target.name)
        publish_folder(part(kept), kept)
        drop_old(kept.parent, MOST_CONVERTED)


def trained(kind: str, key: list[str], make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills with a model that is trained for a test, which takes minutes.
    For reading only."""
    kept = FOLDER / "trained" / f"{kind}-{key_of(key)}"
    with only_one(kept):
        recover_folder(kept)
        if kept.is_dir():
            os.utime(kept)
            return kept
        remove(part(kept))
        part(kept).mkdir(parents=True)
        make(part(kept))
        publish_folder(part(kept), kept)
        drop_old(kept.parent, MOST)
        return kept


def link_or_copy(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # on another disk
        shutil.copy2(file, to)


def quantized_bytes(program: Path, model: Path, quant: str, make: Callable[[], int]) -> int:
    """How many bytes this program makes of this model, which is the same each time."""
    kept = FOLDER / "quantized" / f"{key_of([sha256(program), sha256(model), quant])}.bytes"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        publish_text(kept, str(make()))
    return int(kept.read_text("ascii"))


def receipts_of(folder: Path) -> bytes:
    file = folder / RECEIPTS
    return file.read_bytes() if file.exists() else b""


def keep(made: Path, kept: Path) -> None:
    """Put a folder into the cache, in the place of what is there, and drop old ones beside it."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    put(made, kept)
    os.utime(kept)
    drop_old(kept.parent, MOST)


def drop_old(top: Path, most: int) -> None:
    """Keep so many folders, the ones used last."""
    folders = [path for path in top.iterdir() if path.is_dir() and path.name[0] != "."]
    for old in sorted(folders, key=lambda path: path.stat().st_mtime)[:-most]:
        with only_one(old), contextlib.suppress(OSError):
            remove(old)  # another run may do the same


def put(made: Path, place: Path) -> None:
    """A copy of a folder, whole or not at all, with the times that its receipts hold."""
    place.parent.mkdir(parents=True, exist_ok=True)
    remove(part(place))  # a killed run's
    try:
        shutil.copytree(made, part(place), ignore=shutil.ignore_patterns("*.lock"))
        publish_folder(part(place), place)
    finally:
        remove(part(place))
