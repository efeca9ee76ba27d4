"""Where things live."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from .errors import PipelineError, UsageError

PROBE_BYTES = 16 * 1024  # receipts and caches need about as much
CHOSEN_BY = "LLAMA_PIPELINE_HOME (for the cache LLAMA_PIPELINE_CACHE)"  # in hints about a disk
HERE = ""  # instead of a variable: nothing but where the command was typed decides
REPOSITORY = Path(__file__).resolve().parents[2]
DEVICES = frozenset(("con", "prn", "aux", "nul", "conin$", "conout$")) | {
    device + number for device in ("com", "lpt") for number in "0123456789¹²³"
}
FOUND = "lost+found"  # at the root of a disk; only root may list it


class Home(Struct, frozen=True):
    """The folder for everything that is made: LLAMA_PIPELINE_HOME, by default the repository."""

    root: Path

    @property
    def bins(self) -> Path:
        return self.root / "bins"

    @property
    def models(self) -> Path:
        return self.root / "models"

    def model_folders(self, kind: str) -> list[Path]:
        """What lies in `models/`KIND, `gguf` or `source`: a folder for each model. It, or the one
        that holds it, may be a link to another disk, or such a disk: what fsck finds there is no
        model's."""
        top = self.models / kind
        return sorted(x for x in top.iterdir() if x.name != FOUND) if top.is_dir() else []

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def digests(self) -> Path:
        """The file of known digests, which `stat_cache` reads and writes."""
        return self.run / "sha256.json"


def is_windows_device(name: str) -> bool:
    """Whether a file of this name would be a device on Windows, whatever follows its dot."""
    return name.partition(".")[0].rstrip().casefold() in DEVICES


def user_folder() -> Path:
    """The folder in which the user typed the command: relative paths start there.

    doit changes to the folder of dodo.py, and before it `doitw` does, which sets
    LLAMA_PIPELINE_CWD to the folder where it was started.
    """
    if os.environ.get("LLAMA_PIPELINE_CWD"):
        return Path(os.environ["LLAMA_PIPELINE_CWD"])
    import sys

    loader = sys.modules.get("doit.loader")
    return Path(getattr(loader, "initial_workdir", None) or Path.cwd())


def absolute(text: str | Path) -> Path:
    """`text` as an absolute path; `~` is the user's home, relative means the user's folder.

    Raises UsageError where there is no such user.
    """
    try:
        return user_folder() / Path(text).expanduser()
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{text}: {error}") from None


def one_path(text: str | Path) -> Path:
    """`text` as an absolute path without `..`. Links are kept: they may later lead elsewhere.

    Raises UsageError where there is no such user.
    """
    path = absolute(text)
    return Path(os.path.realpath(path.parent), path.name) if ".." in path.parts else path


def home() -> Home:
    """The home that the environment names."""
    path = os.environ.get("LLAMA_PIPELINE_HOME", "").strip()
    if not path:
        return Home(REPOSITORY)
    root, why = absolute(path), ""
    try:
        there = next(each for each in (root, *root.parents) if each.exists())
        if not there.is_dir():
            why = "is not a folder" if there == root else f"{there} is not a folder"
    except OSError as error:  # a name that is too long, or a closed folder above
        why = str(error.strerror)
    if why:
        raise UsageError(f"LLAMA_PIPELINE_HOME={path}: {why}", "name a folder, or unset it")
    return Home(root)


def elsewhere(chosen_by: str, folder: str) -> str:
    """The step of a hint by which something is written into another folder: `folder` says which,
    `chosen_by` the variable that names it, or HERE."""
    return f"set {chosen_by} to {folder}" if chosen_by else "run this in another folder"


def dangling(folder: Path) -> PipelineError | None:
    """The error where `folder`, or one above it, is a link to what is not there, such as a folder
    on a disk that is not mounted."""
    link = None
    with suppress(OSError):  # too long a name to exist
        links = (path for path in (folder, *folder.parents) if path.is_symlink())
        link = next((path for path in links if not path.exists()), None)
    if link is None:
        return None
    return PipelineError(
        f"{link}: is a link to {link.readlink()}, which is not there",
        "mount the disk that it is on, or remove the link",
    )


def require_writable(folder: Path, chosen_by: str = CHOSEN_BY) -> None:
    """Create `folder`, and check that a file can be written there, before any work is done.
    `chosen_by` says which variable sets it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * PROBE_BYTES)
    except OSError as error:
        if link := dangling(folder):
            raise link from None
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = (
            "free some space" if is_full else "let this user write there (of a container: --user)"
        )
        raise PipelineError(
            f"{folder}: cannot be written to: {error.strerror}",
            f"{mend}, or {elsewhere(chosen_by, 'another folder')}",
        ) from None


def project_version() -> str:
    """The version of this project."""
    import tomllib

    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    return str(tomllib.loads(text)["project"]["version"])


def cache(home: Home) -> Path:
    """A folder that all checkouts share, for what can be downloaded or made again.

    LLAMA_PIPELINE_CACHE, else the platform's cache folder, else (where that is not writable) a
    folder inside the home.
    """
    configured = os.environ.get("LLAMA_PIPELINE_CACHE", "").strip()
    if configured:
        return absolute(configured)
    from platformdirs import user_cache_path

    folder = user_cache_path("llama-pipeline", appauthor=False)
    # The nearest existing folder above decides: a test by writing would leave something.
    above = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    usable = os.access(above, os.W_OK | os.X_OK) and above.is_dir()
    return folder if usable else home.root / ".cache"
