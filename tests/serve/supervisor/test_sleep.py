"""vLLM's sleep mode: who sleeps, who is stopped, and what follows where a call fails."""

from __future__ import annotations

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx2
import psutil
import pytest
from conftest import free_port, wait_for
from msgspec.structs import replace
from supervisor_tools import (
    QUICK,
    Gateway,
    Servers,
    changed,
    lives,
    loads,
    on_demand,
    stand_in,
    states,
)

from pipeline.serve.gateway.settings import GatewaySettings, as_instance
from pipeline.serve.server import VLLM, Server
from pipeline.serve.supervisor import books, client, control
from pipeline.serve.supervisor.sleep import fall_asleep
from pipeline.serve.supervisor.state import DesiredState, Folder, ServerStatus

MB = 1_000_000
CARD = {"gpu0": 100}
NEED = {"ram": 100 * MB, "gpu0": 60}  # of each: the card holds one of them
NEEDS = {"a": NEED}
DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1"}


def sleeper(servers: Servers, name: str, *switches: str, **more: Any) -> Server:
    """A vLLM that may sleep."""
    kept = {"engine": VLLM, "start": "demand", "env": DEV_MODE}
    return stand_in(servers.at.path, name, "--enable-sleep-mode", *switches, **(kept | more))


def up(servers: Servers, *made: Server, memory: dict[str, int] = CARD, **timing: Any) -> None:
    servers.timing = replace(QUICK, **timing)
    assert servers.up(*made, memory=memory, needs=dict.fromkeys((x.name for x in made), NEED)) == {}


def makes_room(servers: Servers, gateway: Gateway, name: str, other: str) -> ServerStatus:
    """A request for `other` comes, and `name` makes room; its status then."""
    gateway.waits(other)
    gateway.has_seen(servers, name)
    servers.until(other, "ready")
    gateway.tells(other)
    assert states(servers)[name] == "asleep"
    return servers.state()[name]


def output(server: Server) -> str:
    """All that it has printed, and what was said of it, over all its starts."""
    file = Path(server.log_file)
    return "".join(each.read_text("utf-8") for each in file.parent.glob(f"{file.stem}*"))


def test_it_sleeps_and_wakes_with_its_process(servers: Servers, gateway: Gateway) -> None:
    weights = 50 * MB
    a, b = (sleeper(servers, name, "--weights", str(weights)) for name in "ab")
    up(servers, a, b)
    loads(servers, gateway, "a")
    pid = servers.state()["a"].pid
    assert pid
    before = psutil.Process(pid).memory_info().rss
    status = makes_room(servers, gateway, "a", "b")
    assert status.pid == pid and lives(pid) and status.ready_at is None
    asleep = wait_for(lambda: books.read(servers.at)["a"].asleep)
    assert asleep["ram"] > before + weights / 2, "its weights are in main memory now"
    row = servers.rows()["a"]
    assert (row.state, row.pid, row.need) == ("asleep", pid, asleep)
    other = makes_room(servers, gateway, "b", "a").pid
    assert servers.state()["a"].pid == pid and other
    assert "POST" not in output(a) and "asked /v1/completions" in output(a), "it was tried"
    assert books.read(servers.at)["a"].load_seconds > 0
    servers.down()
    servers.nothing_left()
    assert not lives(pid) and not lives(other)


@pytest.mark.parametrize(
    ("switches", "env", "words"),
    [
        ((), {}, "/sleep?level=1: status 404"),
        (("--sleep-does", "fail"), DEV_MODE, "/sleep?level=1: status 500: CUDA Error"),
        (("--sleep-does", "hang"), DEV_MODE, "/sleep?level=1: no answer within 0.5 s"),
        (("--sleep-does", "nothing"), DEV_MODE, "/sleep has no effect"),
    ],
)
def test_one_that_does_not_fall_asleep_is_stopped(
    servers: Servers,
    gateway: Gateway,
    switches: tuple[str, ...],
    env: dict[str, str],
    words: str,
) -> None:
    a, b = sleeper(servers, "a", *switches, env=env), sleeper(servers, "b")
    up(servers, a, b, call=0.5)
    for _ in range(2):  # the second time nobody tries
        loads(servers, gateway, "a")
        assert makes_room(servers, gateway, "a", "b").pid is None
        gateway.waits("a")
        gateway.has_seen(servers, "b")
    assert output(a).count(words) == 1


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("fail", "/wake_up: status 500: CUDA Error: out of memory"),
        ("hang", "/wake_up: no answer within 0.5 s"),
        ("die", "(exit status 1|/wake_up: the answer is cut short)"),
    ],
)
def test_one_that_does_not_wake_is_started_again(
    servers: Servers, gateway: Gateway, does: str, words: str
) -> None:
    a, b = sleeper(servers, "a", "--wake-does", does), sleeper(servers, "b")
    up(servers, a, b, call=0.5)
    loads(servers, gateway, "a")
    pid = makes_room(servers, gateway, "a", "b").pid
    assert pid
    gateway.waits("a")
    gateway.has_seen(servers, "b")
    after = servers.until("a", "ready")
    gateway.tells("a")
    assert after.pid not in (pid, None) and not lives(pid)
    assert re.search(f"a: pausing: .*{words}", servers.log())
    gateway.waits("b")
    gateway.has_seen(servers, "a")
    servers.until("b", "ready")
    assert servers.state()["a"].pid is None, "it is not put to sleep once more"


def test_one_that_sleeps_is_stopped_for_main_memory(servers: Servers, gateway: Gateway) -> None:
    a, b = sleeper(servers, "a"), sleeper(servers, "b")
    (c,) = on_demand(servers, "c")
    servers.timing = QUICK
    needs = {"a": NEED, "b": NEED, "c": {"ram": 320 * MB}}
    assert servers.up(a, b, c, memory={**CARD, "ram": 330 * MB}, needs=needs) == {}
    loads(servers, gateway, "a")
    pid = makes_room(servers, gateway, "a", "b").pid
    assert pid and lives(pid)
    gateway.waits("c")
    gateway.has_seen(servers, "b")
    servers.until("c", "ready")
    assert not lives(pid) and servers.state()["a"].pid is None


def test_it_does_not_sleep_where_main_memory_is_short(servers: Servers, gateway: Gateway) -> None:
    a, b = sleeper(servers, "a"), sleeper(servers, "b")
    up(servers, a, b, memory={**CARD, "ram": 150 * MB})
    loads(servers, gateway, "a")
    assert makes_room(servers, gateway, "a", "b").pid is None
    assert "too little memory is left for it to sleep" in output(a)


def test_what_it_will_hold_asleep(tmp_path: Path) -> None:
    """Until that was measured: its weights, as far as they are known."""
    server = stand_in(tmp_path, "a", "--model", "m", engine=VLLM)
    book = books.Books(Folder(tmp_path), Event())
    book.open(DesiredState(config="x", instances=(replace(server, start="demand"),), needs=NEEDS))
    assert book.held_asleep(server) == {"ram": NEED["ram"] + NEED["gpu0"]}
    (tmp_path / "m").mkdir()
    for number in range(2):
        (tmp_path / "m" / f"{number}.safetensors").write_bytes(bytes(10))
    assert book.held_asleep(server) == {"ram": NEED["ram"] + 20}
    (tmp_path / "m" / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert book.held_asleep(server) == {"ram": NEED["ram"] + NEED["gpu0"]}


def test_by_hand_it_is_stopped(servers: Servers, gateway: Gateway) -> None:
    up(servers, sleeper(servers, "a"), sleeper(servers, "b"))
    for name in "ab":  # awake, then asleep
        loads(servers, gateway, "a")
        pid = servers.state()["a"].pid
        if name == "b":
            makes_room(servers, gateway, "a", "b")
        else:
            gateway.tells("a", closed=servers.state()["a"].ready_at)
        assert pid and control.obey(servers.at, ["a"], loads=False) == []
        assert states(servers)["a"] == "asleep" and not lives(pid)
        control.obey(servers.at, ["b"], loads=False)


def test_a_changed_file_and_down_stop_one_that_sleeps(servers: Servers, gateway: Gateway) -> None:
    a, b = sleeper(servers, "a"), sleeper(servers, "b")
    up(servers, a, b)
    loads(servers, gateway, "a")
    pid = makes_room(servers, gateway, "a", "b").pid
    assert pid and servers.up(a, b, memory=CARD, needs=dict.fromkeys("ab", NEED)) == {}
    assert servers.state()["a"].pid == pid and lives(pid), "nothing changed"
    up(servers, changed(a, "--lines", "1"), b)
    assert states(servers) == {"a": "asleep", "b": "ready"} and not lives(pid)


def test_no_probe_reaches_one_that_sleeps(servers: Servers, gateway: Gateway) -> None:
    """It would wait until it wakes."""
    a, b = sleeper(servers, "a", probe_timeout=1.0), sleeper(servers, "b")
    up(servers, a, b, probe_every=0.1)
    loads(servers, gateway, "a")
    pid = makes_room(servers, gateway, "a", "b").pid
    asked = output(a).count("asked")
    time.sleep(0.6)
    assert pid and lives(pid) and output(a).count("asked") == asked
    makes_room(servers, gateway, "b", "a")
    wait_for(lambda: output(a).count("asked") > asked + 1)


def test_it_does_not_fall_asleep_while_it_is_probed(tmp_path: Path) -> None:
    server = stand_in(tmp_path, "a", "--enable-sleep-mode", engine=VLLM)

    def sleeps() -> None:
        with pytest.raises(OSError, match="/sleep"):  # nothing runs there
            fall_asleep(server, 1.0)

    with ThreadPoolExecutor() as pool:
        with client.awake(server) as is_awake:
            ended = pool.submit(sleeps)
            time.sleep(0.3)
            assert is_awake and not ended.done()
        ended.result(30)


def test_one_that_dies_asleep_is_started_by_the_next_request(
    servers: Servers, gateway: Gateway
) -> None:
    up(servers, sleeper(servers, "a"), sleeper(servers, "b"))
    loads(servers, gateway, "a")
    pid = makes_room(servers, gateway, "a", "b").pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: servers.state()["a"].pid is None)
    assert states(servers) == {"a": "asleep", "b": "ready"}
    makes_room(servers, gateway, "b", "a")


def test_without_sleep_mode_it_is_stopped(servers: Servers, gateway: Gateway) -> None:
    made = on_demand(servers, "a", "b", engine=VLLM, env=DEV_MODE)
    up(servers, *made)
    loads(servers, gateway, "a")
    assert makes_room(servers, gateway, "a", "b").pid is None
    assert "/sleep" not in output(made[0])


def test_no_request_reaches_one_that_sleeps(servers: Servers) -> None:
    """Four clients drive two models out of one card in turn, through a real gateway; a request to
    one that sleeps would wait until it wakes."""
    a, b = (sleeper(servers, name, "--lines", "1") for name in "ab")
    entry = as_instance(servers.at, GatewaySettings(port=free_port()))
    up(servers, a, b, entry, patience=0.2)
    answers: list[tuple[str, int]] = []

    def ask(number: int) -> None:
        for turn in range(6):
            name = "ab"[(number + turn) % 2]
            body = {"model": name, "messages": []}
            url = f"{entry.url}/v1/chat/completions"
            answers.append((name, httpx2.post(url, json=body, timeout=60).status_code))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert set(answers) == {("a", 200), ("b", 200)} and len(answers) == 24
    told = output(a) + output(b)
    assert "asked while asleep" not in told and told.count("asked /sleep") > 2, (
        "each was put to sleep"
    )
    assert told.count("line 0") == 2, "each was started once"
