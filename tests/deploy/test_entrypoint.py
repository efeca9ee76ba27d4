"""The entry point with each of its variables: here, and in the image. Real servers answer."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, free_port, wait_for
from engines import end_all
from images import Machine
from supervisor_tools import stand_in

from pipeline.serve import health

pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="containers are Linux"),
]
ON_BOOT = "AUTO_INFER_LLAMA_CPP_ON_BOOT"
CONFIG = "AUTO_INFER_LLAMA_CPP_CONFIG"
SECONDS = 10  # that `docker stop` waits


IN_IMAGE = pytest.param("image", marks=pytest.mark.xdist_group("images"))


@pytest.fixture(params=["here", IN_IMAGE])
def machine(request: pytest.FixtureRequest, shared: Path, built: Path, tmp_path: Path) -> Machine:
    if request.param == "image":
        made: Machine = request.getfixturevalue("in_image")
        return made
    programs = next(path.parent for path in built.glob("*/llama-server"))
    home = tmp_path / "daten ü"
    home.mkdir()
    return Machine(shared, home, {"LLAMA_SERVER_BINS_DIR": str(programs)})


# The server itself cannot read it: nothing says so before.
FAILS = '[instance.control]\nmax_restarts = 0\n[instance.server]\ngrammar = "root ::= ("'


def toml(machine: Machine, text: str = "", **server: Any) -> tuple[dict[str, str], int]:
    """A file of one instance; the variables that start it on boot, and its port."""
    port = free_port()
    file = machine.folder / f"servers-{port}.toml"
    told = {"model": str(machine.folder / "tiny.gguf"), "port": port, "ctx_size": 256, **server}
    options = "\n".join(f"{key} = {json.dumps(value)}" for key, value in told.items())
    file.write_text(f"{text}\n[instance.chat.server]\n{options}\n", encoding="utf-8")
    return {ON_BOOT: "1", CONFIG: str(file)}, port


def registry(machine: Machine) -> tuple[dict[str, str], int]:
    """A registry of one profile; the variables that choose it, and its port."""
    file, port = machine.folder / f"profiles-{free_port()}.yaml", free_port()
    told = f'gguf_path: "{machine.folder}/tiny.gguf", port: {port}, ctx_size: 256, parallel: 1'
    file.write_text(f"profiles:\n  tiny:\n    llamacpp: {{{told}}}\n", encoding="utf-8")
    return {"LLM_PROFILE_NAME": "tiny", "LLM_PROFILES_CONFIG_PATH": str(file)}, port


def vllm(machine: Machine) -> tuple[dict[str, str], int]:
    """A file for vLLM, which a stand-in is here; the variables that start it, and its port."""
    port, python = free_port(), machine.folder / "python"
    fake = machine.folder / "server.py"
    fake.write_text((REPOSITORY / "tests" / "fakes" / "server.py").read_text())
    serve = f"exec python3 {shlex.quote(str(fake))} --port {port}"
    python.write_text(f"#!/bin/sh\ncase $* in *--port*) {serve};; *) exit 1;; esac\n")
    python.chmod(0o755)
    file = machine.folder / f"vllm-{port}.toml"
    file.write_text(
        f'[master]\npython = "{python}"\n[instance.big.control]\nprobe_timeout = 0\n'
        f'[instance.big.server]\nmodel = "org/model"\nport = {port}\n'
    )
    return {"AUTO_INFER_VLLM_ON_BOOT": "true", "AUTO_INFER_VLLM_CONFIG": str(file)}, port


def called(machine: Machine, name: str) -> str:
    """One of the container's commands, for a shell."""
    ours = f"{shlex.quote(sys.executable)} -m pipeline.deploy {name}"
    return name if machine.image else ours


def is_ready(port: int) -> bool:
    return health.is_ready(stand_in(Path(), "a", port=port))


def test_nothing_is_started_and_the_command_runs(machine: Machine) -> None:
    assert machine("sh", "-c", "echo $0 $((6 * 7))", "hello").out == "hello 42\n"
    machine("sh", "-c", "exit 7", status=7)
    assert "nothing to start and no command to run" in machine(status=3).err
    assert "nowhere: cannot be started" in machine("nowhere", status=1).err


def test_a_file_on_boot_until_the_container_is_stopped(machine: Machine) -> None:
    variables, port = toml(machine)
    with machine.running(**variables) as running:
        running.until("reachable from this container only")
        assert f"chat: ready at http://127.0.0.1:{port}" in running.err
        assert is_ready(port)
        began = time.monotonic()
        running.signal()
        assert running.end() == 0, running.err
        assert time.monotonic() - began < SECONDS
    assert not is_ready(port)


def test_a_command_runs_beside_the_servers_and_ends_them(machine: Machine) -> None:
    variables, port = toml(machine)
    ask = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}/health').status)"
    told = machine("python3", "-c", f"{ask}; exit(5)", status=5, **variables)
    assert told.out.splitlines()[-1] == "200"
    assert not is_ready(port)


def test_a_command_that_does_not_stop_is_killed(machine: Machine) -> None:
    variables, port = toml(machine)
    with machine.running("sh", "-c", "trap '' TERM; echo I stay; sleep 99", **variables) as running:
        running.until("I stay")
        running.signal()
        assert running.end() == 128 + signal.SIGKILL
    assert not is_ready(port)


@pytest.mark.skipif(sys.platform != "linux", reason="setsid gives it a terminal")
def test_ctrl_c_is_for_the_command(shared: Path, built: Path, tmp_path: Path) -> None:
    """It cancels a line; the servers go on, and so does the command."""
    programs = next(path.parent for path in built.glob("*/llama-server"))
    machine = Machine(shared, tmp_path / "home", {})
    variables, port = toml(machine)
    words = [sys.executable, "-m", "pipeline.deploy", "entrypoint", sys.executable, "-iq"]
    ours, its = os.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *words],
        env={**os.environ, **variables, "LLAMA_SERVER_BINS_DIR": str(programs)}
        | {"LLAMA_PIPELINE_HOME": str(tmp_path / "home"), "TERM": "dumb"},
        cwd=REPOSITORY,
        stdin=its,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    seen = b""

    def says(text: bytes) -> bool:
        nonlocal seen
        while text not in seen and select.select([ours], [], [], 0)[0]:
            seen += os.read(ours, 65536)
        return text in seen

    try:
        wait_for(lambda: says(b">>> "), 90)
        os.write(ours, b"\x03")
        wait_for(lambda: says(b"KeyboardInterrupt"))
        os.write(ours, b"print(6 * 7)\n")
        wait_for(lambda: says(b"42"))
        assert is_ready(port) and process.poll() is None
        os.write(ours, b"exit(4)\n")
        wait_for(lambda: says(b"stopped") and process.poll() is not None, 30)
        assert process.returncode == 4
        assert not is_ready(port)
    finally:
        end_all(process)
        os.close(ours)


def test_what_lies_in_the_working_folder_is_no_module(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(42)")
    (tmp_path / "pipeline").mkdir()
    if not (REPOSITORY / ".venv" / "bin" / "python").exists():
        pytest.skip("the entry point runs in .venv, as ./doitw makes it")
    entry = [str(REPOSITORY / "docker" / "entrypoint"), "echo", "hi"]
    done = subprocess.run(entry, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "hi\n"


def test_a_profile_in_the_foreground(machine: Machine) -> None:
    variables, port = registry(machine)
    named = {"SERVICE_NAME": "answers", "SERVICE_VERSION": "3"}
    with machine.running(**variables, **named) as running:
        running.until("ready in")
        assert "service   answers 3" in running.out
        if machine.image:
            assert re.search("backend +cpu\n", running.out), running.out
            assert re.search("sandbox +(Landlock.*: no network|none: this sys)", running.out)
        machine(name="healthcheck", **variables)
        running.signal()
        assert running.end(SECONDS) == 0, running.err
    assert not is_ready(port)
    wrong = machine(name="healthcheck", status=1, **variables)
    assert f"tiny does not answer at http://127.0.0.1:{port}" in wrong.err


def test_all_at_once(machine: Machine) -> None:
    """llama.cpp's file, vLLM's and a profile: all answer, and all are stopped in time."""
    (one, first), (two, second), (three, third) = toml(machine), vllm(machine), registry(machine)
    variables = {**one, **two, **three}
    with machine.running(**variables) as running:
        running.until("ready in")
        assert all(map(is_ready, (first, second, third)))
        machine(name="healthcheck", **variables)
        began = time.monotonic()
        running.signal()
        assert running.end() == 0, running.err
        assert time.monotonic() - began < SECONDS
    assert not any(map(is_ready, (first, second, third)))


def test_one_that_cannot_be_started_ends_the_others(machine: Machine) -> None:
    (one, first), (two, _) = vllm(machine), toml(machine, model="/nowhere/model.gguf")
    assert "/nowhere/model.gguf is not a file" in machine("echo", status=3, **one, **two).err
    assert not is_ready(first)


def test_a_package_on_boot_is_what_serves(machine: Machine, package: Path) -> None:
    if not machine.image:  # where nobody names other programs
        machine = replace(machine, env={"LLAMA_SERVER_BINS_DIR": ""})
    variables, _ = toml(machine)
    where = {"AUTO_INFER_LLAMA_CPP_PKG_PATH": str(machine.folder / package.name)}
    on_boot = {"AUTO_INFER_LLAMA_CPP_GET_PKG_ON_BOOT": "1"}
    read = 'cat "$LLAMA_PIPELINE_HOME"/run/instances/*/wanted.json'
    told = machine("sh", "-c", read, **variables, **where, **on_boot)
    assert "chat: ready" in told.err and "bins/package/bin/llama-server" in told.out
    again = machine(name="get-llama-cpp-pkg", **where).err
    assert "unpacking" not in again and "is installed in" in again
    wrong = machine("true", status=3, **on_boot, AUTO_INFER_LLAMA_CPP_PKG_PATH="/no/such.tar.gz")
    assert "/no/such.tar.gz: there is no such file" in wrong.err


def test_by_hand(machine: Machine) -> None:
    variables, port = toml(machine)
    check, run = (called(machine, x) for x in ("healthcheck", "check-and-run-llama-cpp"))
    script = machine.folder / f"by-hand-{port}.sh"
    check = f"{ON_BOOT}=1 {check}"  # else, before the start, it is about whatever is on 8080
    script.write_text(f"set -e\nif {check}; then exit 9; fi\n{run}\n{check}\necho fine; sleep 99\n")
    file = {CONFIG: variables[CONFIG]}
    with machine.running("sh", str(script), **file) as running:
        running.until("fine\n")
        assert "chat: ready" in running.err
        assert f"{file[CONFIG]}: none of its servers is up" in running.err
        doit = ["doit"] if machine.image else [sys.executable, "-m", "doit"]
        machine(*doit, "down", f"config={file[CONFIG]}")
    assert not is_ready(port)
    assert (
        "AUTO_INFER_VLLM_CONFIG names no file" in machine(name="check-and-run-vllm", status=3).err
    )


def test_booted_and_left_running(machine: Machine) -> None:
    """For an image whose first process is not ours."""
    if machine.image:
        pytest.skip("the entry point is its first process")
    variables, port = toml(machine)
    machine(name="boot", **variables)
    assert is_ready(port)
    machine(sys.executable, "-m", "doit", "down", f"config={variables[CONFIG]}")
    assert not is_ready(port)
    assert "did you mean boot?" in machine(name="boots", status=3).err


@pytest.mark.parametrize(
    ("text", "model", "said", "status"),
    [
        ("[instance.control]\nenabld = true", "tiny.gguf", "did you mean enabled?", 3),
        ("", "nowhere.gguf", "nowhere.gguf is not a file", 3),
        ("", "README", "is not a usable GGUF", 1),
        (FAILS, "tiny.gguf", "chat is failed", 1),
    ],
    ids=["key", "missing", "damaged", "failing"],
)
def test_what_is_wrong_ends_it(
    machine: Machine, text: str, model: str, said: str, status: int
) -> None:
    (machine.folder / "README").write_text("no GGUF")
    variables, _ = toml(machine, text, model=str(machine.folder / model))
    told = machine("echo", "not run", status=status, **variables)
    assert said in told.err and "not run" not in told.out


def test_nothing_is_loaded_for_a_command_or_profile_that_is_not_there(machine: Machine) -> None:
    variables, _ = toml(machine)
    told = machine("nosuchprogram", status=1, **variables)
    assert "nosuchprogram: there is no such program" in told.err and "ready" not in told.err
    profile, _ = registry(machine)
    told = machine(status=3, **variables, **profile | {"LLM_PROFILE_NAME": "tinny"})
    assert "did you mean tiny?" in told.err and "ready" not in told.err


def test_a_profile_that_is_not_there_ends_it(machine: Machine) -> None:
    variables, _ = registry(machine)
    told = machine(status=3, **variables | {"LLM_PROFILE_NAME": "tinny"})
    assert "did you mean tiny?" in told.err


def test_stopped_while_a_model_loads(machine: Machine) -> None:
    program = machine.folder / "llama-server"
    real = "/opt/llama-cpp/bin" if machine.image else machine.env["LLAMA_SERVER_BINS_DIR"]
    program.write_text(
        "#!/bin/sh\ncase $* in *--help* | *--completion-bash*)\n"
        f'exec {shlex.quote(real)}/llama-server "$@";; esac\n'
        "exec sleep 600\n"
    )
    program.chmod(0o755)
    variables, _ = toml(machine, f'[master]\nllama_cpp_path = "{program}"')
    with machine.running(**variables) as running:
        seen = machine.home / "run" / "instances"
        wait_for(lambda: any("loading" in x.read_text() for x in seen.glob("*/state.json")), 60)
        running.signal(signal.SIGINT)
        assert running.end(SECONDS * 2) == 0, running.err
