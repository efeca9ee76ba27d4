"""What the cut runs work on: for each command a folder as it is before, small enough to be put back
in some milliseconds, and what has to hold in it after a run that was cut.

The parts are real but for the converter, of which a stand-in writes the same GGUF in pieces, and
another llama.cpp, which CMake builds in a second.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
import psutil
import traced
from conftest import Run
from traced import Call, Traced

from pipeline.core.statement import SIGNATURE

LARGE = 1_000_000  # bytes; larger files are put back as links, and nobody may write into them
_hashes: dict[tuple[int, ...], str] = {}
ANY_CONTENT = ("logs", "run", "resolved")  # folders whose files hold times


@dataclass(frozen=True)
class Whole:
    """What a run that is not cut makes of a world: its calls and steps, what was published before,
    and all that is there after it and the next run."""

    calls: tuple[Call, ...]
    steps: tuple[str, ...]
    before: dict[str, str]
    after: dict[str, str]


@dataclass
class World:
    """A command, and the folder `top` that it works on. `setup` has to run before it, `after` ends
    what it left running; the next run is the same command."""

    top: Path
    words: tuple[str, ...]
    setup: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    ends: tuple[int, ...] = (0,)  # the statuses that the next run may have
    env: dict[str, str] = field(default_factory=dict)
    below: Path | None = None  # the folder in which calls are counted, if not `top`
    most_kills: int = 0  # of the calls before which a kill is tried some; 0: all
    most_fails: int = 0  # of the calls that may fail some, where a try may take long; 0: all
    between: frozenset[str] = frozenset()  # hashes of files that are there in the middle alone
    patch: str = ""  # Python that leaves out repetitions, or breaks what the harness is to notice

    @property
    def home(self) -> Path:
        return self.top / "mein häus"

    @property
    def cache(self) -> Path:
        return self.top / "cache ü"

    @property
    def kept(self) -> Path:
        """A copy of `top` as it was before."""
        return self.top.with_name(f"{self.top.name}.kept")

    @property
    def temporary(self) -> Path:
        """The system's temporary folder, which the system clears."""
        return self.top.with_name(f"{self.top.name}.tmp")

    @property
    def variables(self) -> dict[str, str]:
        own = {
            "LLAMA_PIPELINE_HOME": str(self.home),
            "LLAMA_PIPELINE_CACHE": str(self.cache),
            "LLAMA_PIPELINE_CWD": str(self.top),
            "TMPDIR": str(self.temporary),
        }
        return {**os.environ, **own, **self.env}

    def doit(self, *words: str, status: int | None = 0) -> Run:
        """doit, not traced."""
        run = Run(
            *forked.run(["-c", traced.PATCHED, self.patch, *words], self.variables, traced.PATIENCE)
        )
        if status is not None:
            assert run.status == status, f"{words}: {run.status}\n{run.out}\n{run.err}"
        return run

    def keep(self) -> None:
        """From here each try begins."""
        self.temporary.mkdir()
        copy(self.top, self.kept)

    def restore(self) -> None:
        shutil.rmtree(self.top)
        copy(self.kept, self.top)

    def run(self, *options: str, record: bool = False) -> Traced:
        """The command from the start, under the tracer."""
        self.restore()
        if self.setup:
            self.doit(*self.setup)
        return traced.run(
            self.words,
            self.variables,
            [self.below or self.top],
            *options,
            record=record,
            patch=self.patch,
            after=lambda: self.doit(*self.after) if self.after else None,
        )

    def run_again(self) -> Run:
        """The next run, not traced; it ends well."""
        run = self.doit(*self.words, status=None)
        assert run.status in self.ends, f"{run.status}\n{run.out}\n{run.err}"
        if self.after:
            self.doit(*self.after)
        return run

    def listing(self) -> dict[str, str]:
        """All that is there, by its path: of files a hash, where they hold no times. No locks, and
        nothing of what is in CMake's own folders."""
        return {
            str(path.relative_to(self.top)): content(path)
            for path in files(self.top)
            if path.suffix != ".lock"
        }

    def published(self) -> dict[str, str]:
        """Of that the files that users and later runs rely on."""
        return {name: value for name, value in self.listing().items() if is_published(name)}

    def require_receipts(self) -> None:
        """What a receipt says of a file that is as it was recorded is true."""
        for receipts in self.top.rglob(".state.json"):
            entries = json.loads(receipts.read_text("utf-8"))["artifacts"]
            for name, entry in entries.items():
                file = receipts.with_name(name)
                if not file.is_file() or file.stat().st_mtime_ns != entry["mtime_ns"]:
                    continue
                assert file.stat().st_size == entry["size"], file
                assert sha256(file) == entry["sha256"], file

    def whole_run(self) -> Whole:
        """Keep the world as it is, and run the command and the next run without a cut."""
        self.keep()
        before = self.published()
        first = self.run(record=True)
        assert first.status == 0, first.err
        self.run_again()
        return Whole(first.calls, tuple(first.steps), before, self.listing())

    def require_sound(self, whole: Whole) -> None:
        """What is published after a cut is the old or the new, whole, and so are the receipts."""
        self.require_receipts()
        for name, value in self.published().items():
            known = {state[name] for state in (whole.before, whole.after) if name in state}
            assert value in known | self.between, f"{name} is neither the old one nor the new one"

    def require_no_process(self) -> None:
        """Nothing that was started here still runs."""
        home = str(self.home)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                assert process.environ().get("LLAMA_PIPELINE_HOME") != home, process

    def require_right(self, whole: Whole) -> None:
        """All is there as without a cut, and nothing else is."""
        now = self.listing()
        new = now.keys() - whole.after.keys()
        left = sorted(name for name in new if "/logs/" not in name)  # they say what went wrong
        assert not left, f"left behind: {left}"
        self.require_done(whole, now)

    def require_done(self, whole: Whole, now: Mapping[str, str]) -> None:
        """All that is published is there now, with its receipts."""
        for name, value in whole.after.items():
            if is_published(name) or name.endswith(".state.json"):
                assert now.get(name) == value, name


def copy(folder: Path, target: Path) -> None:
    """A copy with the times, in which large files are links."""

    def link_or_copy(file: str, to: str) -> None:
        if os.path.getsize(file) > LARGE:  # noqa: PTH202
            os.link(file, to)
        else:
            shutil.copy2(file, to)

    shutil.copytree(folder, target, symlinks=True, copy_function=link_or_copy)


def files(folder: Path) -> Iterator[Path]:
    """What is below a folder, in order; not what is in CMake's folders."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink() and path.name != ".build":
            yield from files(path)


def content(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.is_dir():
        return "folder"
    if not {*ANY_CONTENT}.isdisjoint(path.parts):
        return "file"
    if path.name == ".state.json":
        return json.dumps(receipts_without_times(path), sort_keys=True)
    if path.suffix == SIGNATURE:
        return signed(path)
    return sha256(path)


def signed(signature: Path) -> str:
    """By whom what was signed; a number and the order in a signature are random."""
    bundle = json.loads(signature.read_text("utf-8"))
    said = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    parts = bundle["verificationMaterial"], said["subject"], said["predicate"]["resources"]
    return json.dumps(parts, sort_keys=True)


def sha256(file: Path) -> str:
    """Hashed once, as long as nobody writes to it."""
    stat = file.stat()
    key = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    if key not in _hashes or stat.st_size < LARGE:
        _hashes[key] = hashlib.sha256(file.read_bytes()).hexdigest()
    return _hashes[key]


def receipts_without_times(path: Path) -> Mapping[str, Any]:
    entries = json.loads(path.read_text("utf-8"))["artifacts"]
    for name, entry in entries.items():
        if entry["mtime_ns"] == 0:  # of a folder, whose times are in it
            entry["sha256"] = ""
        entry |= {"made_at": "", "seconds": 0, "mtime_ns": path.with_name(name).exists()}
    return dict(entries)


def is_published(name: str) -> bool:
    hidden = [part for part in Path(name).parts if part.startswith(".") and part != ".source"]
    return not hidden and {*ANY_CONTENT}.isdisjoint(Path(name).parts)
