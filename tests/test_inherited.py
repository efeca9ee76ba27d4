"""What servers, and whoever starts them, have of the user's environment: real processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, SHEBANG, Doit, free_port, wait_for
from supervisor_tools import Servers, stand_in

from pipeline.serve.gateway.settings import GatewaySettings, as_instance
from pipeline.serve.server import Server
from pipeline.serve.supervisor.environment import environment

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

OF_THE_HUB = {
    "HF_TOKEN": "hf_secret",
    "HF_ENDPOINT": "http://user:secret@127.0.0.1:1",
    "HTTPS_PROXY": "http://user:secret@127.0.0.1:1",
}
SECRETS = OF_THE_HUB | {
    "OPENAI_API_KEY": "sk-secret",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "GITHUB_TOKEN": "ghp_secret",
    "NVIDIA_API_KEY": "nvapi-secret",
    "DATABASE_URL": "postgres://user:secret@127.0.0.1:1/db",
}
WANTED = {
    "CUDA_VISIBLE_DEVICES": "0",
    "OMP_NUM_THREADS": "1",
    "LANG": "C.UTF-8",
    "LC_TIME": "C",
}


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell with secrets in it."""
    for name, value in (SECRETS | WANTED).items():
        monkeypatch.setenv(name, value)


def secrets(env: dict[str, str]) -> set[str]:
    return {name for name, value in env.items() if "secret" in value}


def with_secrets(found: dict[str, dict[str, str]]) -> dict[str, set[str]]:
    return {name: told for name, env in found.items() if (told := secrets(env))}


def environments(servers: Servers) -> dict[str, dict[str, str]]:
    """Of each process: by the name of its instance, or `supervisor` and `reaper`."""
    found: dict[str, dict[str, str]] = {}
    for process in servers.processes():
        env = process.environ()
        _, _, name = env["LLAMA_PIPELINE_FLEET"].partition("/")
        found[name or process.cmdline()[2].rpartition(".")[2]] = env
    return found


def downloading(folder: Path) -> Server:
    return stand_in(folder, "hub", engine="vllm", downloads=True)


@pytest.mark.usefixtures("user")
def test_in_the_background(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign").mkdir()
    for name in ("psutil", "sitecustomize", "uvicorn"):
        (tmp_path / "foreign" / f"{name}.py").write_text("raise SystemExit('of another program')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "foreign"))
    llama = stand_in(tmp_path, "llama", env={"OWN_TOKEN": "given", "OMP_NUM_THREADS": "7"})
    vllm = stand_in(tmp_path, "vllm", engine="vllm")
    gateway = as_instance(servers.at, GatewaySettings(port=free_port()))
    assert servers.up(llama, vllm, gateway) == {}
    found = environments(servers)
    assert set(found) == {"supervisor", "reaper", "llama", "vllm", "gateway"}
    assert with_secrets(found) == {}
    assert not any("PYTHONPATH" in env for env in found.values())
    assert WANTED.items() <= found["vllm"].items()
    assert found["llama"]["CUDA_VISIBLE_DEVICES"] == WANTED["CUDA_VISIBLE_DEVICES"]
    assert (found["llama"]["OWN_TOKEN"], found["llama"]["OMP_NUM_THREADS"]) == ("given", "7")
    began = environment(llama, servers.at)
    assert secrets(dict(began)) == set() and began["OWN_TOKEN"] == "given"


@pytest.mark.usefixtures("user")
def test_the_token_is_for_a_vllm_that_downloads(servers: Servers, tmp_path: Path) -> None:
    gateway = as_instance(servers.at, GatewaySettings(port=free_port()))
    assert servers.up(stand_in(tmp_path, "llama"), downloading(tmp_path), gateway) == {}
    found = environments(servers)
    assert with_secrets(found) == {"supervisor": set(OF_THE_HUB), "hub": set(OF_THE_HUB)}
    assert set(found) == {"supervisor", "reaper", "llama", "hub", "gateway"}


@pytest.mark.usefixtures("user")
def test_one_that_joins_later(
    servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its supervisor has no token to hand on, which is said."""
    llama, hub = stand_in(tmp_path, "llama"), downloading(tmp_path)
    servers.up(llama)
    assert "warning" not in capsys.readouterr().err
    servers.up(llama, hub)
    told = capsys.readouterr().err
    assert all(name in told for name in OF_THE_HUB) and "OPENAI" not in told
    assert secrets(environments(servers)["hub"]) == set()
    servers.down()
    servers.up(llama, hub)
    assert "warning" not in capsys.readouterr().err
    assert secrets(environments(servers)["hub"]) == set(OF_THE_HUB)


@pytest.mark.build
def test_in_the_foreground(doit: Doit, gguf: Path) -> None:
    doit.env |= SECRETS | WANTED
    with doit.serving(f"model={gguf}"):
        (server,) = [process for process in psutil.process_iter() if serves(process, doit)]
        env = server.environ()
    assert secrets(env) == set()
    assert WANTED.items() <= env.items()


def test_modules_of_another_program_hide_none_of_plain_doit(bare: Doit, tmp_path: Path) -> None:
    for name in ("psutil", "pydantic", "filelock", "tomli_w"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of another program')")
    (tmp_path / "a.toml").write_text("[master]\nenable = false\n")
    bare.env |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}/none"}
    assert "of another program" not in bare("ps", f"config={tmp_path / 'a.toml'}").err


def full(note: Path) -> bool:
    return note.exists() and bool(note.read_text())


def serves(process: psutil.Process, doit: Doit) -> bool:
    try:
        is_ours = process.environ().get("LLAMA_PIPELINE_HOME") == str(doit.home)
        return is_ours and process.name() == "llama-server"
    except psutil.Error:  # another test's, which has just ended
        return False


@pytest.mark.build
@pytest.mark.parametrize("engine", ["router", "litellm"])
def test_another_program_that_is_the_gateway(doit: Doit, tmp_path: Path, engine: str) -> None:
    """Stand-ins that write down what they have."""
    (real,) = REPOSITORY.glob("bins/*-cpu/llama-server")
    note = tmp_path / "told.json"
    for name in ("llama-server", "litellm"):
        (tmp_path / name).write_text(
            f"{SHEBANG}\nimport json, os, pathlib, sys, time\n"
            f"if {{'--help', '--version'}} & {{*sys.argv}}: os.execv({str(real)!r}, sys.argv)\n"
            f"pathlib.Path({str(note)!r}).write_text(json.dumps(dict(os.environ)))\n"
            "time.sleep(600)\n"
        )
        (tmp_path / name).chmod(0o755)
    (tmp_path / "model.gguf").touch()
    (tmp_path / "key").write_text("of-the-server\n")
    config = tmp_path / "servers.toml"
    config.write_text(
        "[master]\nllama_cpp_path = './llama-server'\n[instance.chat.server]\n"
        f"model = 'model.gguf'\nport = {free_port()}\napi_key_file = 'key'\n"
    )
    doit.env |= SECRETS | WANTED | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    words = ("gateway", f"config={config}", f"engine={engine}", f"port={free_port()}")
    with doit.start(*words) as process:
        try:
            wait_for(lambda: full(note) or process.poll() is not None)
            assert process.poll() is None, process.communicate()
        finally:
            process.terminate()
    env = json.loads(note.read_text())
    assert secrets(env) == set()
    assert env["LANG"] == WANTED["LANG"]
    if engine == "litellm":
        assert "of-the-server" in env.values() and env["LITELLM_MASTER_KEY"]
    else:
        assert WANTED.items() <= env.items()
