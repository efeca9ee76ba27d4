"""The sandbox, from inside: what a program in it can and cannot do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import process, sandbox
from pipeline.core.errors import PipelineError
from pipeline.core.sandbox import SWITCH, Sandbox, bubblewrap, landlock, seccomp

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own, as on Linux")

HERE = Path(__file__).parent
NOBODY = 65534
MEMORY = 1 << 30
MECHANISMS = ("Landlock", "bubblewrap")
# The tests' own Python may lie where others may not look.
PYTHON = shutil.which("python3", path="/usr/bin:/bin") or sys.executable


@dataclass(frozen=True)
class Box:
    """What lies in and around a sandbox."""

    top: Path
    places: dict[str, Any] = field(default_factory=dict)

    def lay_out(self, victim: int) -> None:
        names = {
            "key": "home/.ssh/id_rsa",
            "secret": "elsewhere/secret",
            "input": "models/ein mödel/a b.safetensors",
            "neighbour": "models/another.gguf",
            "receipts": "made/.receipts.json",
            "output": "made/ü.part",
            "foreign": "elsewhere/program",
        }
        for key, name in names.items():
            path = self.top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(key)
            self.places[key] = str(path)
        for name in ("scratch", "folder/inner"):
            (self.top / name).mkdir(parents=True)
        (self.top / "folder" / "inner" / "b").touch()
        (self.top / "folder" / "link").symlink_to(self.places["input"])
        shutil.copyfile("/bin/true", self.places["foreign"])
        for path in self.top.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o777)
        self.top.chmod(0o755)
        self.places.update(
            home=str(self.top / "home"),
            scratch=str(self.top / "scratch"),
            folder=str(self.top / "folder"),
            link=str(self.top / "folder" / "link"),
            top=str(self.top),
            pid=victim,
            memory=MEMORY,
        )

    def sandbox(self, **more: Any) -> dict[str, Any]:
        """Of a program that reads a file, a folder and a link's file, and writes one."""
        read = [HERE / "sandbox_probe.py", self.places["input"], self.places["folder"]]
        write = [self.places["output"], self.places["scratch"]]
        usual = {"programs": [PYTHON], "read": read, "write": write, "memory": MEMORY}
        return {
            key: [str(path) for path in value] if key in ("programs", "read", "write") else value
            for key, value in (usual | more).items()
        }


def run(
    argv: list[str], sandbox: dict[str, Any], mechanism: str = "Landlock", **more: Any
) -> dict[str, Any]:
    """What a program in the sandbox does: `status`, `out`, `err`, and the `strength` it had."""
    request = {"user": None, "mechanism": mechanism, "sandbox": sandbox, "argv": argv, **more}
    command = [sys.executable, str(HERE / "sandbox_runner.py"), json.dumps(request)]
    env = {name: value for name, value in os.environ.items() if name != SWITCH}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def require(mechanism: str) -> None:
    if mechanism == "Landlock" and not landlock.abi():
        pytest.skip("this kernel has no Landlock")
    if mechanism == "bubblewrap" and not bubblewrap.program():
        pytest.skip("bubblewrap is not installed, or may make no namespaces here")


@pytest.fixture(scope="module")
def boxes() -> Iterator[Any]:
    """A function: the outcomes inside by a mechanism, for a user."""
    tops: list[Path] = []

    @cache
    def outcomes_of(
        mechanism: str, user: int | None, word: str = "", abi: int = 0, **more: Any
    ) -> dict[str, str]:
        top = Path(tempfile.mkdtemp(prefix="sandbox-"))
        tops.append(top)
        box = Box(top)
        env = {"TOKEN": "secret", "PATH": os.environ["PATH"]}
        with subprocess.Popen(["sleep", "600"], user=user, env=env) as victim:
            try:
                box.lay_out(victim.pid)
                argv = [PYTHON, "-I", "-B", str(HERE / "sandbox_probe.py"), json.dumps(box.places)]
                argv += word.split()
                result = run(argv, box.sandbox(**more), mechanism, user=user, abi=abi)
                assert result["status"] == 0, result
                outcomes: dict[str, str] = json.loads(result["out"])
                assert victim.poll() is None, "a process outside was ended"
                return outcomes
            finally:
                victim.kill()

    yield outcomes_of
    for top in tops:
        shutil.rmtree(top)


ALLOWED = {
    *("read_input", "read_input_folder", "read_input_link", "read_own_environment"),
    *("write_output", "write_scratch"),
    *("threads", "some_memory", "signal_itself", "limit_itself", "bind_itself", "slow_itself"),
}
USERS = [None, *([NOBODY] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]


@pytest.mark.parametrize("user", USERS, ids=lambda user: "nobody" if user else "own user")
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_what_a_program_inside_can_do(boxes: Any, mechanism: str, user: int | None) -> None:
    require(mechanism)
    outcomes = boxes(mechanism, user)
    unexpected = {n: how for n, how in outcomes.items() if (how == "done") != (n in ALLOWED)}
    assert unexpected == {}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_program_that_it_becomes_is_inside_too(boxes: Any, mechanism: str) -> None:
    require(mechanism)
    assert boxes(mechanism, None, "exec") == boxes(mechanism, None)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_with_graphics_cards_no_file_and_no_network_is_within_reach(
    boxes: Any, mechanism: str
) -> None:
    require(mechanism)
    outcomes = boxes(mechanism, None, gpus=True)
    # Drivers share memory, watch files, and look for other programs in /proc.
    more = {name for name in outcomes if "memory" in name or "watch" in name or "memfd" in name}
    more |= {"read_their_command", "list_processes"}
    unexpected = {n: how for n, how in outcomes.items() if (how == "done") != (n in ALLOWED)}
    assert set(unexpected) <= more - {"read_their_memory", "read_their_memory_by_call"}


@pytest.mark.parametrize("abi", [1, 2, 3, 4, 5, 6, 7])
def test_an_older_kernel_protects_files_as_well(boxes: Any, abi: int) -> None:
    require("Landlock")
    if abi > landlock.abi():
        pytest.skip(f"this kernel's Landlock is {landlock.abi()}")
    outcomes = boxes("Landlock", None, abi=abi)
    unexpected = {n: how for n, how in outcomes.items() if (how == "done") != (n in ALLOWED)}
    assert unexpected == {}


def test_without_landlock_and_bubblewrap_only_the_network_is_limited(boxes: Any) -> None:
    limited = "tcp udp unix netlink mptcp fork clone signal_them"
    outcomes = boxes("seccomp", None, f"{limited} read_secret")
    assert {outcomes[name] for name in limited.split()} <= {"EACCES", "EPERM"}
    assert outcomes["read_secret"] == "done"


@pytest.mark.parametrize(
    ("mechanism", "lacks"),
    [
        ("Landlock", ""),
        ("bubblewrap", ""),
        ("seccomp", "files"),
        ("none", "files or the network"),
    ],
)
def test_what_is_lacking_is_said(tmp_path: Path, mechanism: str, lacks: str) -> None:
    require(mechanism)
    result = run(["true"], {"programs": ["/bin/true"]}, mechanism)
    assert result["status"] == 0
    assert result["lacks"] == lacks
    assert mechanism == "none" or result["strength"].startswith(mechanism)


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(probe.getsockname()[1]) for probe in probes]


def test_a_server_may_listen_on_its_port_and_talk_to_nobody() -> None:
    require("Landlock")
    if landlock.abi() < landlock.PORTS_SINCE:
        pytest.skip(f"this kernel's Landlock is {landlock.abi()}, which knows no ports")
    own, other = free_ports(2)
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        script = HERE / "sandbox_server.py"
        ports = [str(port) for port in (own, other, theirs.getsockname()[1])]
        box = {"programs": [PYTHON], "read": [str(script)], "ports": [own]}
        result = run([PYTHON, "-I", "-B", str(script), *ports], box)
        outcomes = json.loads(result["out"])
        done = {name for name, how in outcomes.items() if how == "done"}
        # Unbound, it gets a port of the system's choice, which neither Landlock nor seccomp sees.
        assert done - {"listen_unbound"} == {"listen", "listen_6"}, outcomes
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.accept()


@pytest.fixture(autouse=True)
def in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a developer who has switched it off."""
    monkeypatch.delenv(SWITCH, raising=False)


def limited(tmp_path: Path, script: str, **bounds: Any) -> dict[str, Any]:
    """A Python script that may write one file."""
    (tmp_path / "made").touch()
    box = {"programs": [PYTHON], "write": [str(tmp_path / "made")], **bounds}
    return run([PYTHON, "-I", "-B", "-c", script, str(tmp_path / "made")], box)


def test_a_file_gets_no_longer_than_it_may(tmp_path: Path) -> None:
    script = "import sys; open(sys.argv[1], 'wb', 0).write(b'x' * {}); print('written')"
    result = limited(tmp_path, script.format(1000), file_bytes=1000)
    assert result["out"] == "written\n"
    more = "import sys; f = open(sys.argv[1], 'wb', 0); f.write(b'x' * 1000); f.write(b'x')"
    result = limited(tmp_path, more, file_bytes=1000)
    assert result["status"] and "File too large" in result["err"]
    assert (tmp_path / "made").stat().st_size == 1000
    hole = "import sys; open(sys.argv[1], 'wb', 0).truncate(1 << 40)"
    assert limited(tmp_path, hole, file_bytes=1000)["status"]


def test_no_more_memory_than_it_may(tmp_path: Path) -> None:
    script = "bytearray({} << 20)"
    assert limited(tmp_path, script.format(100), memory=200 << 20)["status"] == 0
    result = limited(tmp_path, script.format(300), memory=200 << 20)
    assert result["status"] and "MemoryError" in result["err"]
    threads = "import threading, time; threading.stack_size(64 << 20)\nfor _ in range(8):"
    threads += " threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    result = limited(tmp_path, threads, memory=200 << 20)
    assert "can't start new thread" in result["err"]


def test_no_core_is_left_behind(tmp_path: Path) -> None:
    script = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))"
    assert limited(tmp_path, script)["out"] == "(0, 0)\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="has no second kind of system calls")
@pytest.mark.parametrize(
    ("code", "status"),
    [
        (b"\xb8\x14\x00\x00\x00\xcd\x80\xc3", -31),  # getpid as i386: SIGSYS
        (b"\xb8\x27\x00\x00\x40\x0f\x05\xc3", 0),  # as x32: an error
    ],
    ids=["i386", "x32"],
)
def test_the_other_numbers_of_system_calls_are_no_way_around(
    tmp_path: Path, code: bytes, status: int
) -> None:
    script = f"""
import ctypes, mmap
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
page.write({code!r})
call = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print(call())
"""
    result = limited(tmp_path, script)
    assert result["status"] == status, result
    assert result["out"].strip() in ("", "-38")  # ENOSYS


@pytest.mark.parametrize("step", ["drop_rights", "limits", "landlock", "seccomp"])
def test_a_program_is_not_started_where_a_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    require("Landlock")

    def fail() -> None:
        raise OSError(1, "not set")

    if step == "drop_rights":
        monkeypatch.setattr(seccomp, "drop_rights", lambda: fail)
    elif step == "limits":
        monkeypatch.setattr(sandbox, "limits", lambda sandbox: fail)
    elif step == "seccomp":
        monkeypatch.setattr(seccomp, "prepare", lambda sandbox: fail)
    else:
        prepare = landlock.prepare
        monkeypatch.setattr(
            landlock, "prepare", lambda sandbox, env: (prepare(sandbox, env)[0], fail)
        )
    made = tmp_path / "made"
    made.touch()
    box = Sandbox(programs=[Path("/bin/sh")], write=[made])
    argv = ["/bin/sh", "-c", f"echo started > {made}"]
    status, _, err = process.outcome(argv, sandbox=box)
    assert status == -1 and "preexec" in err
    with pytest.raises(PipelineError, match="cannot be started"):
        process.start(argv, sandbox=box)
    assert made.read_text() == ""


def test_the_kernels_refusal_of_rules_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    require("Landlock")
    monkeypatch.setattr(landlock, "RIGHTS", {landlock.abi(): 60})  # rights that nobody knows
    box = Sandbox(programs=[Path("/bin/true")])
    assert process.outcome(["/bin/true"], sandbox=box)[0] == -1
    with pytest.raises(PipelineError, match="cannot be started"):
        process.start(["/bin/true"], sandbox=box)


def test_nothing_stays_open_in_this_process(tmp_path: Path) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    box = Sandbox(programs=[Path("/bin/true")], read=[tmp_path / "none"])
    assert process.outcome(["/bin/true"], sandbox=box)[0] == 0
    assert sorted(Path("/proc/self/fd").iterdir()) == before
