"""Another llama.cpp, as users switch to it and back: a stand-in's source from a stand-in for
GitHub, built by real CMake, with programs that really run."""

from __future__ import annotations

import json
import os
import pty
import signal
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL
from threading import Thread
from typing import Any

import pytest
from conftest import Doit, Run, chat, wait_for, with_programs
from disks import disk
from fakes import llama_tree, releases
from test_servers import Servers

from pipeline.bins import platform

pytestmark = [pytest.mark.build, pytest.mark.skipif(os.name == "nt", reason="runs scripts")]
TAG = f"{platform.platform_tag()}-cpu"
RENAMED = {"--slot-prompt-similarity": "--slot-prompt-familiarity"[:24]}
NEW, LATER = "b7001", "b7002"


class Upgrades:
    """A home with the pinned programs, and a site that offers others."""

    def __init__(self, doit: Doit, site: releases.Site, built: Path, folder: Path) -> None:
        self.doit, self.site, self.built, self.folder = doit, site, built / TAG, folder
        self.home = doit.home
        doit.env["GITHUB_API_URL"] = site.api

    def offer(self, tag: str, **tree: Any) -> str:
        """A new release; its commit."""
        self.site.add(tag, {})
        return self.site.commit(llama_tree.make(self.folder / tag, self.built, **tree), tag)

    def __call__(self, *words: str, status: int = 0) -> Run:
        return self.doit("upgrade", *words, status=status, timeout=120)

    @property
    def active(self) -> str:
        """The tag of the active one."""
        file = self.home / "bins" / "active.json"
        state = json.loads(file.read_text())["active"] if file.exists() else None
        return str(state["name"]) if state else "pinned"

    def program(self, commit: str = "", name: str = "llama-server") -> Path:
        return self.home / "bins" / commit[:12] / TAG / name


@pytest.fixture
def upgrades(built: Path, tmp_path: Path) -> Iterator[Upgrades]:
    doit = with_programs(built, tmp_path / "mein häus")
    llama_tree.own_sources(doit.home)
    with releases.start() as site:
        yield Upgrades(doit, site, built, tmp_path / "upstream")


def test_there_and_back(upgrades: Upgrades) -> None:
    commit = upgrades.offer(NEW, architectures=("LlamaForCausalLM", "NewForCausalLM"))
    told = upgrades("to=latest")
    assert f"not switched; to switch: doit upgrade to={NEW} yes=1" in told.err
    assert "built llama.cpp" in told.err and f"-> {NEW} {commit[:12]} of 2026-10-10" in told.out
    assert upgrades.active == "pinned" and upgrades.program(commit).exists()

    asked = len(upgrades.site.log)
    told = upgrades(f"to={NEW}", "yes=1", "offline=1")
    assert "built llama.cpp" not in told.err and len(upgrades.site.log) == asked
    assert upgrades.active == NEW
    assert upgrades.program().exists(), "the old programs stay"
    assert upgrades.doit("doctor", "format=json").json()["pipeline"]["llama_cpp"] == commit
    assert upgrades.doit("build_bins").steps == []

    entry = json.loads((upgrades.program(commit).parent / ".state.json").read_text())
    recipe = entry["artifacts"]["llama-server"]["recipe"]
    assert recipe["source"] == {"commit": commit, "tree": upgrades.site.commits[0].tree}

    assert "already active" in upgrades(f"to={commit[:9]}", "yes=1").err
    upgrades("to=previous", "yes=1", "offline=1")
    assert upgrades.active == "pinned"
    assert upgrades.doit("build_bins").steps == []
    upgrades("to=previous", "yes=1", "offline=1")
    assert upgrades.active == NEW
    upgrades("to=pinned", "yes=1", "offline=1")
    assert upgrades.active == "pinned"
    assert "already active" in upgrades("to=pinned").err


def test_what_would_break_is_told_before_the_switch(
    upgrades: Upgrades, gguf: Path, tmp_path: Path
) -> None:
    old, new = next(iter(RENAMED.items()))
    fails = (
        '#!/bin/sh\necho "error loading model: unknown tensor"; echo failed to load model; exit 1'
    )
    upgrades.offer(
        NEW,
        changes={"llama-server": RENAMED},
        scripts={"llama-fit-params": fails},
        architectures=("LlamaForCausalLM", "NewForCausalLM"),
    )
    file = tmp_path / "m.toml"
    key = old[2:].replace("-", "_")
    file.write_text(
        f'[instance.a.server]\nmodel = "{gguf}"\n{key} = 0.5\n'
        f'[instance.b.server]\nmodel = "{gguf}"\nport = 8081\nextra_args = ["{old}", "0.5"]\n'
    )
    words = (f"to={NEW}", "format=json", f"server.{key}=0.5")
    told = json.loads(upgrades(*words, f"config={file}").out)
    assert told["renamed"] == {old[2:]: new[2:]}
    assert told["added"] == [new[2:]] and told["gone"] == []
    refused = "\n".join(told["refused"])
    assert f"m.toml: instance.a.server.{key}: llama-server has no {old}" in refused
    assert f"m.toml: instance.b.extra_args: llama-server has no {old}" in refused
    assert f"server.{key}: llama-server has no {old}" in refused
    assert told["models_failing"] == {str(gguf): ": unknown tensor"}
    assert "NewForCausalLM" in told["architectures_gained"]
    assert upgrades.active == "pinned"
    upgrades.doit.env["AUTO_INFER_LLAMA_CPP_CONFIG"] = str(file)
    assert "refused  " in upgrades(f"to={NEW}").out


@pytest.mark.slow
def test_the_speed_of_both(upgrades: Upgrades, gguf: Path, tmp_path: Path) -> None:
    upgrades.offer(NEW)
    told = json.loads(upgrades(f"to={NEW}", f"model={gguf}", "bench=1", "format=json").out)
    assert told["models_loading"] == [str(gguf)]
    assert [speed["what"] for speed in told["speed"]] == [
        f"{gguf.name}, reading",
        f"{gguf.name}, writing",
    ]
    assert all(speed["before"] > 0 and speed["after"] > 0 for speed in told["speed"])


def test_a_build_that_fails_changes_nothing(upgrades: Upgrades) -> None:
    commit = upgrades.offer(NEW, error="out of ideas")
    told = upgrades("to=latest", "yes=1", status=1)
    assert "out of ideas" in told.err
    broken = upgrades.offer(LATER, scripts={"llama-server": "#!/bin/sh\nexit 1"})
    told = upgrades("to=latest", "yes=1", status=1)
    assert "--version" in told.err
    assert not upgrades.program(commit).exists() and not upgrades.program(broken).exists()
    assert upgrades.active == "pinned" and upgrades.doit("build_bins").steps == []


def test_a_build_that_is_killed_is_taken_up_again(upgrades: Upgrades) -> None:
    commit = upgrades.offer(NEW, seconds=0.3)
    work = upgrades.home / "bins" / ".build" / commit[:12] / TAG
    with upgrades.doit.start("upgrade", "to=latest", "yes=1", stdin=DEVNULL) as process:
        wait_for(lambda: list(work.glob("bin/llama-*")))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert upgrades.active == "pinned" and not upgrades.program(commit).exists()
    assert upgrades.doit("build_bins").steps == []
    upgrades("to=latest", "yes=1")
    assert upgrades.active == NEW and upgrades.program(commit).exists()


def test_what_is_being_built_is_not_pruned(upgrades: Upgrades) -> None:
    commit = upgrades.offer(NEW, seconds=0.3)
    work = upgrades.home / "bins" / ".build" / commit[:12] / TAG
    with upgrades.doit.start("upgrade", "to=latest", "yes=1", stdin=DEVNULL) as process:
        wait_for(lambda: list(work.glob("bin/llama-*")))
        assert "another run is under way" in upgrades.doit("prune", "yes=1", status=1).err
        process.communicate(timeout=60)
    assert upgrades.active == NEW and upgrades.program(commit).exists()


def test_two_at_once(upgrades: Upgrades) -> None:
    commit = upgrades.offer(NEW, seconds=0.1)
    runs: list[Run] = []
    threads = [Thread(target=lambda: runs.append(upgrades(f"to={NEW}", "yes=1"))) for _ in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 2 and sum("built llama.cpp" in run.err for run in runs) == 1
    assert upgrades.active == NEW and upgrades.program(commit).exists()
    state = json.loads((upgrades.home / "bins" / "active.json").read_text())
    assert state["previous"] is None, "not itself"


@pytest.mark.parametrize(("answer", "active"), [("y\n", NEW), ("\n", "pinned"), ("\x04", "pinned")])
def test_at_a_terminal_it_asks(upgrades: Upgrades, answer: str, active: str) -> None:
    upgrades.offer(NEW)
    ours, theirs = pty.openpty()
    with upgrades.doit.start("upgrade", "to=latest", stdin=theirs) as process:
        assert process.stderr
        heard = ""
        while "[y/N]" not in heard:
            heard += process.stderr.read(1)
        os.write(ours, answer.encode())
        process.communicate(timeout=60)
        assert process.returncode == 0
    os.close(ours)
    os.close(theirs)
    assert upgrades.active == active


def test_dry_run_wins(upgrades: Upgrades) -> None:
    upgrades.offer(NEW)
    assert "not switched" in upgrades("to=latest", "yes=1", "dry_run=1").err
    assert upgrades.active == "pinned"


@pytest.mark.parametrize(
    ("words", "env", "status", "said"),
    [
        ([], {}, 3, "no llama.cpp given; active is pinned"),
        (["to=b6"], {}, 3, "llama.cpp has no such tag, branch or commit"),
        (["to=../x"], {}, 3, "to=../x: must be latest"),
        (["to=previous"], {}, 3, "there was no other llama.cpp"),
        (["to=latest", "offline=1"], {}, 3, "take what is here: only the pinned one"),
        (["to=latest"], {"GITHUB_API_URL": "http://127.0.0.1:9"}, 1, "check the network"),
        (["to=latest", "bins=package"], {}, 3, "install_package"),
        (["to=latest", "bins=prebuilt", "release=b1"], {}, 3, "contradict"),
        (["to=latest"], {"LLAMA_SERVER_BINS_DIR": "/x"}, 3, "programs of your own"),
        (["to=latest", "frozen=1"], {}, 3, "pins llama.cpp c1"),
        (["to=latest"], {"CXX": "/no/such/compiler", "PATH": "/usr/sbin"}, 1, "no C++ compiler"),
    ],
)
def test_what_cannot_be_is_refused(
    upgrades: Upgrades,
    tmp_path: Path,
    words: list[str],
    env: dict[str, str],
    status: int,
    said: str,
) -> None:
    upgrades.offer(NEW)
    (tmp_path / "pipeline.lock").write_text(
        'schema = 1\n[[model]]\nname = "m"\nkind = "gguf"\nprecision = "F16"\n'
        'asked.model = "m"\nsource.type = "file"\nfiles = [{ name = "m" }]\n'
        'llama_cpp.commit = "c1"\n'
    )
    upgrades.doit.env |= {"LLAMA_PIPELINE_CWD": str(tmp_path), **env}
    assert said in upgrades(*words, status=status).err
    assert upgrades.active == "pinned"
    assert not (upgrades.home / "bins" / ".build").exists()


def test_a_damaged_choice_is_an_error_until_it_is_made_again(upgrades: Upgrades) -> None:
    upgrades.offer(NEW)
    (upgrades.home / "bins" / "active.json").write_text('{"active": {"commit"')
    told = upgrades.doit("build_bins", status=1)
    assert "active.json: cannot be read" in told.err and "upgrade to=pinned" in told.err
    assert "active.json: cannot be read" in upgrades(f"to={NEW}", "yes=1", status=1).err
    upgrades("to=pinned", "yes=1")
    assert upgrades.active == "pinned" and upgrades.doit("build_bins").steps == []


def test_a_small_disk_and_one_that_cannot_be_written(bare: Doit, tmp_path: Path) -> None:
    tree = llama_tree.make(tmp_path / "tree", tmp_path)
    with releases.start() as site, disk(bare.home, "size=16m") as remount:
        site.add(NEW, {})
        site.commit(tree, NEW)
        bare.env["GITHUB_API_URL"] = site.api
        assert "are needed there" in bare("upgrade", "to=latest", status=1).err
        asked = len(site.log)
        remount("ro")
        assert "cannot be written to" in bare("upgrade", "to=latest", status=1).err
        assert len(site.log) == asked


@pytest.fixture
def servers(upgrades: Upgrades, tmp_path: Path) -> Iterator[Servers]:
    servers = Servers(upgrades.doit, tmp_path)
    yield servers
    upgrades.doit("down", servers.config, status=None)
    assert servers.processes() == []


@pytest.mark.slow
def test_servers_keep_the_old_programs_until_told(
    upgrades: Upgrades, servers: Servers, gguf: Path
) -> None:
    commit = upgrades.offer(NEW)
    port = servers.chat("chat", gguf)
    servers.up()
    url, before = f"http://127.0.0.1:{port}", servers.ps()["chat"]["pid"]
    said: list[str] = []
    asking = [True]

    def ask() -> None:
        while asking:
            said.append(chat(url))

    def executable() -> str:
        return str(Path(f"/proc/{servers.ps()['chat']['pid']}/exe").readlink())

    thread = Thread(target=ask)
    thread.start()
    try:
        told = upgrades(f"to={NEW}", "yes=1")
        assert "chat: up, with the old programs until restarted" in told.err
        count = len(said)
        wait_for(lambda: len(said) > count + 1)
    finally:
        asking.clear()
        thread.join()
    assert len(set(said)) == 1
    assert servers.ps()["chat"]["pid"] == before
    assert executable() == str(upgrades.program())

    os.kill(before, signal.SIGKILL)  # what is started anew is what was up
    wait_for(lambda: servers.ps()["chat"]["pid"] not in (before, None))
    assert executable() == str(upgrades.program())

    changes = upgrades.doit("up", servers.config, "dry_run=1").out.split()
    assert changes == ["chat", "restart"]
    servers.up()
    assert executable() == str(upgrades.program(commit)) and chat(url) == said[0]
    upgrades("to=previous", "yes=1")
    assert executable() == str(upgrades.program(commit))
    servers.up()
    assert executable() == str(upgrades.program()) and chat(url) == said[0]
