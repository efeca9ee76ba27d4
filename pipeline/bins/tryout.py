"""Programs are run once before they are published."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.process import outcome

from .backends import DEVICES

TIMEOUT = 60  # seconds; a driver that compiles its kernels first takes some


def version(server: Path, hint: str) -> str:
    """What llama-server calls itself. Raises PipelineError where it does not start."""
    status, out, err = outcome([server, "--version"], timeout=TIMEOUT)
    told = (out + err).strip()
    if status or not told:
        why = told.splitlines()[-1] if told else "prints nothing"
        raise PipelineError(f"{server.name} does not run (--version: {status}, {why})", hint)
    return next(
        (line.strip().removeprefix("version: ") for line in told.splitlines() if "version" in line),
        told.splitlines()[0],
    )


def devices(server: Path) -> str:
    """What --list-devices prints, or why it does not."""
    _, out, err = outcome([server, "--list-devices"], timeout=TIMEOUT)
    return (out + err).strip()


def shows(told: str, backend: str) -> bool:
    """Whether a device of the backend is among them."""
    return bool(re.search(rf"^\s*{DEVICES[backend]}\d+:", told, re.M))


def require_device(server: Path, backend: str, hint: str) -> None:
    """Raise PipelineError unless the programs see a device of their backend."""
    if backend == "cpu":
        return
    told = devices(server)
    if not shows(told, backend):
        seen = "\n".join(f"  | {line}" for line in told.splitlines()[-10:])
        raise PipelineError(
            f"{server.name} --list-devices shows no {DEVICES[backend]} device:\n{seen}", hint
        )
