"""Makes the project's `.venv` and keeps it at what requirements/*.txt say.

`doitw` runs this file with any Python it finds, before anything is installed, so it uses the
standard library only, and Python 3.6 can still read it to learn that it is too old.

What lies in `.venv` besides a normal virtual environment:

    root        the repository the environment was made in: scripts in it hold that path
    NAME.txt    a copy of requirements/NAME.txt, written after that was installed

An environment without any NAME.txt was never finished, and is made again.
"""

import contextlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

MINIMUM = (3, 11)
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
SHOWN_LINES = 12

# Prints where packages go. Fails where the environment belongs to another Python version than
# the one it now finds: a distribution's upgrade leaves .venv/bin/python -> /usr/bin/python3 whole.
PROBE = """
import importlib.util, os, sys, sysconfig
folder = sysconfig.get_path("purelib")
fits = sys.version_info[:2] >= {minimum} and sys.prefix != sys.base_prefix and os.path.isdir(folder)
if not fits or ({needs_pip} and importlib.util.find_spec("pip") is None):
    sys.exit(1)
sys.stdout.buffer.write(os.fsencode(folder))
"""

NO_NETWORK = (
    "The package could not be found or fetched. Is there a network, and does it need a proxy "
    "(HTTPS_PROXY) or a mirror (pip's or uv's own settings)? Then call doitw again."
)
# What pip and uv heed. pip takes a SOCKS proxy once PySocks is in .venv, uv as it is.
NETWORK = (
    *("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT"),
)
DISK_FULL = "The disk is full. Free some space, then call doitw again."
# What a tool's output says, and what to do about it. The first that fits is taken.
HINTS = (
    (
        ("DO NOT MATCH THE HASHES", "Hash mismatch", "require-hashes"),
        "A package is not the file that requirements/ names. A mirror or proxy may have changed "
        "it, or requirements/ was edited by hand: see `git diff requirements`.",
    ),
    (("No space left on device", "os error 28", "os error 112"), DISK_FULL),
    (
        (
            *("Read-only file system", "Permission denied", "Access is denied"),
            *("os error 13", "os error 30"),
        ),
        "A folder cannot be written to. doitw needs to write to the repository and to the "
        "cache of pip or uv.",
    ),
    (
        (
            *("Could not find a version that satisfies", "Failed to fetch", "No solution found"),
            *("ConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "SSLError"),
            *("error sending request", "TLS CA certificate bundle"),
            "Missing dependencies for SOCKS support",
        ),
        NO_NETWORK,
    ),
)

NO_VENV = f"""Install it, then call doitw again:
  Debian, Ubuntu: sudo apt install python{VERSION}-venv
  Fedora:         sudo dnf install python3
  macOS:          brew install python   (or the installer from python.org)
  Windows:        winget install Python.Python.3.12"""


class BootstrapError(Exception):
    """A set-up that failed: what happened, and what to do next."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}\n{hint}")
        self.message, self.hint = message, hint


def main() -> int:
    """Makes `.venv` fit requirements/run.txt; the exit status."""
    if sys.version_info < MINIMUM:
        say(f"doitw: this is Python {VERSION}, and 3.11 or later is needed.")
        return 1
    try:
        ensure("run")
    except BootstrapError as error:
        say(f"doitw: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def install(name: str) -> None:
    """Brings `.venv` to requirements/NAME.txt; nothing happens where it is there already.

    Raises BootstrapError.
    """
    # An environment cannot be replaced under the program that runs in it, and since that runs,
    # it can be built on.
    ensure(name, trust=VENV.is_dir() and Path(sys.prefix).samefile(VENV))


def ensure(name: str, *, trust: bool = False) -> None:
    """As install(); with `trust`, an environment that is there is never made again."""
    try:
        if is_current(name, trust=trust):
            return
        with locked(ROOT / ".venv.lock") as lock:
            # Another process may have done it while this one waited.
            if not is_current(name, trust=trust):
                update(name, lock, trust=trust)
    except OSError as error:
        text = f"{error.strerror or error}: {error.filename or ROOT}"
        raise BootstrapError(text, hint_for(str(error))) from error


def is_current(name: str, *, trust: bool) -> bool:
    """Whether requirements/NAME.txt, as it is now, was installed into an environment that works."""
    receipt = VENV / f"{name}.txt"
    if not receipt.is_file() or receipt.read_bytes() != requirements(name):
        return False
    return trust or trouble() is None


def update(name: str, lock: int, *, trust: bool) -> None:
    # "test" holds all of "run" at the same versions. Read before installing: should git change
    # the files meanwhile, the next call sees a difference.
    contents = {file: requirements(file) for file in (name, "run")}
    why = None if trust else trouble()
    if why:
        if VENV.exists():
            say(f"doitw: .venv is made again: {why}")
        make(lock)
    install_packages(name, lock)
    flush_all(VENV)
    for file, content in contents.items():
        write(VENV / f"{file}.txt", content)


def trouble() -> "str | None":
    """Why `.venv` cannot be built on, or None where it can."""
    root = VENV / "root"
    if not root.is_file() or not any(VENV.glob("*.txt")):
        return "its set-up was not finished"
    made_in = os.fsdecode(root.read_bytes()).rstrip("\n")
    if not Path(made_in).is_dir() or not ROOT.samefile(made_in):
        return f"it was made in {made_in}"
    if site_packages() is None:
        return "its Python is gone or has changed"
    return None


def site_packages() -> "Path | None":
    """The environment's folder of packages, or None where its Python cannot be used."""
    code = PROBE.format(minimum=MINIMUM, needs_pip=shutil.which("uv") is None)
    try:
        done = subprocess.run(
            [PYTHON, "-I", "-c", code], capture_output=True, check=False, stdin=subprocess.DEVNULL
        )
    except OSError:
        return None
    return None if done.returncode else Path(os.fsdecode(done.stdout))


def make(lock: int) -> None:
    """An empty `.venv`, in the place of whatever is there."""
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()  # what it leads to may be in use elsewhere
    elif VENV.exists():
        # First, so that a kill here leaves nothing that looks finished.
        for receipt in VENV.glob("*.txt"):
            receipt.unlink()
        flush(VENV)
        shutil.rmtree(VENV)
    uv = shutil.which("uv")
    if uv:
        call([uv, "venv", "--python", base_python(), str(VENV)], lock)
    else:
        for module in ("venv", "ensurepip"):
            if importlib.util.find_spec(module) is None:
                raise BootstrapError(f"{sys.executable} comes without {module}.", NO_VENV)
        call([base_python(), "-I", "-m", "venv", str(VENV)], lock)
    folder = site_packages()
    if folder is None:
        raise BootstrapError(f"{PYTHON} was made, but does not start.", hint_for(""))
    # For .venv/bin/doit, which unlike `python -m doit` does not look into the working directory.
    # Python 3.11 and 3.12 read plain lines in the locale's encoding, so other letters go as code.
    line = str(ROOT) if str(ROOT).isascii() else f"import sys; sys.path.append({str(ROOT)!a})"
    write(folder / "llama-pipeline.pth", line.encode() + b"\n")
    write(VENV / "root", os.fsencode(ROOT) + b"\n")


def base_python() -> str:
    """The Python to make the environment from, by a name that goes away when it is replaced.

    /usr/bin/python3 lives on through a distribution's upgrade to another version, and the
    environment would find itself empty; /usr/bin/python3.11 does not, which doitw sees.
    """
    exact = Path(sys.base_prefix, "bin", f"python{VERSION}")
    return str(exact) if exact.exists() else sys.executable


def install_packages(name: str, lock: int) -> None:
    path = str(ROOT / "requirements" / f"{name}.txt")
    uv = shutil.which("uv")
    if uv:
        command = [uv, "pip", "install", "--python", str(PYTHON)]
    else:
        # -I: a package in PYTHONPATH would pass for one in the environment.
        command = [str(PYTHON), "-I", "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    folder = site_packages()
    before = listing(folder)
    # While packages change, no receipt is true: set aside, and gone for good if this is killed.
    kept = [(receipt, receipt.read_bytes()) for receipt in VENV.glob("*.txt")]
    for receipt, _ in kept:
        receipt.unlink()
    flush(VENV)
    try:
        call([*command, "--require-hashes", "-r", path], lock)
    except BootstrapError:
        # Most failures (no network, a wrong hash) come before the first change, and then an
        # older checkout still works as it did. Folder names hold the versions.
        if listing(folder) == before:
            for receipt, content in kept:
                write(receipt, content)
        raise


def listing(folder: "Path | None") -> "list[str]":
    return sorted(path.name for path in folder.iterdir()) if folder else []


def call(command: "list[str]", lock: int) -> None:
    """Runs a tool, shown as `+ command`. Raises BootstrapError with the end of what it said."""
    say("+ " + shlex.join(command))
    # A set-up whose parent was killed goes on by itself: it holds the lock until it is over.
    inherited = () if sys.platform == "win32" else (lock,)
    done = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env=environment(),
        errors="replace",
        pass_fds=inherited,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    if done.returncode:
        shown = done.stdout.strip().splitlines()[-SHOWN_LINES:]
        tool = Path(command[0]).name
        message = f"{tool} failed with status {done.returncode}:"
        raise BootstrapError("\n    ".join([message, *shown]), hint_for(done.stdout))


def environment() -> "dict[str, str]":
    """The user's, without the modules of another program (ROS, HPC modules)."""
    env = {**os.environ, "PIP_USER": "0"}  # `user = true` in pip's settings ends in an error
    return {name: env[name] for name in env if name not in ("PYTHONPATH", "PYTHONHOME")}


def hint_for(output: str) -> str:
    if shutil.disk_usage(ROOT).free < 2**20:  # `python -m venv` does not pass the reason on
        return DISK_FULL
    for signs, hint in HINTS:
        if any(sign in output for sign in signs):
            names = [name for name in NETWORK if os.environ.get(name)]
            return hint + f" Set here: {', '.join(names)}." * (hint is NO_NETWORK and bool(names))
    return "Delete .venv and call doitw again; PYTHON=/path/to/python doitw takes another Python."


def requirements(name: str) -> bytes:
    path = ROOT / "requirements" / f"{name}.txt"
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BootstrapError(
            f"{path} is missing.", "Restore it with `git checkout requirements`."
        ) from error


def write(path: Path, content: bytes) -> None:
    """Writes a file at once, so that nobody reads half of it, not after a power cut either."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    flush(part)
    os.replace(part, path)  # noqa: PTH105
    flush(path.parent)


def flush(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_all(folder: Path) -> None:
    """Forces all below a folder to the disk: thousands of files, at once where Linux can."""
    if sys.platform == "linux":
        handle = os.open(folder, os.O_RDONLY)
        try:
            import ctypes

            if ctypes.CDLL(None).syncfs(handle) == 0:
                return
        except (AttributeError, ImportError):  # not in every C library, or Python
            pass
        finally:
            os.close(handle)
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            flush(path)


@contextlib.contextmanager
def locked(path: Path) -> "Iterator[int]":
    """Holds a lock that the operating system takes back from a killed process."""
    with path.open("ab") as file:
        if not try_lock(file):
            say("doitw: waiting for another doitw that sets up .venv")
            while not try_lock(file):
                time.sleep(0.2)
        # Closing the file gives the lock back.
        yield file.fileno()


def try_lock(file: "IO[bytes]") -> bool:
    try:
        if sys.platform == "win32":
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if sys.platform == "win32" or isinstance(error, BlockingIOError):
            return False
        say(f"doitw: locks do not work on this disk ({error.strerror}): call it once at a time")
    return True


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
