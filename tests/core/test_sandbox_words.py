"""How bubblewrap and macOS's sandbox-exec are told what a program may touch."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from pipeline.core.sandbox import Sandbox, bubblewrap, policy, seatbelt

pytestmark = pytest.mark.skipif(os.name == "nt", reason="paths of POSIX")


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    """Its paths have what a quoting could stumble over."""
    names = ('in "put', "ba\\ck ü", "made) (allow file-write*", "bin/tool")
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return Sandbox(programs=[paths[3]], read=paths[:2], write=[paths[2]], ports=[8080])


def prefix(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, filter_file: int | None) -> list[str]:
    monkeypatch.setattr(bubblewrap, "program", lambda: "/usr/bin/bwrap")
    return bubblewrap.prefix(sandbox, {}, filter_file)


def pairs(words: list[str], option: str) -> set[str]:
    return {words[n + 1] for n, word in enumerate(words) if word == option}


def test_bubblewraps_words(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    words = prefix(sandbox, monkeypatch, 7)
    assert words[:2] == ["/usr/bin/bwrap", "--unshare-all"]
    assert words[words.index("--seccomp") + 1] == "7"
    assert "--share-net" not in words
    assert {"--die-with-parent", "--new-session"} <= {*words}
    assert words[words.index("--cap-drop") + 1] == "ALL"
    assert pairs(words, "--bind-try") == {str(path) for path in sandbox.write}
    read = pairs(words, "--ro-bind-try")
    assert {*map(str, sandbox.read), str(sandbox.programs[0].parent), "/usr"} <= read
    assert not {"/", "/etc", "/home", "/root", "/dev", "/proc", "/tmp", "/var"} & read
    devices = pairs(words, "--dev-bind-try")
    assert devices == {"/dev/null", "/dev/random", "/dev/urandom"}
    # Last, once nothing has to be made in them any more.
    assert words[-4:] == ["--remount-ro", "/", "--remount-ro", "/proc"]


def test_bubblewrap_leaves_the_network_where_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    words = prefix(Sandbox(programs=[Path("/bin/true")], ports=None), monkeypatch, None)
    assert "--share-net" in words and "--seccomp" not in words


@pytest.mark.parametrize(
    ("script", "is_usable"), [("exit 0", True), ("exit 1", False), ("exec /bin/sleep 20", False)]
)
def test_a_bubblewrap_that_fails_or_hangs_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, is_usable: bool
) -> None:
    stand_in = tmp_path / "bwrap"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bubblewrap, "SECONDS", 0.5)
    bubblewrap.program.cache_clear()
    try:
        assert bubblewrap.program() == (str(stand_in) if is_usable else "")
    finally:
        bubblewrap.program.cache_clear()


def rule(profile: str, what: str) -> str:
    (line,) = (line for line in profile.splitlines() if line.startswith(f"(allow {what}"))
    return line


def balanced(line: str) -> bool:
    """Whether its brackets are, those in quotes left out."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", line)
    return bare.count("(") == bare.count(")") and '"' not in bare


def test_a_profile_of_macos(sandbox: Sandbox) -> None:
    words = seatbelt.prefix(sandbox, {})
    assert words[:2] == ["sandbox-exec", "-p"]
    profile = words[2]
    assert profile.startswith("(version 1)\n(deny default)\n")
    assert all(balanced(line) for line in profile.splitlines())
    quoted = re.findall(r'\(subpath "((?:[^"\\]|\\.)*)"\)', rule(profile, "file-write*"))
    written = {re.sub(r"\\(.)", r"\1", text) for text in quoted}
    assert written == {str(sandbox.write[0].resolve()), "/dev/null"}
    read = rule(profile, "file-read* ")
    for path in (*sandbox.read, *sandbox.write):
        escaped = str(path.resolve()).replace("\\", "\\\\").replace('"', '\\"')
        assert f'(subpath "{escaped}")' in read
    assert '(subpath "/")' not in profile
    assert "iokit-open" not in profile and "(allow network*)" not in profile
    assert '(allow network-bind network-inbound (local tcp "*:8080"))' in profile


@pytest.mark.parametrize(
    ("more", "line"),
    [({"ports": None}, "(allow network*)"), ({"gpus": True}, "(allow iokit-open mach-lookup)")],
)
def test_a_profile_that_allows_more(more: dict[str, object], line: str) -> None:
    profile = seatbelt.prefix(Sandbox(programs=[], **more), {})[2]
    assert line in profile.splitlines()
    assert line not in seatbelt.prefix(Sandbox(programs=[]), {})[2]


def test_a_programs_libraries_are_found_behind_links(tmp_path: Path) -> None:
    """As those of a virtual environment's Python."""
    real, link = tmp_path / "installed/bin/python3", tmp_path / "venv/bin/python"
    for path in (real, link):
        path.parent.mkdir(parents=True)
    real.touch()
    link.symlink_to(real)
    paths = set(policy.with_libraries(link))
    assert {link.parent, real.parent, tmp_path / "installed/lib", tmp_path / "venv/lib"} <= paths
    assert tmp_path / "venv/pyvenv.cfg" in paths
    assert not {tmp_path, tmp_path / "installed", tmp_path / "venv"} & paths


def test_secrets_are_nowhere_in_what_all_may_read() -> None:
    kept = ("/etc/shadow", "/etc/ssh", "/root", "/home/someone", "/var/lib", "/tmp", "/run/secrets")
    for gpus in (False, True):
        box = Sandbox(programs=[Path("/opt/tools/bin/tool")], gpus=gpus)
        allowed = {*policy.executable(box, {}), *policy.readable(box)}
        for secret in map(Path, kept):
            assert not any(secret.is_relative_to(path) for path in allowed), secret
    assert sys.platform != "linux" or Path("/proc") not in policy.readable(Sandbox(programs=[]))


def test_a_program_in_the_home_does_not_open_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sandbox = Sandbox(programs=[tmp_path / "llama-quantize"])
    env = {"LD_LIBRARY_PATH": f".::{tmp_path / 'lib'}:lib"}
    paths = list(policy.executable(sandbox, env))
    assert tmp_path / "llama-quantize" in paths and tmp_path / "lib" in paths
    assert tmp_path not in paths
    assert all(path.is_absolute() for path in paths)
