"""Two checkouts as different as one machine allows, in which the same things are made."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from conftest import REPOSITORY, Run
from seeds import new_seed

from pipeline.core.paths import Home
from pipeline.core.paths import cache as cache_folder

CODE = ("dodo.py", "pipeline", "configs", "pyproject.toml")
NOBODY = 65534
LONG_AGO = 400 * 24 * 3600.0  # seconds


@dataclass(frozen=True)
class Checkout:
    """A copy of this checkout; `is_other`: as another user, with other settings."""

    root: Path
    env: dict[str, str]
    is_other: bool = False

    def __call__(self, *words: str, status: int = 0) -> Run:
        """doit, as though typed in the checkout."""
        return self.run(sys.executable, "-m", "pipeline", *words, status=status)

    def run(self, *command: str | Path, status: int = 0) -> Run:
        words = [str(word) for word in command]
        if self.is_other and os.geteuid() == 0 and (setpriv := shutil.which("setpriv")):
            # What root has in its own folder, such as the converter, stays readable.
            reading = ("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")
            ids = ("--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")
            words = [setpriv, *ids, *reading, "--", *words]
        done = subprocess.run(
            words,
            cwd=self.root,
            env=self.env,
            capture_output=True,
            encoding="utf-8",
            umask=0o077 if self.is_other else 0o022,
            preexec_fn=use_one_processor if self.is_other else None,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, (
            f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return Run(done.returncode, done.stdout, done.stderr)

    def sums(self, pattern: str) -> dict[str, str]:
        """The sha256 of files by path in the checkout."""
        files = sorted(path for path in self.root.glob(pattern) if path.is_file())
        assert files, f"{self.root}: there is no {pattern}"
        return {path.relative_to(self.root).as_posix(): digest(path) for path in files}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def use_one_processor() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@contextmanager
def two(first: Path) -> Iterator[tuple[Checkout, Checkout]]:
    """One in the folder `first`, the other in memory, where folders list their files the other way
    round."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ["HOME"],
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
    }
    others = {
        "LC_ALL": "C",
        "LANG": "tr_TR.UTF-8",
        "TZ": "Asia/Kathmandu",
        "PYTHONHASHSEED": str(new_seed()),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "40",
        "SOURCE_DATE_EPOCH": "1000000000",
    }
    memory = Path("/dev/shm")
    with ExitStack() as stack:
        place = stack.enter_context(TemporaryDirectory(dir=memory if memory.is_dir() else None))
        Path(place).chmod(0o755)
        roots = first / "a", Path(place) / "zwei ü wide" / "b c"
        for root in roots:
            root.mkdir(parents=True)
        copy(roots[0])
        copy(roots[1], backwards=True)
        for root, variables in zip(roots, (env, others), strict=True):
            variables["LLAMA_PIPELINE_CACHE"] = str(own_cache(root.parent / "cache"))
        yield Checkout(roots[0], env), Checkout(roots[1], {**env, **others}, is_other=True)


def own_cache(folder: Path) -> Path:
    """A cache that has the converter, which takes minutes to install."""
    folder.mkdir()
    for path in cache_folder(Home(REPOSITORY)).glob("converter-*"):
        (folder / path.name).symlink_to(path)
    return folder


def copy(root: Path, backwards: bool = False) -> None:
    """Copy what runs, with the programs; `backwards`: in the other order, and long ago."""
    code = [path for name in CODE for top in [REPOSITORY / name] for path in (top, *top.rglob("*"))]
    programs = (REPOSITORY / "bins").glob("[!.]*/*")
    files = {path for path in (*code, *programs) if path.is_file()}
    for path in sorted(files, reverse=backwards):
        if "__pycache__" in path.parts:
            continue
        target = root / path.relative_to(REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
        if backwards and not path.is_relative_to(REPOSITORY / "bins"):
            when = time.time() - LONG_AGO
            os.utime(target, (when, when))
    (root / "bins" / ".source").symlink_to(REPOSITORY / "bins" / ".source")


def give(root: Path) -> None:
    """Everything in it belongs to nobody, where that can be."""
    if os.geteuid() == 0:
        for path in (root, *root.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
            assert stat.S_ISLNK(path.lstat().st_mode) or path.stat().st_uid == NOBODY
