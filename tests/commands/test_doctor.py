"""`doctor`, as users run it, with programs on PATH that stand in for a driver's."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import time
from pathlib import Path

import pytest
from conftest import Doit, Run

from pipeline.commands.doctor import hider

posix = pytest.mark.skipif(os.name == "nt", reason="shell scripts stand in")


def stand_in(doit: Doit, folder: Path, **scripts: str) -> None:
    """Programs that come first on PATH."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
    doit.env["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def names_nobody(run: Run, doit: Doit) -> None:
    text = run.out + run.err
    # Both as JSON writes them and as they are.
    for path in (str(doit.home), doit.env.get("HOME", "")):
        for spelled in (path, json.dumps(path)[1:-1]):
            assert len(path) < 2 or spelled not in text
    for name in (getpass.getuser(), platform.node()):
        assert not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), name


def test_as_text(bare: Doit) -> None:
    run = bare("doctor")
    for title in ("system", "cpu", "memory", "disk", "tools", "cuda", "metal", "vulkan"):
        assert re.search(rf"^{title} +\S", run.out, re.M), title
    names_nobody(run, bare)
    assert not list(bare.home.iterdir()), "nothing is made"


def test_as_json(bare: Doit) -> None:
    run = bare("doctor", "format=json")
    report = run.json()
    assert list(report["backends"]) == ["cuda", "metal", "hip", "sycl", "vulkan", "cpu"]
    for name, answer in report["backends"].items():
        assert answer["state"] in ("usable", "possible", "missing")
        assert (answer["state"] == "missing") == bool(answer["missing"])
        assert answer["state"] != "usable" or name == "cpu"
    assert report["memory"]["total_bytes"] > 1 << 28
    assert report["disk"]["free_bytes"] > 0
    assert re.match(r"\d+\.\d+", report["tools"]["ninja"]["version"])
    names_nobody(run, bare)


@posix
def test_nvidia_smi_that_hangs(bare: Doit, tmp_path: Path) -> None:
    stand_in(bare, tmp_path / "programs", nvidia_smi="exec /bin/sleep 120")
    start = time.monotonic()
    report = bare("doctor", "format=json").json()
    assert time.monotonic() - start < 90
    assert report["problems"]["nvidia-smi"] == "gave no answer in 5 s"
    assert "gave no answer" in report["backends"]["cuda"]["missing"][0]["what"]


@posix
def test_nvidia_smi_that_prints_an_error_with_status_0(bare: Doit, tmp_path: Path) -> None:
    script = "echo 'Failed to initialize NVML: Unknown Error'"
    stand_in(bare, tmp_path / "programs", nvidia_smi=script)
    report = bare("doctor", "format=json").json()
    assert report["devices"]["nvidia"] == []
    assert report["problems"]["nvidia-smi"] == "Failed to initialize NVML: Unknown Error"
    assert "Unknown Error" in bare("doctor").out


@posix
def test_cards_in_both_forms(bare: Doit, tmp_path: Path) -> None:
    line = "NVIDIA GeForce RTX 4090, 8.9, 580.65, [N/A], 24564"
    script = f'case "$1" in -L) echo;; *) echo "{line}";; esac'
    stand_in(bare, tmp_path / "programs", nvidia_smi=script)
    (card,) = bare("doctor", "format=json").json()["devices"]["nvidia"]
    assert card == {
        "name": "NVIDIA GeForce RTX 4090",
        "compute_capability": "8.9",
        "memory_bytes": 24564 * 1024 * 1024,
        "driver": "580.65",
        "mig": False,
    }
    assert "RTX 4090, compute capability 8.9, 25.8 GB, driver 580.65" in bare("doctor").out


@posix
@pytest.mark.parametrize("form", ["text", "json"])
def test_names_that_tools_print_stay_here(bare: Doit, tmp_path: Path, form: str) -> None:
    """Tools below the home folder, and errors and versions that tell whose machine it is."""
    home = tmp_path / "people" / "ada"
    (home / "bin").mkdir(parents=True)
    bare.env |= {"HOME": str(home), "LOGNAME": "ada", "CXX": f"{home}/bin/own++ -I{home}/x"}
    node = platform.node()
    stand_in(
        bare,
        home / "bin",
        ccache=f"echo 'ccache of {getpass.getuser()}@{node}'",
        node=f"echo 'error: {bare.home}/x: made by ada on {node}'; exit 1",
        **{"own++": "echo own++ 1.2"},
    )
    run = bare("doctor", f"format={form}")
    names_nobody(run, bare)
    assert "~/bin/own++" in run.out
    assert "$LLAMA_PIPELINE_HOME/x: made by USER on HOST" in run.out
    assert "ada" not in re.findall(r"\w+", run.out)


def test_a_home_inside_the_other_and_names_inside_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("LOGNAME", "cl")
    hide = hider(tmp_path / "data")
    assert hide(f"{tmp_path / 'data' / 'x'} {tmp_path / 'y'}").replace("\\", "/") == (
        "$LLAMA_PIPELINE_HOME/x ~/y"
    )
    assert hide("cl is in clang, cl-x") == "USER is in clang, cl-x"
