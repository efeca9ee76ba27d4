"""Files that are mostly a hole: as long as they should be, with next to nothing on the disk."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import BinaryIO

PROBE = 4 * 1024 * 1024  # bytes; a file system without holes shows itself on these


def extend(path: Path, size: int) -> bool:
    """Lengthen the file `path` to `size` bytes by a hole. False where that cannot be done: then
    the file is of no use, and nothing much was written.
    """
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
    told = ctypes.c_uint32()
    return bool(
        kernel.DeviceIoControl(handle, set_sparse, None, 0, None, 0, ctypes.byref(told), None)
    )
