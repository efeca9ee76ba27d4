"""llama-server in the sandbox: a stand-in tries what it must not, and the real one works in it."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, SHEBANG, Doit, chat, free_port, post, wait_for
from msgspec.structs import replace
from supervisor_tools import Servers

from pipeline.core.errors import UsageError
from pipeline.core.sandbox import strength
from pipeline.serve import sandbox
from pipeline.serve.server import Server

pytestmark = pytest.mark.skipif(
    not strength().ports, reason="this system cannot limit a server to its port"
)

# It says what it could do, then serves.
CURIOUS = f"""{SHEBANG}
import json, os, runpy, socket, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
host = sys.argv[sys.argv.index("--host") + 1]

def tell(name, work):
    try:
        work()
    except OSError as error:
        print(f"{{name}}: refused", flush=True)
    else:
        print(f"{{name}}: done", flush=True)

def bind(number):
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(("127.0.0.1", number))

tell("own port", lambda: bind(port))
tell("other port", lambda: bind(port + 1))
tell("connection", lambda: socket.create_connection(("127.0.0.1", {{open_port}}), 2).close())
tell("datagram", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close())
tell("socket", lambda: socket.socket(socket.AF_UNIX).connect({{open_socket!r}}))
tell("other socket", lambda: socket.socket(socket.AF_UNIX).bind({{beside!r}} + ".sock"))
tell("secret", lambda: open({{secret!r}}).read())
tell("write", lambda: open({{beside!r}}, "w"))
tell("program", lambda: subprocess.run(["/bin/true"]))
tell("model", lambda: open(sys.argv[sys.argv.index("--model") + 1]).read())
prompts = sys.argv[sys.argv.index("--log-prompts-dir") + 1]
tell("own folder", lambda: os.makedirs(prompts, exist_ok=True))
tell("own prompts", lambda: open(prompts + "/1.txt", "x").write("x"))
tell("own log", lambda: open(sys.argv[sys.argv.index("--log-file") + 1], "a").write("x"))
sys.argv = [sys.argv[0], "--host", host, "--port", str(port)]
runpy.run_path({{server!r}}, run_name="__main__")
"""
REFUSED = {"other port", "connection", "datagram", "secret", "write", "program"}
REFUSED |= {"socket", "other socket"}
ALLOWED = {"own port", "model", "own log", "own folder", "own prompts"}


@pytest.fixture
def open_socket() -> Iterator[str]:
    """The path of a socket of somebody else, such as a container engine's."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/open.sock")
        listener.listen()
        yield f"{folder}/open.sock"


@pytest.fixture
def curious(tmp_path: Path, open_socket: str) -> Server:
    folder = tmp_path / "prögrams of-cpu"
    folder.mkdir()
    secret, model = tmp_path / "home" / "secret", tmp_path / "models of ü" / "m.gguf"
    for file in (secret, model):
        file.parent.mkdir()
        file.write_text("x")
    program, port = folder / "llama-server", free_port()
    server = REPOSITORY / "tests" / "fakes" / "server.py"
    (folder / "server.py").write_bytes(server.read_bytes())
    values = {
        "secret": str(secret),
        "beside": str(model.with_name("beside")),
        "server": str(folder / "server.py"),
        "open_port": free_port(),
        "open_socket": open_socket,
    }
    text = CURIOUS
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value)).replace(f"{{{name}!r}}", repr(value))
    program.write_text(text)
    program.chmod(0o755)
    return Server(
        name="curious",
        executable=str(program),
        cmd=(
            *("--model", "models of ü/m.gguf", "--host", "127.0.0.1", "--port", str(port)),
            *("--log-file", str(tmp_path / "logs" / "its own.log"), "--log-prompts-dir", "asked"),
        ),
        folder=str(tmp_path),
        log_file=str(tmp_path / "logs" / "curious.log"),
        port=port,
        probe_timeout=0.0,
        sandbox="auto",
        # Where its interpreter lies: programs may be run from there.
        env={"LD_LIBRARY_PATH": os.pathsep.join((sys.prefix, sys.base_prefix))},
    )


def told(instance: Server) -> dict[str, str]:
    lines = Path(instance.log_file).read_text(encoding="utf-8").splitlines()
    return dict(line.split(": ") for line in lines if line.endswith((": refused", ": done")))


def test_what_a_server_may_not(servers: Servers, curious: Server) -> None:
    assert servers.up(curious) == {}
    found = told(curious)
    assert {name for name, answer in found.items() if answer == "refused"} == REFUSED
    assert {name for name, answer in found.items() if answer == "done"} == ALLOWED


def test_a_guarded_server_has_no_network_but_its_socket(servers: Servers, curious: Server) -> None:
    assert servers.up(replace(curious, guard=True)) == {}
    found = told(curious)
    assert {name for name, answer in found.items() if answer == "done"} == ALLOWED - {"own port"}


def test_packed_programs_for_the_cpu_are_in_it_too(curious: Server, tmp_path: Path) -> None:
    folder = tmp_path / "package" / "bin"
    folder.mkdir(parents=True)
    packed = replace(curious, executable=str(folder / "llama-server"))
    for backend, is_in in (("cuda", False), ("cpu", True)):
        (folder.parent / "manifest.json").write_text(f'{{"backend": "{backend}"}}')
        assert sandbox.is_in(packed) is is_in


def test_without_the_sandbox_it_could(servers: Servers, curious: Server) -> None:
    """Or the test above would show nothing."""
    assert servers.up(replace(curious, sandbox="off")) == {}
    found = told(curious)
    # nothing listens on the port that it connects to
    assert {name for name, answer in found.items() if answer == "refused"} == {"connection"}


@pytest.mark.parametrize(
    ("changed", "is_in", "why"),
    [
        ({}, True, ""),
        ({"sandbox": "strict"}, True, ""),
        ({"sandbox": "off"}, False, "sandbox=off"),
        ({"executable": "/opt/bin/llama-server"}, False, "graphics card"),
        ({"executable": "/opt/bin/llama-server", "sandbox": "strict"}, True, ""),
        ({"downloads": True}, False, "may download"),
        ({"host": "/run/llama.sock"}, False, "not a TCP port"),
        ({"cmd": ("--tools", "all")}, False, "--tools"),
        ({"cmd": ("--rpc", "10.0.0.1:1")}, False, "--rpc"),
        ({"cmd": ("--mcp-servers-config", "x")}, False, "--mcp-servers-config"),
        ({"cmd": ("--models_dir", "x")}, False, "--models_dir"),
    ],
)
def test_who_is_in_the_sandbox(
    curious: Server, changed: dict[str, object], is_in: bool, why: str
) -> None:
    one = replace(curious, **changed)  # type: ignore[arg-type]
    assert sandbox.is_in(one) is is_in
    assert (sandbox.policy(one) is not None) is is_in
    assert why in sandbox.shown(one)
    strict = replace(one, sandbox="strict")
    if sandbox.hindrance(strict):
        with pytest.raises(UsageError, match="sandbox=strict"):
            sandbox.require(strict, "sandbox")
    else:
        sandbox.require(strict, "sandbox")


def test_every_file_that_an_option_names_can_be_read(curious: Server, tmp_path: Path) -> None:
    for name in (
        "a.gguf",
        "b,c.gguf",
        "c:d.gguf",
        "s-00001-of-00002.gguf",
        "s-00002-of-00002.gguf",
    ):
        (tmp_path / name).write_text("x")
    words = ("--lora-scaled", "a.gguf:0.5", "--lora", "b,c.gguf", "-m", "s-00001-of-00002.gguf")
    words += ("--lora", "c:d.gguf,a.gguf")
    policy = sandbox.policy(replace(curious, cmd=(*curious.cmd, *words)))
    assert policy
    names = {path.name for path in policy.read}
    assert {"m.gguf", "a.gguf", "b,c.gguf", "c:d.gguf"} <= names
    assert {"s-00001-of-00002.gguf", "s-00002-of-00002.gguf"} <= names


@pytest.mark.build
def test_the_real_one_is_in_it(doit: Doit, gguf: Path, tmp_path: Path) -> None:
    slots = tmp_path / "slots ü"
    slots.mkdir()
    words = (f"gguf_path={gguf}", "sandbox=strict", f"server.slot_save_path={slots}")
    with doit.serving(*words, "server.parallel=1") as url:
        assert doit.summary["sandbox"].startswith(strength().name)
        first = chat(url)
        assert post(f"{url}/slots/0?action=save", {"filename": "one.bin"})["n_saved"] > 0
        assert chat(url) == first
        assert confined(int(url.rpartition(":")[2]))
    with doit.serving(f"gguf_path={gguf}", "sandbox=off") as url:
        assert doit.summary["sandbox"] == "none: sandbox=off"
        assert not confined(int(url.rpartition(":")[2]))


def confined(port: int) -> bool:
    """Whether what listens on a port, or a child of it, has a filter for its system calls, by the
    kernel's word."""

    def find() -> int:
        for one in psutil.net_connections("tcp"):
            if one.laddr and one.laddr.port == port and one.status == "LISTEN" and one.pid:
                return one.pid
        return 0

    process = psutil.Process(wait_for(find))
    pids = [process.pid, *(child.pid for child in process.children())]
    return any("Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text() for pid in pids)


def test_strict_is_refused_before_any_work(bare: Doit) -> None:
    config = bare.home / "one.toml"
    config.write_text(
        '[instance.a.control]\nengine = "vllm"\nsandbox = "strict"\n'
        '[instance.a.server]\nmodel = "org/a"\n',
        encoding="utf-8",
    )
    refused = bare("plan", f"config={config}", status=None)
    assert refused.status in (1, 3) and "vLLM starts programs of its own" in refused.err
