"""What an older version of the pipeline left running or written, and what it writes meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace
from supervisor_tools import Servers, stand_in

from pipeline.core.paths import Home
from pipeline.serve.server import Server
from pipeline.serve.supervisor import control, state
from pipeline.serve.supervisor.state import READY, DesiredState

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

# As supervisors wrote it before a server's files counted.
STATE = """{"pid": PID, "started": STARTED, "asked": 1796099586000000000, "instances": [
{"name": "chat", "state": "ready", "asked": 1796099586000000000, "pid": 32181,
"started": 1796099587.35, "ready_at": 1796099590.64, "load_seconds": 3.0,
"socket": "", "restarts": 0, "reason": "", "problem": "", "retry_at": null, "order": 0}]}"""

# As `up` and `load` wrote it then.
WANTED = """{"config": "/srv/m.toml", "instances": [{"background": true, "gpu_ids": null,
"restart": "on-failure", "max_restarts": 5, "restart_pause": 1.0, "ready_timeout": 600.0,
"stop_timeout": 10.0, "start": "boot", "idle_timeout": 0.0, "pinned": false, "priority": 0,
"name": "chat", "engine": "llama.cpp", "executable": "/srv/bins/linux-x64-cpu/llama-server",
"cmd": ["--model", "/srv/chat.gguf", "--port", "24407"], "env": {"XDG_CONFIG_HOME": "/srv/run/xdg"},
"downloads": false, "sandbox": "auto", "tuned": [], "folder": "/srv", "log_file": "/srv/chat.log",
"host": "127.0.0.1", "port": 24407, "prefix": "", "tls": false, "aliases": [], "kind": "chat",
"api_key_file": "/srv/run/keys/chat.key", "guard": false, "origins": [], "hosts": [],
"probe_timeout": 60.0}], "max_loading": null, "asked": 1796099586000000000, "memory": {},
"needs": {}, "orders": {}, "min_loaded": 0.0, "saved_slots": 0}"""


@pytest.fixture
def old_one(tmp_path: Path) -> state.Folder:
    """What an older supervisor, which runs, has written; this process stands for it."""
    at = state.folder(Home(tmp_path), "/srv/m.toml")
    at.path.mkdir(parents=True, mode=0o700)
    started = psutil.Process().create_time()
    text = STATE.replace("PID", str(os.getpid())).replace("STARTED", repr(started))
    at.state.write_text(text)
    at.wanted.write_text(WANTED)
    return at


def test_an_older_supervisor_is_named(
    old_one: state.Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    control.warn_of_outdated(old_one)
    assert "started by an older version of this project" in capsys.readouterr().err
    now = state.read_state(old_one)
    assert now
    state.write_state(old_one, replace(now, reads=("newer", *Server.__struct_fields__)))
    control.warn_of_outdated(old_one)
    assert not capsys.readouterr().err


def test_up_restarts_no_server_that_an_older_version_started(old_one: state.Folder) -> None:
    """That would be a restart of all servers after each update that counts something new."""
    wanted = state.read_wanted(old_one)
    assert wanted and not wanted.instances[0].contents
    chat = replace(wanted.instances[0], contents="0123456789abcdef")
    now = replace(wanted, instances=(chat,))
    assert control.changes(old_one, now) == [("chat", "keep")]
    longer = replace(chat, cmd=(*chat.cmd, "--ctx-size", "512"))
    again = replace(wanted, instances=(longer,))
    assert control.changes(old_one, again) == [("chat", "restart")]


def test_a_load_by_an_older_version_restarts_nothing(servers: Servers, tmp_path: Path) -> None:
    """It writes all servers anew, without the fields that it does not know."""
    a, b = stand_in(tmp_path, "a", contents="0123456789abcdef"), stand_in(tmp_path, "b")
    servers.up(a)
    before = servers.pids()["a"]
    wanted = json.loads(servers.at.wanted.read_text())
    for server in wanted["instances"]:
        assert server.pop("contents")
    servers.at.wanted.write_text(json.dumps(wanted))
    added = DesiredState(config=wanted["config"], instances=(b,))
    assert not control.up(servers.at, added, report=servers.report, names=["b"])
    servers.until("b", READY)
    assert servers.pids()["a"] == before
    servers.up(a, b)
    assert servers.pids()["a"] == before
    servers.up(replace(a, contents="fedcba9876543210"), b)
    assert servers.pids()["a"] != before
