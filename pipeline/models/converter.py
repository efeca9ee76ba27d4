"""The official converter's own environment: large, pinned, shared by all checkouts."""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import platform
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal

from pipeline.core import network, paths
from pipeline.core.errors import PipelineError
from pipeline.core.log import info
from pipeline.core.packages import LONGEST, pip_environment
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.process import WINDOWS, capture, last_lines, run
from pipeline.core.sandbox import Sandbox
from pipeline.core.store import artifacts, hashing, receipts
from pipeline.core.store.publish import disk_error_in
from pipeline.core.store.receipts import Recipe
from pipeline.core.text import size

from . import tools

DRIVER = Path(__file__).with_name("run_converter.py")
PYTHON = Path("Scripts/python.exe" if WINDOWS else "bin/python")
COPIES = 4  # of the weights: as read, as 32-bit numbers, and stacked with others of their kind
REQUIREMENTS = Path(__file__).with_name("converter-requirements.txt")
INSTALLED_BYTES = 1_300_000_000
DOWNLOAD_BYTES = 270_000_000

_whole: set[Path] = set()  # the environments in which this process found no damage


@cache
def requirements_sha256() -> str:
    """The identity of everything that is installed, torch and its index included."""
    text = f"{REQUIREMENTS.read_text(encoding='utf-8')}{pins().torch} {pins().torch_index}"
    return hashlib.sha256(text.encode()).hexdigest()


def recipe() -> Recipe:
    """What the environment depends on."""
    return {
        "step": "converter",
        "requirements": requirements_sha256(),
        "python": sys.version.split()[0],  # platform.python_version(), which takes a millisecond
        "platform": f"{sys.platform}-{platform.machine()}",
    }


def folder(home: Home) -> Path:
    """The environment's folder, which may not exist yet."""
    digest = hashlib.sha256(repr(sorted(recipe().items())).encode()).hexdigest()[:12]
    return paths.cache(home) / f"converter-{digest}"


def python(home: Home) -> Path:
    """The environment's Python."""
    return folder(home) / PYTHON


def is_current(home: Home) -> bool:
    """Whether the environment is complete, and as it was installed."""
    return has_receipt(home) and not damage(home)


def has_receipt(home: Home) -> bool:
    """Whether the environment was finished, by the recipe of today."""
    entry = receipts.load(folder(home)).get("environment")
    return entry is not None and entry.recipe == recipe() and python(home).exists()


def damage(home: Home, *, hashes: bool = False) -> str:
    """What differs from the packages that were installed; empty for nothing. Compares the sizes of
    their files, once a process since it takes half a second, or their hashes."""
    from packaging.utils import canonicalize_name

    top = folder(home)
    if top in _whole and not hashes:
        return ""
    try:
        (site,) = top.glob("Lib/site-packages" if WINDOWS else "lib/*/site-packages")
        infos = list(site.glob("*.dist-info"))
        names = {canonicalize_name(info.name.partition("-")[0]) for info in infos}
        if missing := ", ".join(sorted(required() - names)):
            return f"{missing} is not there"
        for path in (top / "pyvenv.cfg", *(info / "RECORD" for info in infos)):
            if not path.stat().st_size:
                return f"{path} is empty"
        for info in infos:
            lines = (info / "RECORD").read_text(encoding="utf-8").splitlines()
            for name, digest, size in csv.reader(lines):
                path = site / name
                if size and path.stat().st_size != int(size):
                    return f"{path} has {path.stat().st_size} bytes instead of {size}"
                if hashes and digest and _digest(path) != digest:
                    return f"{path} is not what was installed"
    except (OSError, ValueError) as error:
        return str(error)
    _whole.add(top)
    return ""


def required() -> set[str]:
    """The names of the packages that this platform needs."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = re.findall(r"^(\w.*?) *\\?$", REQUIREMENTS.read_text(encoding="utf-8"), re.M)
    packages = [Requirement(line) for line in (*lines, "torch")]
    needed = [package for package in packages if not package.marker or package.marker.evaluate()]
    return {canonicalize_name(package.name) for package in needed}


def _digest(path: Path) -> str:
    """A file's hash as the RECORD of a package has it."""
    digest = base64.urlsafe_b64encode(bytes.fromhex(hashing.sha256(path)))
    return f"sha256={digest.decode().rstrip('=')}"


def make(home: Home, *, force: bool = False, offline: bool = False) -> None:
    """Make the environment unless it is current; its receipt comes last. Raises PipelineError."""
    target = folder(home)
    paths.require_writable(target.parent)
    with artifacts.locked_folder(target):
        why = damage(home) if has_receipt(home) else "it is not there"
        if not why and not force:
            return
        if offline:
            raise PipelineError(
                f"the converter's environment is to be made ({why or 'force=1'}), and offline=1 "
                "forbids downloading it",
                "run once without offline=1",
            )
        if has_receipt(home) and why:
            info(f"the converter's environment is damaged, and is made again: {why}")
        _whole.discard(target)
        info(
            f"making the converter's environment, once for all models: {size(DOWNLOAD_BYTES)} to "
            f"download, {size(INSTALLED_BYTES)} on disk"
        )
        with artifacts.new_folder(target, need=INSTALLED_BYTES) as made:
            _fill(made, home.logs / "converter.log")


def _fill(made: Path, log: Path) -> None:
    """Make the environment. It can be renamed: only its Python is started, by its path."""
    import venv  # slow to load

    venv.create(made, with_pip=False, symlinks=not WINDOWS)
    for arguments in pip_arguments(made / PYTHON):
        command = [sys.executable, "-m", "pip", *arguments]
        if run(command, log=log, env=pip_environment(), timeout=LONGEST):
            if full := disk_error_in(last_lines(log), made):
                raise full
            raise PipelineError(
                f"the converter's environment could not be made:\n{last_lines(log, 5)}",
                f"check the network and pip's settings{network.settings()}; the log is {log}",
            )
    _require_cpu_torch(made / PYTHON)
    stamp = made / "environment"
    stamp.write_text(requirements_sha256() + "\n", encoding="utf-8")
    receipts.save(made, {stamp.name: receipts.stamp(stamp, recipe(), seconds=0)})


def pip_arguments(python: Path) -> list[list[str]]:
    """The pip calls, run by this environment's pip, that fill the other one.

    torch comes alone, without its dependencies and from PyTorch's index of CPU builds: a plain
    install of it brings several GB of CUDA on Linux.
    """
    into = ["--python", str(python), "install", "--quiet", "--no-deps"]
    return [
        # Except on macOS the CPU build is marked; the mark keeps out the CUDA builds of a mirror,
        # should PyTorch's index not answer.
        [
            *(*into, "--index-url", pins().torch_index, "--retries", "2"),
            f"torch=={pins().torch}+cpu; sys_platform != 'darwin'",
            f"torch=={pins().torch}; sys_platform == 'darwin'",
        ],
        [*into, "--require-hashes", "--requirement", str(REQUIREMENTS)],
    ]


def forget(home: Home) -> None:
    """Drop the environment's receipt."""
    receipts.invalidate(folder(home) / "environment")


def environment(python: Path, scratch: Path) -> dict[str, str]:
    """The converter's environment: of the user's variables only those for locale, threads and
    libraries.

    Everything that transformers looks for lies below `scratch`, an empty folder: in the user's own
    caches it would find code, and run it.
    """
    folder = str(scratch)
    return tools.env() | {
        "PATH": str(python.parent),
        **dict.fromkeys(("HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP"), folder),
        **dict.fromkeys(("HF_HOME", "HF_MODULES_CACHE", "TORCH_HOME"), folder),
        **dict.fromkeys(("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), folder),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # the source tree stays as it was checked
        "PYTHONNOUSERSITE": "1",
        "PYTHONUTF8": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # that there is no torch: it is hidden on purpose
    }


def sandbox(
    python: Path, script: Path, staged: Path, files: Iterable[Path], made: Path, scratch: Path
) -> Sandbox:
    """What the converter may touch: its own programs, `staged` and the files behind its links."""
    real = [path.resolve() for path in files]
    return tools.sandbox(
        python,
        read=[script.parent, DRIVER, staged, *real],
        write=[made, scratch],
        weights=sum(path.stat().st_size for path in real),
        copies=COPIES,
        gpus=False,
    )


def architectures(source: Path, of: Literal["TEXT", "MMPROJ"] = "TEXT") -> frozenset[str]:
    """The architectures that the converter in `source` knows as models, or makes projectors of;
    empty where it is not there."""
    try:
        text = (source / "conversion" / "__init__.py").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    models = re.search(rf"^{of}_MODEL_MAP\b[^=\n]*= (\{{.*?^\}})", text, re.M | re.S)
    return frozenset(ast.literal_eval(models[1])) if models else frozenset()


def _require_cpu_torch(python: Path) -> None:
    output = capture(
        [python, "-I", "-c", "import torch; print(torch.__version__, torch.version.cuda)"],
        timeout=120,
    )
    if output is None or output.split()[-1] != "None":
        raise PipelineError(
            f"the converter's torch is not usable or not a CPU build: {output or 'import fails'}",
            f"pip config list: an index of yours may shadow {pins().torch_index}",
        )
