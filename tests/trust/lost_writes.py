"""What a disk may hold after a power cut: a recorded run, replayed without some of what it wrote.

The disk is that of the ALICE paper ("All File Systems Are Not Created Equal", OSDI 2014), a little
worse than ext4, XFS and Btrfs are:

- The blocks of a file reach the disk in any order, until its fsync returns. Its sizes keep their
  order, and may be there without the blocks, which then read as zeros.
- The names in a folder keep their order, and are safe once that folder was flushed: flushing a file
  saves neither its name nor its folder's. Folders do not wait for each other, but a rename is there
  in both folders or in neither.
- syncfs saves everything.
- A file's time is always the last one: the worst case for whoever trusts size and time.

Modes and owners are not lost. What is written through a mapping is not recorded: `Recording` sees
that a file holds other bytes than were written to it, and fails.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

from conftest import REPOSITORY
from tracer import tracer

BLOCK = 4096
BLOCKS = 8  # that a write is cut into at most
TOP = 0  # the number of the folder that all is in
OPENS = ("open", "openat", "openat2", "creat")
RENAMES = ("rename", "renameat", "renameat2")
EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h


@dataclass
class Node:
    """A file, folder or link; `data` is what was in it before the run, or where the link leads."""

    kind: str
    data: bytes = b""
    mode: int = 0o644
    mtime_ns: int = 0


@dataclass(frozen=True)
class Names:
    """Names that change together: folder, name, and the node that has it now."""

    edits: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Size:
    node: int
    size: int


@dataclass(frozen=True)
class Data:
    node: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Flush:
    """Everything of one node is safe; None: everything."""

    node: int | None


Step = Names | Size | Data | Flush
Folders = dict[int, dict[str, int]]


@dataclass
class Recording:
    """What a run did below `top`, and what was there before."""

    top: Path
    nodes: list[Node] = field(default_factory=list)
    before: Folders = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    _now: Folders = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, top: Path, code: str, *words: str, env: Mapping[str, str] | None = None
    ) -> Recording:
        """Run Python `code` under the tracer, and record what it changes below `top`. Outside of
        it, in a neighbour of `top`, the record is kept meanwhile."""
        recording, scratch = cls(top), top.with_name(f"{top.name}.record")
        recording._look(top)
        scratch.mkdir()
        try:
            log = scratch / "log"
            options = ["-r", str(top), "-l", str(log), "-d", str(scratch)]
            subprocess.run(
                [tracer(), *options, "--", sys.executable, "-c", code, *words],
                check=True,
                timeout=300,
                env={**os.environ, **(env or {}), "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests"},
            )
            for line in log.read_text("utf-8", "surrogateescape").splitlines():
                recording._add(json.loads(line), scratch)
        finally:
            shutil.rmtree(scratch)
        recording._compare()
        return recording

    def _look(self, path: Path) -> int:
        """Note what is there, with all that is in it; returns its number."""
        info, number = path.lstat(), len(self.nodes)
        mode = stat.S_IMODE(info.st_mode)
        if path.is_symlink():
            self.nodes.append(Node("link", os.fsencode(path.readlink())))
        elif path.is_dir():
            self.nodes.append(Node("folder", mode=mode))
            self.before[number] = {each.name: self._look(each) for each in sorted(path.iterdir())}
            self._now[number] = dict(self.before[number])
        else:
            self.nodes.append(Node("file", path.read_bytes(), mode, info.st_mtime_ns))
            self._sizes[number] = info.st_size
        return number

    def _add(self, call: dict[str, Any], scratch: Path) -> None:
        name = call.get("call", "")
        if not name or call["result"] < 0 or call["path"].endswith(" (deleted)"):
            return
        flags = call.get("flags", 0)
        if name in OPENS:
            if flags & os.O_TMPFILE != os.O_TMPFILE:
                self._open(call["path"], flags | os.O_CREAT * (name == "creat"))
        elif "offset" in call and call["result"]:
            data = (scratch / str(call["n"])).read_bytes()
            self._write(self._node(call["path"]), call["offset"], data)
        elif name in ("truncate", "ftruncate"):
            self._resize(self._node(call["path"]), call["length"])
        elif name == "syncfs":
            self.steps.append(Flush(None))
        elif name in ("fsync", "fdatasync"):
            self.steps.append(Flush(self._node(call["path"])))
        elif name in ("mkdir", "mkdirat"):
            self._put(call["path"], self._new(Node("folder", mode=0o755)))
        elif name in ("symlink", "symlinkat"):
            self._put(call["path"], self._new(Node("link", os.fsencode(call["to"]))))
        elif name in ("link", "linkat"):
            self._put(call["to"], self._node(call["path"]))
        elif name in ("unlink", "unlinkat", "rmdir"):
            self._put(call["path"], None)
        elif name in RENAMES:
            self._rename(call["path"], call["to"], flags & EXCHANGE if name == "renameat2" else 0)

    def _open(self, path: str, flags: int) -> None:
        folder, name = self._place(path)
        number = self._now[folder].get(name)
        if number is None and flags & os.O_CREAT:
            self._put(path, self._new(Node("file")))
        elif number is not None and flags & os.O_TRUNC and self._sizes.get(number):
            self._resize(number, 0)

    def _write(self, node: int, offset: int, data: bytes) -> None:
        if offset + len(data) > self._sizes[node]:
            self._resize(node, offset + len(data))
        step = max(BLOCK, -(-len(data) // BLOCKS // BLOCK) * BLOCK)
        at = 0
        while at < len(data):  # cut where blocks begin
            end = min(len(data), at + step - (offset + at) % BLOCK)
            self.steps.append(Data(node, offset + at, data[at:end]))
            at = end

    def _resize(self, node: int, size: int) -> None:
        self._sizes[node] = size
        self.steps.append(Size(node, size))

    def _rename(self, path: str, to: str, exchange: int) -> None:
        first, second = self._place(path), self._place(to)
        moved, other = self._node(path), self._now[second[0]].get(second[1])
        if moved != other:  # else it is the same file, and nothing happens
            self._edit((*second, moved), (*first, other if exchange else None))

    def _new(self, node: Node) -> int:
        number = len(self.nodes)
        self.nodes.append(node)
        if node.kind == "folder":
            self.before[number], self._now[number] = {}, {}
        elif node.kind == "file":
            self._sizes[number] = 0
        return number

    def _put(self, path: str, node: int | None) -> None:
        self._edit((*self._place(path), node))

    def _edit(self, *edits: tuple[int, str, int | None]) -> None:
        self.steps.append(Names(edits))
        _apply(edits, self._now)

    def _place(self, path: str) -> tuple[int, str]:
        above, name = os.path.split(os.path.normpath(path))
        return self._node(above), name

    def _node(self, path: str) -> int:
        number = TOP
        for name in Path(os.path.normpath(path)).relative_to(self.top).parts:
            number = self._now[number][name]
        return number

    def _compare(self) -> None:
        """Check that what was recorded is all that happened, and take over times and modes."""
        everything = range(len(self.steps))
        for path, number, data in self.tree(set(everything)):
            node, file = self.nodes[number], self.top / path
            if node.kind == "file":
                assert file.read_bytes() == data, f"{path} was written in a way not recorded"
                info = file.stat()
                node.mode, node.mtime_ns = stat.S_IMODE(info.st_mode), info.st_mtime_ns
        paths = {path for path, _, _ in self.tree(set(everything))}
        found = {path.relative_to(self.top).as_posix() for path in self.top.rglob("*")}
        assert paths == found, paths ^ found

    def tree(self, kept: set[int]) -> list[tuple[str, int, bytes]]:
        """Path, node and bytes of all that is there if of the steps only `kept` reached the disk;
        what is above something else comes first."""
        folders = {number: dict(names) for number, names in self.before.items()}
        content: dict[int, bytearray] = {}
        for index in sorted(kept):
            match self.steps[index]:
                case Names(edits):
                    _apply(edits, folders)
                case Size(node, size):
                    data = content.setdefault(node, bytearray(self.nodes[node].data))
                    data[size:] = bytes(max(0, size - len(data)))
                case Data(node, offset, piece):
                    data = content.setdefault(node, bytearray(self.nodes[node].data))
                    part = piece[: max(0, len(data) - offset)]
                    data[offset : offset + len(part)] = part
        result: list[tuple[str, int, bytes]] = []

        def walk(folder: int, path: str) -> None:
            for name, number in sorted(folders[folder].items()):
                here, node = f"{path}{name}", self.nodes[number]
                result.append((here, number, bytes(content.get(number, node.data))))
                if node.kind == "folder":
                    walk(number, f"{here}/")

        walk(TOP, "")
        return result

    def build(self, tree: Sequence[tuple[str, int, bytes]]) -> None:
        """Put a tree on the disk, in the place of what is below `top`."""
        for path in self.top.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        made: dict[int, Path] = {}
        for name, number, data in tree:
            node, path = self.nodes[number], self.top / name
            if node.kind == "folder":
                path.mkdir()
            elif node.kind == "link":
                path.symlink_to(os.fsdecode(node.data))
            elif number in made:
                os.link(made[number], path)
            else:
                path.write_bytes(data)
                path.chmod(node.mode)
                os.utime(path, ns=(node.mtime_ns, node.mtime_ns))
                made[number] = path


def _apply(edits: Sequence[tuple[int, str, int | None]], folders: Folders) -> None:
    for folder, name, node in edits:
        if node is None:
            folders[folder].pop(name, None)
        else:
            folders[folder][name] = node


def states(
    recording: Recording, chance: random.Random, *, bound: int, samples: int
) -> Iterator[tuple[bool, list[tuple[str, int, bytes]]]]:
    """Every different tree that a power cut can leave, and whether the run had ended before it. At
    each point all choices are tried where there are at most `bound`, else the extreme ones and
    `samples` by chance."""
    seen = set()
    for point in range(len(recording.steps) + 1):
        has_ended = point == len(recording.steps)
        pending = Pending(recording.steps[:point])
        for kept in pending.choices(chance, bound, samples):
            tree = recording.tree(kept)
            key = has_ended, hash(tuple(tree))
            if key not in seen:
                seen.add(key)
                yield has_ended, tree


class Pending:
    """The steps up to a power cut: those that are safe, and what may be lost of the others."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._names: dict[int, list[int]] = {}  # by folder, steps whose order is kept
        self._sizes: dict[int, list[int]] = {}
        self._data: dict[int, list[int]] = {}
        self._folders: dict[int, list[int]] = {}  # of a step
        self.safe: set[int] = set()
        for index, step in enumerate(steps):
            match step:
                case Names(edits):
                    self._folders[index] = list(dict.fromkeys(folder for folder, _, _ in edits))
                    for folder in self._folders[index]:
                        self._names.setdefault(folder, []).append(index)
                case Size(node, _):
                    self._sizes.setdefault(node, []).append(index)
                case Data(node, _, _):
                    self._data.setdefault(node, []).append(index)
                case Flush(None):
                    self.safe.update(range(index))
                case Flush(node):
                    assert node is not None
                    self.safe.update(self._sizes.get(node, ()), self._data.get(node, ()))
                    for each in self._names.get(node, ()):
                        self._save(each)
        chains = [*self._names.values(), *self._sizes.values()]
        chains = [[index for index in chain if index not in self.safe] for chain in chains]
        self._chains = [chain for chain in chains if chain]
        blocks = [index for chain in self._data.values() for index in chain]
        self._blocks = [index for index in blocks if index not in self.safe]

    def _save(self, index: int) -> None:
        """A step is safe, and in each of its folders all before it."""
        if index in self.safe:
            return
        self.safe.add(index)
        for folder in self._folders[index]:
            for earlier in self._names[folder]:
                if earlier < index:
                    self._save(earlier)

    def choices(self, chance: random.Random, bound: int, samples: int) -> Iterator[set[int]]:
        """Sets of steps that may have reached the disk."""
        lengths, blocks = [len(chain) for chain in self._chains], self._blocks
        if prod(length + 1 for length in lengths) * 2 ** len(blocks) <= bound:
            for some in product(*(range(length + 1) for length in lengths)):
                for flags in product((False, True), repeat=len(blocks)):
                    yield self._kept(
                        some, [b for b, flag in zip(blocks, flags, strict=True) if flag]
                    )
            return
        nothing = [0] * len(lengths)
        yield self._kept(lengths, blocks)
        yield self._kept(lengths, [])
        yield self._kept(nothing, blocks)
        yield self._kept(nothing, [])
        for block in chance.sample(blocks, min(samples, len(blocks))):
            yield self._kept(lengths, [each for each in blocks if each != block])
        for number in chance.sample(range(len(lengths)), min(samples, len(lengths))):
            yield self._kept([*lengths[:number], 0, *lengths[number + 1 :]], blocks)
        for _ in range(samples):
            some = [chance.randint(0, length) for length in lengths]
            yield self._kept(some, [block for block in blocks if chance.random() < 0.5])

    def _kept(self, lengths: Sequence[int], blocks: Sequence[int]) -> set[int]:
        """The first so many of each chain, and blocks; a rename is in both folders or none."""
        kept = {*self.safe, *blocks}
        for chain, length in zip(self._chains, lengths, strict=True):
            kept.update(chain[:length])
        lost = {
            index for chain, n in zip(self._chains, lengths, strict=True) for index in chain[n:]
        }
        while lost:
            kept -= lost
            lost = {
                index
                for chain in self._chains
                for before, index in pairwise(chain)
                if before not in kept and index in kept
            }
        return kept
