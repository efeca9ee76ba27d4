"""New programs are run once before they are published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.process import outcome

# How --list-devices names their devices, before the number: CUDA0, Vulkan1.
DEVICES = {
    "cuda": "CUDA",
    "metal": "MTL|Metal",
    "hip": "ROCm",
    "sycl": "SYCL",
    "vulkan": "Vulkan",
}
TIMEOUT = 120  # seconds; a first start reads hundreds of MB, and asks every driver


def try_out(server: Path, backend: str, hint: str, *, needs_device: bool = True) -> str:
    """What llama-server calls itself. Raises PipelineError where it does not start, or does not
    see a device of its backend."""
    version = output_of(server, "--version", hint)
    devices = output_of(server, "--list-devices", hint)
    if needs_device and not shows(devices, backend):
        raise PipelineError(
            f"{server.name} --list-devices shows no device of {backend}:\n{indented(devices)}", hint
        )
    named = (line for line in version.splitlines() if line.startswith("version: "))
    return next(named, version.splitlines()[0]).removeprefix("version: ")


def shows(devices: str, backend: str) -> bool:
    """Whether a device of the backend is among them; the CPU is none, and needs none."""
    return backend == "cpu" or bool(re.search(rf"^ *({DEVICES[backend]})\d*:", devices, re.M))


def devices(server: Path, env: Mapping[str, str]) -> list[str]:
    """What --list-devices lists, a line each without what is free; none where it fails."""
    _, out, err = outcome([server, "--list-devices"], timeout=TIMEOUT, env=env)
    names = re.findall(r"^ *(\w+\d+: .+?)(?: \(\d+ MiB, .*)?$", out + err, re.M)
    return [name for name in names if not name.startswith("CPU")]


def output_of(server: Path, option: str, hint: str) -> str:
    """The output of the server with an option. Raises PipelineError where it fails or is empty."""
    status, out, err = outcome([server, option], timeout=TIMEOUT)
    text = (out + err).encode("utf-8", "replace").decode("utf-8").strip()
    if status or not text:
        raise PipelineError(
            f"{server.name} does not run ({option} ended with {status}):\n{indented(text)}", hint
        )
    return text


def indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines()[-15:])
