"""Programs that are run before they are published: scripts stand in for llama-server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.bins import binaries
from pipeline.bins.binaries import DEVICES, try_out
from pipeline.core.errors import PipelineError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="shell scripts stand in")

LISTED = """Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24564 MiB, 24000 MiB free)
  {}0: the one that is meant (1 MiB, 1 MiB free)
"""


def server(folder: Path, script: str) -> Path:
    path = folder / "llama-server"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def listing(folder: Path, text: str) -> Path:
    """A server whose --list-devices prints `text`."""
    said = f"[ $1 = --version ] && echo version: 7 && exit\ncat <<'END'\n{text}END"
    return server(folder, said)


def test_what_it_calls_itself(tmp_path: Path) -> None:
    usual = "echo 'loaded from /conversions/x' >&2; echo 'version: 7 (abc)' >&2; echo built with x"
    assert try_out(server(tmp_path, usual), "cpu", "") == "7 (abc)"
    assert try_out(server(tmp_path, "echo one; echo two"), "cpu", "") == "one"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo first; echo libcuda.so.1: cannot open >&2; exit 127", "ended with 127):\n  | first"),
        ("echo first; echo libcuda.so.1: cannot open >&2; exit 127", "  | libcuda.so.1: cannot"),
        ("exit 1", "(--version ended with 1)"),
        ("true", "(--version ended with 0)"),
        ("echo; kill -SEGV $$", "(--version ended with -11)"),
        ("[ $1 = --version ] && echo version: 1", "(--list-devices ended with 1)"),
        ("exec sleep 20", "timed out"),
    ],
)
def test_it_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    if "sleep" in script:
        monkeypatch.setattr(binaries, "TIMEOUT", 1)
    with pytest.raises(PipelineError, match="llama-server does not run") as caught:
        try_out(server(tmp_path, script), "cpu", "look there")
    assert says in caught.value.message
    assert caught.value.hint == "look there"


def test_it_is_not_even_a_program(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="does not run"):
        try_out(tmp_path / "missing", "cpu", "")


@pytest.mark.parametrize("backend", DEVICES)
def test_the_device_is_listed(tmp_path: Path, backend: str) -> None:
    made = listing(tmp_path, LISTED.format(DEVICES[backend].partition("|")[0]))
    assert try_out(made, backend, "") == "7"
    other = "vulkan" if backend == "hip" else "hip"
    with pytest.raises(PipelineError, match=f"shows no device of {other}"):
        try_out(made, other, "")
    assert try_out(made, other, "", needs_device=False) == "7"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Available devices:\n", "  | Available devices:"),
        ("ggml_cuda_init: no CUDA-capable device is detected\n", "no CUDA-capable device"),
        ("note: CUDA0: is what you want\n", "  | note: CUDA0"),
    ],
)
def test_no_device_is_listed(tmp_path: Path, text: str, says: str) -> None:
    made = listing(tmp_path, text)
    with pytest.raises(PipelineError, match="--list-devices shows no device of cuda") as caught:
        try_out(made, "cuda", "look there")
    assert says in caught.value.message
    assert try_out(made, "cpu", "") == "7"


def test_only_the_end_of_a_long_list_is_told(tmp_path: Path) -> None:
    made = listing(tmp_path, "".join(f"line {number}\n" for number in range(1, 21)))
    with pytest.raises(PipelineError) as caught:
        try_out(made, "vulkan", "")
    assert "line 20" in caught.value.message and "line 2\n" not in caught.value.message
