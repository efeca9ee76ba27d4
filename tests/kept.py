"""Compiled programs that later runs of the tests take from the user's cache folder.

What no compiler cache saves, such as minutes of Vulkan's shaders. They lie under the key that
`doit recipe` prints, which changes whenever the programs would, and are put into a home with their
receipts: doit itself says that nothing is to be done. What compiles is tested without it, each time
that a clean checkout builds for the CPU.
"""

from __future__ import annotations

import contextlib
import os
import shutil

from conftest import REPOSITORY, Doit

from pipeline.core.paths import Home, cache
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import part, publish_folder, recover_folder, remove

FOLDER = cache(Home(REPOSITORY)) / "tests" / "programs"
MOST = 3  # builds that are kept


def build(doit: Doit, *words: str) -> None:
    """`build_bins` with these words, which finds all of it done where an earlier run kept it."""
    key = doit("recipe", *words).out.strip()
    tag, kept = key.rpartition("-")[0], FOLDER / key
    with only_one(kept):
        recover_folder(kept)
        if kept.is_dir():
            os.utime(kept)  # used last
            shutil.copytree(kept, doit.home / "bins" / tag)
            assert doit("build_bins", *words).steps == [], "what was kept is not what is built"
            return
        doit("build_bins", *words)
        try:
            shutil.copytree(doit.home / "bins" / tag, part(kept))
            publish_folder(part(kept), kept)
        finally:
            remove(part(kept))
    drop_old()


def drop_old() -> None:
    """All but the ones that were used last. Another run may do the same."""
    folders = [path for path in FOLDER.iterdir() if path.is_dir() and path.name[0] != "."]
    for old in sorted(folders, key=lambda path: path.stat().st_mtime)[:-MOST]:
        with only_one(old), contextlib.suppress(OSError):
            remove(old)
