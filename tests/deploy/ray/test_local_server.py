"""The server of a replica: `up` in a process of its own, with a real llama-server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, Doit, wait_for
from ray_tools import left

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.deploy.ray.local_server import LocalServer, own_folder
from pipeline.serve import health

NAME = "chat ü"
# A program that holds a server until it is killed.
OWNER = """
import sys
from pathlib import Path
from pipeline.core.paths import Home
from pipeline.deploy.ray.local_server import LocalServer
home, text, log = sys.argv[1:]
server = LocalServer(Home(Path(home)), "chat ü", text, "", Path(log))
server.start()
server.wait_until_ready()
print("ready", flush=True)
sys.stdin.read()
"""


def text(model: Path, **options: object) -> str:
    """A file with one instance."""
    more = "".join(f"{name} = {value}\n" for name, value in options.items())
    return f'[instance."{NAME}".server]\nmodel = "{model}"\nctx_size = 512\n{more}'


@pytest.fixture
def home(doit: Doit) -> Iterator[Home]:
    yield Home(doit.home)
    assert wait_for(lambda: not left(doit.home), 20)


@pytest.mark.build
def test_it_runs_as_up_runs_it_until_it_is_stopped(home: Home, gguf: Path, tmp_path: Path) -> None:
    log_file = tmp_path / "session" / "server.log"
    log_file.parent.mkdir()
    server = LocalServer(home, NAME, text(gguf), "", log_file)
    try:
        server.start()
        target = server.wait_until_ready()
        assert health.is_ready(target.instance)
        assert target.instance.host == "127.0.0.1"
        assert target.instance.log_file == str(log_file)
        assert "llama-server" in log_file.read_text()
        (process,) = [each for each in left(home.root) if each.name() == "llama-server"]
        process.kill()  # its supervisor starts it again
        wait_for(lambda: (now := server.target()) and not now.is_ready)
        server.require_running()
        assert server.wait_until_ready().is_ready
    finally:
        server.stop()
    assert not health.is_ready(target.instance)
    again = LocalServer(home, NAME, text(gguf), "", log_file)  # in the same folder
    try:
        again.start()
        assert health.is_ready(again.wait_until_ready().instance)
    finally:
        again.stop()


@pytest.mark.build
def test_the_node_s_user_sees_whose_it_is(
    home: Home, doit: Doit, gguf: Path, tmp_path: Path
) -> None:
    """ps names it as the cluster's; down and unload leave it alone, and say where to go."""
    server = LocalServer(home, NAME, text(gguf), "", tmp_path / "x.log")
    try:
        server.start()
        server.wait_until_ready()
        listed = doit("ps")
        assert "replicas of a Ray cluster" in listed.err and NAME in listed.out
        (row,) = doit("ps", "format=json").json()
        assert row["replica"] is True and row["state"] == "ready"
        (file,) = home.root.glob("run/ray/*/*.toml")
        for words in ((), (f"name={NAME}",), (f"config={file}",)):
            refused = doit("down", *words, status=3).err
            assert f"{NAME}: runs here for a Ray cluster" in refused, words
        assert "nothing is up" in doit("unload", f"name={NAME}", status=1).err
        server.require_running()
        assert health.is_ready(server.wait_until_ready().instance)
    finally:
        server.stop()


@pytest.mark.build
def test_what_up_says_of_an_error_is_the_reason(home: Home, gguf: Path, tmp_path: Path) -> None:
    server = LocalServer(home, NAME, text(gguf, ctx_sise=1), "", tmp_path / "x.log")
    try:
        server.start()
        with pytest.raises(PipelineError, match="no --ctx-sise; did you mean ctx_size"):
            server.wait_until_ready()
    finally:
        server.stop()


@pytest.mark.build
def test_it_ends_with_the_process_that_started_it(home: Home, gguf: Path, tmp_path: Path) -> None:
    words = [str(home.root), text(gguf), str(tmp_path / "server.log")]
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, *words],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as owner:
        assert owner.stdout
        assert owner.stdout.readline() == "ready\n"
        assert any(each.name() == "llama-server" for each in left(home.root))
        owner.kill()
    wait_for(lambda: not left(home.root), 20)
    assert not [each for each in psutil.process_iter() if each.pid == owner.pid]


def test_two_replicas_of_an_instance_have_folders_of_their_own(tmp_path: Path) -> None:
    parent = tmp_path / "run" / "ray"
    with own_folder(parent, "chat") as first, own_folder(parent, "chat") as second:
        assert (first.name, second.name) == ("chat-0", "chat-1")
    with own_folder(parent, "chat") as again:  # used again
        assert again == first


def test_a_disk_that_takes_no_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")  # in the way
    with pytest.raises((PipelineError, OSError), match="run"):
        LocalServer(Home(tmp_path), NAME, "", "", tmp_path / "x.log")
