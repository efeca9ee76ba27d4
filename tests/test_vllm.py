"""vLLM as it is promised to be started, recorded by programs that stand in for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import SHEBANG, Doit, free_port, wait_for

SERVER = Path(__file__).parent / "fakes" / "server.py"
STAND_IN = """{shebang}
import json, os, sys
words = sys.argv[1:]
with open({record!r}, "w") as file:
    json.dump([words, dict(os.environ)], file)
port = words[words.index("--port") + 1]
sleeps = [word for word in words if word == "--enable-sleep-mode"]
os.execv(sys.executable, [sys.executable, {server!r}, "--port", port, *sleeps])
"""


@dataclass(frozen=True)
class Machine:
    """A user's machine on which `pixi` and `python` are such programs."""

    doit: Doit
    folder: Path

    def program(self, name: str) -> Path:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        record = str(self.folder / f"{name}.json")
        path.write_text(STAND_IN.format(shebang=SHEBANG, record=record, server=str(SERVER)))
        path.chmod(0o755)
        return path

    def told(self, name: str) -> tuple[list[str], dict[str, str]]:
        words, env = json.loads((self.folder / f"{name}.json").read_text())
        return words, env

    def write(self, text: str) -> str:
        file = self.folder / "vllm ü.toml"
        file.write_text(text, encoding="utf-8")
        return f"config={file}"


@pytest.fixture
def machine(bare: Doit, tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(bare, tmp_path)
    (tmp_path / "bin").mkdir()
    bare.env["PATH"] = os.pathsep.join([str(tmp_path / "bin"), bare.env["PATH"]])
    bare.env["HF_TOKEN"] = "hf_secret"
    yield machine
    bare("down", status=None)


def planned(machine: Machine, config: str) -> dict[str, Any]:
    (told,) = machine.doit("plan", config, "engine=vllm", "format=json").json()
    return dict(told)


def test_in_a_pixi_project(machine: Machine) -> None:
    machine.program("pixi")
    project, port = machine.folder / "my project", free_port()
    project.mkdir()
    config = machine.write(
        f"""
[master]
pixi_project_dir = "my project"
[instance.control]
gpu_ids = "1,0"
[instance.qwen.server]
model = "Qwen/Qwen2.5-0.5B-Instruct"
port = {port}
tensor_parallel_size = 2
enable_prefix_caching = true
trust_remote_code = false
extra_args = ["--seed", "7"]
"""
    )
    plan = planned(machine, config)
    assert plan["executable"].endswith("pixi")
    told = machine.doit("up", config, "engine=vllm")
    assert f"qwen: ready at http://127.0.0.1:{port}" in told.err
    words, env = machine.told("pixi")
    assert words == plan["cmd"]
    line = " ".join(words)
    assert line.startswith(f"run --manifest-path {project} ")
    assert "-m vllm.entrypoints.openai.api_server" in line
    for pair in (
        "--model Qwen/Qwen2.5-0.5B-Instruct",
        "--tensor-parallel-size 2",
        "--enable-prefix-caching",
        "--host 127.0.0.1",
        f"--port {port}",
        "--served-model-name qwen",
    ):
        assert f"{pair} " in f"{line} ", pair
    assert "trust-remote-code" not in line and line.endswith("--seed 7")
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == ("1,0", "PCI_BUS_ID")
    assert env["HF_TOKEN"] == "hf_secret", "vLLM loads from the hub itself"
    assert machine.doit("ps", "format=json").json()[0]["engine"] == "vllm"
    assert not list(machine.doit.home.glob("bins/*")), "no llama.cpp is needed"


def test_in_a_python_with_a_key(machine: Machine) -> None:
    """The key is in the environment, not on the command line."""
    python, port = machine.program("vllm-python"), free_port()
    config = machine.write(
        f"""
[master]
python = {json.dumps(str(python))}
[instance.open.server]
model = "org/model"
host = "0.0.0.0"
port = {port}
api_key = "sk-very-secret"
"""
    )
    plan = planned(machine, config)
    assert "sk-very-secret" not in json.dumps(plan)
    machine.doit("up", config, "engine=vllm")
    words, env = machine.told("vllm-python")
    assert words[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert "sk-very-secret" not in " ".join(words) and env["VLLM_API_KEY"] == "sk-very-secret"
    for path in machine.doit.home.rglob("*"):
        if path.is_file() and "sk-very-secret" in path.read_text(errors="replace"):
            assert path.parent.name == "keys" and path.stat().st_mode & 0o77 == 0


def test_sleep_mode(machine: Machine) -> None:
    """Idle it sleeps, a request wakes it, and `unload` stops it."""
    python, port, entry = machine.program("vllm-python"), free_port(), free_port()
    config = machine.write(
        f"""
[master]
python = {json.dumps(str(python))}
[gateway]
enable = true
port = {entry}
[instance.chat.control]
start = "demand"
idle_timeout = 0.5
env = {{VLLM_SERVER_DEV_MODE = "1"}}
[instance.chat.server]
model = "org/model"
port = {port}
enable_sleep_mode = true
"""
    )

    def row() -> dict[str, Any]:
        rows = machine.doit("ps", config, "engine=vllm", "format=json").json()
        return next(dict(each) for each in rows if each["name"] == "chat")

    def ask() -> int:
        body = {"model": "chat", "messages": [{"role": "user", "content": "hello"}]}
        url = f"http://127.0.0.1:{entry}/v1/chat/completions"
        return httpx2.post(url, json=body, timeout=120).status_code

    assert "VLLM_SERVER_DEV_MODE" not in machine.doit("up", config, "engine=vllm").err
    assert row()["pid"] is None and ask() == 200
    asleep = wait_for(lambda: (now := row())["state"] == "asleep" and now)
    assert asleep["pid"] and asleep["memory"], "its process stays"
    assert ask() == 200 and row()["pid"] == asleep["pid"]
    machine.doit("unload", config, "engine=vllm", "name=chat")
    stopped = row()
    assert (stopped["state"], stopped["pid"]) == ("asleep", None)


ANSWERS = """{shebang}
import sys
with open({record!r}, "a") as file:
    file.write(" ".join(sys.argv[1:3]) + "\\n")
if sys.argv[1] == "-c":
    print("a warning of some library")
    print("vllm 9.9.9")
elif "--help=all" in sys.argv:
    print({help!r})
else:
    sys.exit(1)
"""
HELP = """usage: api_server.py [-h] [--model MODEL]

Frontend:
  --served-model-name SERVED_MODEL_NAME [SERVED_MODEL_NAME ...]
                        The names.
  --host HOST           Where it listens.
  --port PORT           Where it listens.
  --tensor-parallel-size TENSOR_PARALLEL_SIZE, -tp TENSOR_PARALLEL_SIZE
                        Cards.
  --enable-newest-thing, --no-enable-newest-thing
                        Of a version to come (default: False)
  --kind {one,two}      One of two.
  --model MODEL         A name.
"""


def test_the_installed_vllm_knows_its_own_options(machine: Machine) -> None:
    """Each version is asked once; what it has is right, and what it has not is wrong."""
    record, python = machine.folder / "asked", machine.folder / "bin" / "newest"

    python.write_text(ANSWERS.format(shebang=SHEBANG, record=str(record), help=HELP))
    python.chmod(0o755)
    text = f"""
[master]
python = {json.dumps(str(python))}
[instance.one.server]
model = "org/model"
enable_newest_thing = true
kind = "one"
"""
    plan = planned(machine, machine.write(text))
    assert "--enable-newest-thing --kind one" in " ".join(plan["cmd"])
    wrong = text + "max_model_len = 1\nenable_newest_thin = true\nhost = true\n"
    said = machine.doit("plan", machine.write(wrong), "engine=vllm", status=3).err
    assert "vLLM 9.9.9 has no --max-model-len" in said
    assert "enable_newest_thing?" in said and "--host takes a value" in said
    asked = record.read_text().splitlines()
    assert len([line for line in asked if line.startswith("-m ")]) == 1, asked


def test_options_that_vllm_does_not_have(machine: Machine) -> None:
    config = machine.write(
        """
[instance.one.server]
model = "org/model"
tensor_paralel_size = 2
ctx_size = 4096
"""
    )
    wrong = machine.doit("plan", config, "engine=vllm", status=3).err
    assert "tensor_parallel_size?" in wrong and "ctx_size" in wrong
