"""All or nothing: a file is made beside its target, flushed, then renamed."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.paths import CHOSEN_BY, dangling, elsewhere, require_writable
from pipeline.core.text import size

from .locks import own_name

# File systems need some space of their own, and estimates are not exact.
SPARE_BYTES = 64 * 1024 * 1024
FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, or of what a user may have of it
LEAST_BYTES = 64 * 1024  # with less free a disk counts as full
OTHER_DISK = "a folder on another disk"
OWN_NAMES = (".part", ".old", ".lock")  # how files end that are made beside those of the user
TRIES = 20  # to put a folder in its place where no lock keeps others away

_reachable: set[tuple[Path, int]] = set()  # folders by inode whose own names are on the disk


def part(target: Path) -> Path:
    """The name under which `target` is made, by one run at a time: the holder of its lock, or
    where locks do not work the only run that has this name."""
    return target.with_name(f".{target.name}{own_name(target.parent)}.part")


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require_space(folder: Path, need: int, chosen_by: str = CHOSEN_BY) -> None:
    """Raise PipelineError unless `need` bytes and some spare fit on the disk of `folder`.
    `chosen_by` says which variable sets `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if need and free < need + SPARE_BYTES:
        raise PipelineError(
            f"{folder}: {size(need + SPARE_BYTES)} are needed there and {size(free)} are free",
            f"free some space, or {elsewhere(chosen_by, OTHER_DISK)}",
        )


@contextmanager
def disk_errors(folder: Path, chosen_by: str = CHOSEN_BY) -> Iterator[None]:
    """Turn the errors of a full, failing or read-only disk into a PipelineError. `chosen_by` says
    which variable sets `folder`."""
    try:
        yield
    except OSError as error:
        is_inside = _place(error, folder).is_relative_to(folder)
        known = disk_error(error, folder, chosen_by)
        if known and (is_inside or error.errno in FULL):
            raise known from None
        raise


def disk_error(error: OSError, folder: Path, chosen_by: str = CHOSEN_BY) -> PipelineError | None:
    """The error for a full, failing or read-only disk, with the next step; None for any other.
    `folder` is on that disk, unless the error names another path."""
    where = _place(error, folder)
    if error.errno in FULL:
        full = _full_folder(where, folder)
        limit = "disk full" if error.errno == errno.ENOSPC else "disk quota exceeded"
        variable = {_temporary(): "TMPDIR", folder: chosen_by}.get(full)
        other = "" if variable is None else f", or {elsewhere(variable, OTHER_DISK)}"
        return PipelineError(
            f"{full}: {limit}; the unfinished file was discarded", f"free some space{other}"
        )
    if error.errno == errno.EIO:
        return PipelineError(
            f"{where}: {error.strerror}; the unfinished file was discarded",
            "the disk may be failing: look into the system's log, then run the same command again, "
            f"or {elsewhere(chosen_by, OTHER_DISK)}",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        step = elsewhere(chosen_by, "a folder that you may write to")
        return PipelineError(f"{_known(where)}: {error.strerror}", step)
    return None


def disk_error_in(output: str, folder: Path) -> PipelineError | None:
    """As `disk_error`, from the output of a program that could not write into `folder`."""
    printed = output.casefold()  # npm writes the system's words without capitals
    for number in (*FULL, errno.EIO, errno.EROFS):
        if os.strerror(number).casefold() in printed:
            return disk_error(OSError(number, os.strerror(number)), folder)
    return None


def disk_problem(folder: Path, output: str = "") -> PipelineError | None:
    """The error where the disk of `folder` is why a program failed that wrote there: by its
    `output`, or since nothing can be written. Many programs do not say that it is full."""
    try:
        require_writable(folder)
    except PipelineError as error:
        return disk_error_in(output, folder) or error
    return disk_error_in(output, folder)


def require_disk(folder: Path, output: str = "") -> None:
    """Raise the PipelineError of `disk_problem`, if there is one."""
    if error := disk_problem(folder, output):
        raise error


def _place(error: OSError, folder: Path) -> Path:
    """The path that an error names, of two the one that is written, if it is whole: what removes a
    folder names the file alone."""
    named = error.filename2 or error.filename
    path = Path(named) if isinstance(named, str) else folder
    return path if path.is_absolute() else folder


def _known(path: Path) -> Path:
    """The path that a user knows: the folder, where a file of our own could not be made there. One
    that is there is in the way, and named."""
    is_ours = path.name.startswith(".") and path.name.endswith(OWN_NAMES)
    return path.parent if is_ours and not os.path.lexists(path) else path


def _full_folder(where: Path, folder: Path) -> Path:
    """The folder whose disk is full: that of the path `where`, which may be anything in `folder`,
    or the one for temporary files, where that disk alone has no room: a write names no path."""
    if not where.is_relative_to(folder):
        return where.parent
    has_room = _free(folder) >= LEAST_BYTES
    return _temporary() if has_room and _free(_temporary()) < LEAST_BYTES else folder


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def _free(folder: Path) -> int:
    """The bytes that are free on its disk; 0 where it is not there."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def described(error: OSError, folder: Path) -> str:
    """The message for an error of the system that no step expects. `folder` is where most of what
    is written lies."""
    if error.errno in FULL and not error.filename and _is_output_full():
        return (
            f"the output cannot be written: {error.strerror}\n"
            "  hint: free some space where it goes, or send it elsewhere"
        )
    is_of_disk = error.errno in (*FULL, errno.EIO, errno.EROFS)
    known = disk_error(error, folder) if is_of_disk else None
    path = Path(os.fsdecode(error.filename or ""))
    if isinstance(error, FileExistsError):  # where a folder was to be made
        known = dangling(path)
    if isinstance(error, FileNotFoundError) and path.is_relative_to(folder):
        return f"{path} is gone: another run may have removed it\n  hint: run this again"
    return str(known or f"{error.filename or 'the system'}: {error.strerror or error}")


def _is_output_full() -> bool:
    """Whether what was printed cannot be written, as on the disk of `plan … > FILE`."""
    try:
        print(flush=True)  # what could not be written may be dropped by now
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again
        return True
    return False


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and orders its renames itself
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_names(folder: Path) -> None:
    """Force the names in a folder to the disk, and those that lead to it: it may be new."""
    flush(folder)
    for inner in (folder, *folder.parents[:-1]):
        key = inner, inner.stat().st_ino
        if key in _reachable:
            break
        _reachable.add(key)
        with suppress(OSError):  # of a folder above that this user may not read
            flush(inner.parent)


def flush_folder(folder: Path) -> None:
    """Force a folder and all that is below it to the disk."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "syncfs"):
        for path in (*folder.rglob("*"), folder):
            if not path.is_symlink():
                flush(path)
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Tens of thousands of files in a second or two instead of minutes.
        if library.syncfs(handle):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(handle)


def publish_file(made: Path, target: Path) -> None:
    """Rename the finished `made` to `target`, in the same folder, safe against a power cut."""
    flush(made)
    made.replace(target)
    flush_names(target.parent)


def publish_text(target: Path, text: str) -> None:
    """Write a small text, all of it or nothing."""
    made = part(target)
    try:
        made.write_text(text, encoding="utf-8", newline="\n")
        publish_file(made, target)
    finally:
        made.unlink(missing_ok=True)


def publish_beside(target: Path, data: bytes) -> None:
    """Write a small file, all of it or nothing, into a folder that need not be ours: no lock is
    left there, and each process has a name of its own for what it writes. What one left that was
    killed is removed."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        number = left.name.removesuffix(".part").rpartition(".")[2]
        if number.isdecimal() and not _runs(int(number)):
            left.unlink(missing_ok=True)
    made = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        made.write_bytes(data)
        publish_file(made, target)
    finally:
        made.unlink(missing_ok=True)


def _runs(number: int) -> bool:
    """Whether a process has this number."""
    import psutil

    return psutil.pid_exists(number)


def publish_same(file: Path, target: Path) -> None:
    """Publish `file` under another name too: a link where the disk allows it, else a copy."""
    made = part(target)
    remove(made)
    try:
        try:
            os.link(file, made)
        except OSError:
            require_space(target.parent, file.stat().st_size)
            shutil.copyfile(file, made)
        publish_file(made, target)
    finally:
        remove(made)


def publish_folder(made: Path, target: Path) -> None:
    """Replace `target` by the finished folder `made`, in the same parent folder."""
    flush_folder(made)
    for tries_left in reversed(range(TRIES)):
        try:
            _put_in_place(made, target)
            break
        except OSError:  # another run was there in this instant, where locks do not work
            if not (tries_left and own_name(target.parent) and made.exists()):
                raise


def _put_in_place(made: Path, target: Path) -> None:
    old = None
    if not target.exists():
        made.rename(target)
    elif _exchange(made, target):
        old = made
    else:
        # No atomic exchange here: for an instant there is no `target`. `recover_folder` repairs
        # what a kill between the two renames leaves.
        old = _aside(target)
        remove(old)
        target.rename(old)
        made.rename(target)
    # Before anything is removed: after a power cut the files could be gone and the renames too,
    # and what is left of the old folder would pass for all of it.
    flush_names(target.parent)
    if old:
        remove(old)


def recover_folder(target: Path) -> None:
    """Finish or undo an interrupted `publish_folder`. Call it under the target's lock."""
    if is_cut(target):
        flush_names(target.parent)  # of a run that was killed before it did so
    remove(part(target))  # unfinished, or the old folder after the exchange
    aside = _aside(target)
    if not target.exists():  # where locks do not work, a killed run's has a name of its own
        others = target.parent.glob(f".{glob.escape(target.name)}.*.old")
        aside = next((path for path in (aside, *others) if path.exists()), aside)
    if aside.exists():
        if target.exists():
            remove(aside)
        else:
            aside.rename(target)


def _aside(target: Path) -> Path:
    """The name of the folder that is about to be replaced."""
    return target.with_name(f".{target.name}{own_name(target.parent)}.old")


def is_cut(target: Path) -> bool:
    """Whether `publish_folder` was interrupted, or another run is in the middle of it."""
    return part(target).exists() or _aside(target).exists()


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step where the system can: Linux and macOS, most file systems."""
    if os.name != "posix":
        return False
    import ctypes

    library = ctypes.CDLL(None)
    paths = os.fsencode(first), os.fsencode(second)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
        return bool(library.renameat2(at_cwd, paths[0], at_cwd, paths[1], exchange) == 0)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        swap = 2  # RENAME_SWAP of sys/stdio.h
        return bool(library.renamex_np(*paths, swap) == 0)
    return False
