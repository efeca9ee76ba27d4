"""Skeletons: GGUF files with the real header and a hole for the tensors.

From them llama.cpp's own tools compute how much memory a model takes and how big its quants become,
before any weights are downloaded or converted. Only the first bytes of the files are read.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pipeline.core.errors import PipelineError
from pipeline.core.process import outcome
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import disk_errors, part, publish_file, remove, require_disk

from . import contents, convert, converter, foreign_code, gguf, safetensors, staging, tools
from .checkpoint import is_plain
from .gguf_format import padded
from .resolve import slug
from .run_converter import HEADER, TOO_MUCH

FIRST_READ = 1024 * 1024  # bytes; most headers without a vocabulary of 100,000 words fit
PROBE = 4 * 1024 * 1024  # bytes; a file system without holes shows itself on these


def gguf_skeleton(files: Sequence[contents.Readable], folder: Path) -> Path | None:
    """The skeleton of a GGUF, whole or split, in `folder`: its (first) file.

    Files that exist are used: name the folder after the files' identity. None where the file
    system has no sparse files. Raises PipelineError.
    """
    targets = []
    for file in files:
        name = PurePosixPath(file.name).name  # parts find each other by name, in one folder
        if not is_plain(name):
            raise PipelineError(f"{file.name!r}: is not a file name")
        target = folder / name
        targets.append(target)
        with disk_errors(folder), only_one(target):
            if target.exists() and target.stat().st_size == file.size:
                continue
            kept = contents.buffered(file, FIRST_READ)
            if not _publish(target, kept.get(0, gguf.parse(kept).data), file.size):
                return None
    return targets[0] if targets else None


def safetensors_skeleton(
    conversion: convert.Conversion, files: Sequence[contents.Readable], target: Path, python: Path
) -> Path | None:
    """The skeleton of what `conversion` will make from `files`, by the converter itself, run with
    `python`. A file that exists is used.

    Weights are not read, all other files are. None where the file system has no sparse files, or
    the converter would have to process the weights. Raises PipelineError, also for what the
    conversion would refuse: a model or a tokenizer that it does not know.
    """
    with disk_errors(target.parent), only_one(target):
        if target.exists():
            return target
        made, name = part(target), conversion.resolved.name
        try:
            weights = staging.weight_bytes({file.name: file.size for file in files})
            # The weights first: an error in them explains all others.
            ordered = sorted(files, key=lambda file: not file.name.endswith(".safetensors"))
            with staging.workspace(made, slug(name)) as (folder, scratch):
                names = {file.name for file in files}
                for file in ordered:
                    if not _lay_out(file, folder, staging.place(file.name, names), weights):
                        return None
                program, driver, *words = convert.argv(conversion, python, folder, made)
                status, out, err = outcome(
                    [program, driver, HEADER, *words],
                    timeout=tools.seconds("header", weights),
                    env=converter.environment(python, scratch),
                    sandbox=converter.sandbox(python, conversion.script, folder, (), made, scratch),
                )
            if status in (-1, TOO_MUCH):  # it did not end, or it would compute the weights
                return None
            if status:
                require_disk(target.parent, out + err)
                output = "\n".join(f"  | {line}" for line in (out + err).splitlines()[-8:])
                message = f"{name}: the converter refuses its headers (status {status}):\n{output}"
                code = foreign_code.classes(files)
                raise PipelineError(*foreign_code.explained(name, code, message))
            header = gguf.parse(contents.local(made, name), is_whole=False)
            # The converter pads the last tensor too.
            if not extend_by_hole(made, padded(header.size)):
                return None
            publish_file(made, target)
            return target
        finally:
            remove(made)


def _lay_out(file: contents.Readable, folder: Path, name: str, weights: int) -> bool:
    """Put a file of the model into `folder` as `name`: of weights only the header, others as they
    are."""
    names = PurePosixPath(name).parts
    if not names or not all(is_plain(name) for name in names):
        raise PipelineError(f"{file.name!r}: is not a file name")
    target = folder.joinpath(*names)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        target.write_bytes(file.get(0, safetensors.head(file).length))
        return extend_by_hole(target, file.size)
    target.write_bytes(staging.beside(file.name, file.whole(), weights))
    return True


def _publish(target: Path, start: bytes, size: int) -> bool:
    made = part(target)
    try:
        made.write_bytes(start)
        if not extend_by_hole(made, size):
            return False
        publish_file(made, target)
        return True
    finally:
        remove(made)


def extend_by_hole(path: Path, size: int) -> bool:
    """Make the file `path` `size` bytes long without writing more. False where the file system has
    no sparse files; then the file is of no use, and little was written."""
    try:
        with path.open("r+b") as file:
            start = file.seek(0, 2)
            if sys.platform == "win32" and not _mark(file):
                return False
            # A file system without holes would fill the disk: try a little of it first.
            for length in (min(size, start + PROBE), size):
                file.truncate(length)
                if not _has_hole(path, start):
                    return False
        return True
    except (OSError, OverflowError):  # no room, or longer than its file system allows
        return False


def _has_hole(path: Path, start: int) -> bool:
    stat = path.stat()
    blocks = getattr(stat, "st_blocks", None)  # of 512 bytes; Windows tells none
    longer = stat.st_size - start
    return blocks is None or longer < PROBE or blocks * 512 < start + longer // 2


def _mark(file: BinaryIO) -> bool:
    """Windows: declare the file sparse; without that the hole is written as zeros."""
    import msvcrt

    set_sparse = 0x900C4  # FSCTL_SET_SPARSE of winioctl.h
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined,unused-ignore]
    handle = ctypes.c_void_p(msvcrt.get_osfhandle(file.fileno()))  # type: ignore[attr-defined,unused-ignore]
    returned = ctypes.c_uint32()
    return bool(
        kernel.DeviceIoControl(handle, set_sparse, None, 0, None, 0, ctypes.byref(returned), None)
    )
