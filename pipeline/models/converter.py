"""The official converter's own environment: large, pinned, shared by all checkouts."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal

from pipeline.core import python_environment
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.process import capture
from pipeline.core.python_environment import INTO, WITH_HASHES, PythonEnvironment
from pipeline.core.sandbox import Sandbox

from . import tools

DRIVER = Path(__file__).with_name("run_converter.py")
COPIES = 4  # of the weights: as read, as 32-bit numbers, and stacked with others of their kind
REQUIREMENTS = Path(__file__).with_name("converter-requirements.txt")
INSTALLED_BYTES = 1_300_000_000
DOWNLOAD_BYTES = 270_000_000


@cache
def requirements_sha256() -> str:
    """The identity of everything that is installed, torch and its index included."""
    text = f"{REQUIREMENTS.read_text(encoding='utf-8')}{pins().torch} {pins().torch_index}"
    return hashlib.sha256(text.encode()).hexdigest()


def installed(home: Home) -> PythonEnvironment:
    """The environment, whether or not it is there."""
    return PythonEnvironment(
        home=home,
        name="converter",
        title="the converter",
        recipe=python_environment.recipe("converter", requirements_sha256()),
        packages=required,
        pip_calls=pip_arguments,
        check=_require_cpu_torch,
        download_bytes=DOWNLOAD_BYTES,
        installed_bytes=INSTALLED_BYTES,
    )


def required() -> set[str]:
    """The names of the packages that this platform needs."""
    return python_environment.required(REQUIREMENTS, "torch")


def make(home: Home, *, force: bool = False, offline: bool = False) -> None:
    """Make the environment unless it is current; its receipt comes last. Raises PipelineError."""
    installed(home).make(why="once for all models", force=force, offline=offline)


def pip_arguments(python: Path) -> list[list[str]]:
    """The pip calls, run by this environment's pip, that fill the other one.

    torch comes alone, without its dependencies and from PyTorch's index of CPU builds: a plain
    install of it brings several GB of CUDA on Linux.
    """
    into = ["--python", str(python), *INTO]
    return [
        # Except on macOS the CPU build is marked; the mark keeps out the CUDA builds of a mirror,
        # should PyTorch's index not answer.
        [
            *(*into, "--index-url", pins().torch_index, "--retries", "2"),
            f"torch=={pins().torch}+cpu; sys_platform != 'darwin'",
            f"torch=={pins().torch}; sys_platform == 'darwin'",
        ],
        [*into, *WITH_HASHES, str(REQUIREMENTS)],
    ]


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
