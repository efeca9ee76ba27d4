from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.bins.compile import git_tree as tree

posix = pytest.mark.skipif(os.name == "nt", reason="links and modes of POSIX")

FILES = {
    "a/file": "in a folder",
    "a.b": "sorts before the folder a, after the file a",
    "a-b": "x",
    "a0": "x",
    "ab/a/b/c": "deep",
    "ab/empty": "",
    "größe/模型 e\u0301": "é",
    "with space/.hidden": "x",
    ".gitignore": "nothing-like-this\n",
    "B": "capitals sort first",
    "a\\b": "x",
}


def git(folder: Path, *words: str) -> str:
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", *words], cwd=folder, env=env, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def git_tree(folder: Path) -> str:
    git(folder, "init", "--quiet")
    git(folder, "add", "--all", "--force")
    return git(folder, "write-tree")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return root


@posix
def test_it_is_what_git_says(folder: Path) -> None:
    for mode, name in ((0o755, "run"), (0o744, "owner runs"), (0o655, "others run")):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(mode)
    (folder / "link").symlink_to("a/file")
    (folder / "folder link").symlink_to("größe")
    (folder / "dangling").symlink_to("../nowhere ü")
    (folder / "ab" / "out").symlink_to("/etc")
    (folder / "no files").mkdir()
    found = tree.folder_hash(folder)
    assert found == git_tree(folder)
    assert found == tree.folder_hash(folder)  # .git is not part of it


@pytest.mark.parametrize("names", [["a", "a.b", "a-b"], ["a/x", "a.b", "a-b"], ["ä", "z", "a/x"]])
def test_order(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert tree.folder_hash(tmp_path) == git_tree(tmp_path)


def test_no_files(tmp_path: Path) -> None:
    assert tree.folder_hash(tmp_path) == "4b825dc642cb6eb9a060e54bf8d69288fbee4904"


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux only")
def test_a_name_that_is_not_utf_8(folder: Path) -> None:
    (Path(os.fsdecode(os.fsencode(folder) + b"/gr\xf6\xdfe"))).write_text("x")
    assert tree.folder_hash(folder) == git_tree(folder)


def edit(root: Path) -> None:
    (root / "ab" / "a" / "b" / "c").write_text("peed")


def edit_with_an_old_time(root: Path) -> None:
    """As `cp -p` and `rsync -a` do."""
    (root / "a0").write_text("y")
    os.utime(root / "a0", ns=(1, 1))


def grow(root: Path) -> None:
    (root / "a-b").write_text("longer")
    os.utime(root / "a-b", ns=(1, 1))


def add(root: Path) -> None:
    (root / "a" / "empty").touch()


def add_an_old_one(root: Path) -> None:
    (root / "a" / "empty").touch()
    os.utime(root / "a" / "empty", ns=(1, 1))


def delete(root: Path) -> None:
    (root / "ab" / "a" / "b" / "c").unlink()


def delete_an_empty_one(root: Path) -> None:
    (root / "ab" / "empty").unlink()


def delete_the_only_one_of_a_folder(root: Path) -> None:
    (root / "lonely" / "__init__.py").unlink()


def rename(root: Path) -> None:
    (root / "a.b").rename(root / "a.c")


def relink(root: Path) -> None:
    (root / "link").unlink()
    (root / "link").symlink_to("B")


@posix
@pytest.mark.parametrize(
    "change",
    [
        *(edit, edit_with_an_old_time, grow, add, add_an_old_one, delete),
        *(delete_an_empty_one, delete_the_only_one_of_a_folder, rename, relink),
    ],
)
def test_the_stamp_tells_every_change(folder: Path, change: Callable[[Path], None]) -> None:
    (folder / "lonely").mkdir()
    (folder / "lonely" / "__init__.py").touch()
    (folder / "link").symlink_to("A")
    hour = 3_600_000_000_000
    for path in [*folder.rglob("*"), folder]:  # all of it was unpacked an hour ago
        moment = folder.stat().st_ctime_ns - hour
        os.utime(path, ns=(moment, moment), follow_symlinks=False)
    before, files = tree.stamp(folder), tree.folder_hash(folder)
    assert before == tree.stamp(folder)
    change(folder)
    assert tree.folder_hash(folder) != files
    assert tree.stamp(folder) != before
