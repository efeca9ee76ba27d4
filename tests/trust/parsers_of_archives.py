"""Harnesses for archives."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import warnings
import zipfile
from contextlib import nullcontext
from pathlib import Path

from hostile_input import harness, mutated, replace
from hypothesis import strategies

from pipeline.core import archives, members
from pipeline.core.errors import PipelineError

ENDINGS = (".tar", ".tar.gz", ".zip")
KINDS = {
    "file": tarfile.REGTYPE,
    "folder": tarfile.DIRTYPE,
    "link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
}
Entry = tuple[str, str, str]  # kind, name, and where a link leads
PARTS = ("a", "A", "ü", "u\u0308", "..", ".", "", "con", "b.", "c ", "d:e", "\\", "f\n", "x" * 300)
names = strategies.lists(strategies.sampled_from(PARTS), min_size=1, max_size=3).map("/".join)
entries = strategies.lists(
    strategies.tuples(strategies.sampled_from([*KINDS, "file", "file"]), names, names), max_size=5
)


def packed(ending: str, listed: list[Entry]) -> bytes:
    """An archive of these; the content of a file is its name."""
    out = io.BytesIO()
    if ending == ".zip":
        with zipfile.ZipFile(out, "w") as zipped, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a name may come twice
            for kind, name, to in listed:
                info = zipfile.ZipInfo("x")
                info.filename, info.create_system = name, 3
                modes = {"folder": 0o040755, "link": 0o120777, "fifo": 0o010644}
                info.external_attr = modes.get(kind, 0o100644) << 16
                zipped.writestr(info, b"" if kind == "folder" else (name if kind == "file" else to))
    else:
        with tarfile.open(fileobj=out, mode="w:gz" if ending == ".tar.gz" else "w") as tar:
            for kind, name, to in listed:
                tar_info = tarfile.TarInfo(name)
                tar_info.type, tar_info.linkname = KINDS[kind], to
                tar_info.size = len(name.encode()) if kind == "file" else 0
                tar.addfile(tar_info, io.BytesIO(name.encode()))
    return out.getvalue()


GOOD: list[Entry] = [
    ("file", "README.md", ""),
    ("folder", "bin", ""),
    ("file", "bin/llama-server", ""),
    ("link", "bin/ü", "llama-server"),
]


def unpacked(archive: Path, folder: Path) -> dict[str, bytes] | None:
    """What comes of an archive, by path; None where it is refused. Nothing is written elsewhere."""
    target = folder / "1" / "2" / "3" / "out"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        made = archives.unpack(archive, target)
        content = {path.relative_to(target).as_posix(): path.read_bytes() for path in made}
        assert all(path.resolve().is_relative_to(target.resolve()) for path in made)
    except PipelineError:
        content = None
        assert not os.path.lexists(target)
    if content is not None:
        shutil.rmtree(target)
    archive.unlink()
    left = [path for path in folder.rglob("*") if not target.is_relative_to(path)]
    assert left == []
    return content


@harness(
    strategies.sampled_from(ENDINGS).flatmap(
        lambda ending: strategies.tuples(
            strategies.just(ending), mutated(packed(ending, GOOD), packed(ending, GOOD[:1] * 2))
        )
    ),
    spoil=replace(archives, "_damage_is_an_error", lambda archive: nullcontext()),
)
def archive_bytes(example: tuple[str, bytes], folder: Path) -> None:
    ending, data = example
    archive = folder / f"ä b{ending}"
    archive.write_bytes(data)
    unpacked(archive, folder)


@harness(
    strategies.tuples(strategies.sampled_from(ENDINGS), entries),
    spoil=replace(members, "_check_part", lambda part: None),
    cases=[(ending, GOOD) for ending in ENDINGS],
)
def archive_members(example: tuple[str, list[Entry]], folder: Path) -> None:
    """What is unpacked has the content that was packed, under names that differ everywhere."""
    ending, listed = example
    archive = folder / f"x{ending}"
    archive.write_bytes(packed(ending, listed))
    content = unpacked(archive, folder)
    if listed == GOOD:
        assert content is not None
    if content is not None:
        written = {
            Path(name).as_posix(): name.encode() for kind, name, _ in listed if kind == "file"
        }
        links = {Path(name).as_posix() for kind, name, _ in listed if "link" in kind}
        assert content.keys() == written.keys() | links
        assert all(content[name] == written[name] for name in written)
        assert len({name.casefold() for name in content}) == len(content)
