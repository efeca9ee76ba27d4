"""Several runs at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from conftest import Doit, free_port, wait_for

pytestmark = pytest.mark.build


def test_two_prepares_make_the_model_once(doit: Doit, tiny: Path, converter: Path) -> None:
    both = [doit.start("prepare", f"model={tiny}") for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    commands = [line for _, err in told for line in err.splitlines() if line.startswith("+ ")]
    (made,) = [command for command in commands if "convert_hf_to_gguf.py" in command]
    assert "--one-pass" in made, "it quantizes, too"
    assert any("waiting for it" in err for _, err in told)


def test_everything_works_beside_a_running_server(ready: Doit, tiny: Path) -> None:
    with ready.serving(f"model={tiny}", "ctx_size=512"):
        assert "serve" in ready("list").out
        assert ready("build_bins").steps == []
        assert ready("plan", f"model={tiny}").status == 0
        with ready.serving(f"model={tiny}", "ctx_size=512"):
            pass


def llama_servers(of: psutil.Process) -> list[psutil.Process]:
    return [p for p in of.children(recursive=True) if p.name().startswith("llama-server")]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_requested_stop_ends_well(ready: Doit, tiny: Path, name: str) -> None:
    port = free_port()
    with ready.start("serve", f"model={tiny}", f"port={port}", "ctx_size=512") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("url")
        server = llama_servers(psutil.Process(process.pid))[0]
        os.kill(process.pid, getattr(signal, name))
        process.communicate(timeout=120)
        assert process.returncode == 0
        assert not server.is_running()


def test_a_killed_doit_leaves_no_server(ready: Doit, tiny: Path) -> None:
    port = free_port()
    with ready.start("serve", f"model={tiny}", f"port={port}", "ctx_size=512") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("url")
        server = llama_servers(psutil.Process(process.pid))[0]
        process.kill()
        wait_for(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()


def test_a_server_that_cannot_start_says_why(ready: Doit, tiny: Path) -> None:
    together = ("server.cache_type_v=q4_0", "server.flash_attn=off")
    words = (f"model={tiny}", f"port={free_port()}", *together)
    wrong = ready("serve", *words, status=1)
    assert "ended before it was ready, exit status 1" in wrong.err
    last = wrong.err.rpartition("ended before it was ready")[2]
    assert "failed to create context" in last, "its last lines are shown"


def test_two_quants_of_one_model_at_once(doit: Doit, tiny: Path, converter: Path) -> None:
    """They share the file between; neither may take it away from the other."""
    quants = ("q4_k_m", "q5_k_m", "q6_k")
    all_at_once = [doit.start("prepare", f"model={tiny}", f"quant={quant}") for quant in quants]
    told = [process.communicate(timeout=300) for process in all_at_once]
    assert [process.returncode for process in all_at_once] == [0, 0, 0], told
    made = sorted(path.name for path in doit.home.rglob("*.gguf"))
    assert made == sorted(f"model.{quant}.gguf" for quant in quants)
    for quant in quants:
        assert doit("prepare", f"model={tiny}", f"quant={quant}").steps == []
