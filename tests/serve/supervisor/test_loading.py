"""Which servers are loaded: by a request, by hand, and at whose expense."""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from pathlib import Path
from threading import Event

import pytest
from conftest import wait_for
from msgspec.structs import replace
from supervisor_tools import QUICK, Gateway, Servers, loads, on_demand, stand_in, states

from pipeline.core.errors import PipelineError, UsageError
from pipeline.serve.placing import RECENT
from pipeline.serve.supervisor import books, control, usage
from pipeline.serve.supervisor.state import DesiredState, Folder, ServerStatus
from pipeline.serve.supervisor.usage import ServerUse, Usage

# More than a stand-in really takes, so that what is measured changes nothing.
SMALL, LARGE, ALL = {"ram": 100_000_000}, {"ram": 200_000_000}, {"ram": 350_000_000}


def test_a_request_loads_it_and_the_one_used_longest_ago_makes_room(
    servers: Servers, gateway: Gateway
) -> None:
    made = on_demand(servers, "a", "b", "c", "d")
    needs = {"a": SMALL, "b": SMALL, "c": SMALL, "d": LARGE}
    assert servers.up(*made, memory=ALL, needs=needs) == {}
    assert set(states(servers).values()) == {"asleep"} and not servers.running()
    for name in ("b", "a", "c"):
        loads(servers, gateway, name)
    gateway.waits("d")
    for name in ("a", "b"):  # one alone is not enough
        gateway.has_seen(servers, name)
    servers.until("d", "ready")
    assert states(servers) == {"a": "asleep", "b": "asleep", "c": "ready", "d": "ready"}


def test_what_is_pinned_or_busy_stays(servers: Servers, gateway: Gateway) -> None:
    made = [*on_demand(servers, "a", "b", "c"), *on_demand(servers, "p", pinned=True)]
    needs = dict.fromkeys("abcp", SMALL)
    servers.up(*made, memory=ALL, needs=needs)
    for name in ("p", "a", "b"):
        loads(servers, gateway, name)
    gateway.tells("a", in_flight=1, last=1)  # older than b's, but under way
    gateway.waits("c")
    gateway.has_seen(servers, "b")
    servers.until("c", "ready")
    assert states(servers) == {"a": "ready", "b": "asleep", "c": "ready", "p": "ready"}


def test_a_busy_one_is_held_back_once_another_has_waited_for_too_long(
    servers: Servers, gateway: Gateway
) -> None:
    servers.timing = replace(QUICK, patience=1.0)
    servers.up(*on_demand(servers, "a", "b"), memory=LARGE, needs={"a": LARGE, "b": LARGE})
    loads(servers, gateway, "a")
    gateway.tells("a", in_flight=1)
    gateway.waits("b")
    began = time.time()
    status = servers.until("a", "unloading")
    assert time.time() - began > 0.8
    gateway.tells("a", in_flight=1, closed=status.ready_at)
    time.sleep(0.3)
    assert states(servers) == {"a": "unloading", "b": "asleep"}, "its request is still under way"
    gateway.tells("a", closed=status.ready_at)
    servers.until("b", "ready")
    assert states(servers)["a"] == "asleep"


@pytest.mark.parametrize(
    ("often", "order", "is_held"), [(99, 0, True), (1, 0, False), (99, 1, False)]
)
def test_a_request_waits_before_one_that_is_used_often_makes_room(
    servers: Servers, gateway: Gateway, often: int, order: bool, is_held: bool
) -> None:
    """Not where a user has ordered it by hand."""
    made, needs = on_demand(servers, "a", "b"), {"a": LARGE, "b": LARGE}
    servers.up(*made, memory=LARGE, needs=needs, swap_wait=2.0)
    now = time.monotonic()
    loads(servers, gateway, "a", recent=now + RECENT * math.log(often))  # and is idle from now on
    gateway.waits("b")
    began = time.monotonic()
    if order:
        control.order(servers.at, ["b"], loads=True)
    gateway.has_seen(servers, "a")
    assert (time.monotonic() - began > 1.5) == is_held
    servers.until("b", "ready")
    assert states(servers) == {"a": "asleep", "b": "ready"}


def test_of_two_the_one_that_is_used_more_often_stays(servers: Servers, gateway: Gateway) -> None:
    servers.up(*on_demand(servers, "a", "b", "c"), memory=LARGE, needs=dict.fromkeys("abc", SMALL))
    for name, often in (("a", 9), ("b", 1)):  # b was used last
        loads(servers, gateway, name, recent=time.monotonic() + RECENT * math.log(often))
    gateway.waits("c")
    gateway.has_seen(servers, "b")
    servers.until("c", "ready")
    assert states(servers) == {"a": "ready", "b": "asleep", "c": "ready"}


def test_no_request_is_cut_before_the_gateway_knows(servers: Servers, gateway: Gateway) -> None:
    servers.up(*on_demand(servers, "a", "b"), memory=LARGE, needs={"a": LARGE, "b": LARGE})
    loads(servers, gateway, "a")
    gateway.waits("b")
    servers.until("a", "unloading")
    time.sleep(0.5)
    assert states(servers) == {"a": "unloading", "b": "asleep"}, "it may be sending one just now"
    gateway.has_seen(servers, "a")
    servers.until("b", "ready")


def test_idle_ones_are_unloaded_unless_a_request_wants_them_kept(
    servers: Servers, gateway: Gateway
) -> None:
    made = on_demand(servers, "short", "kept", "busy", idle_timeout=0.5)
    servers.up(*made, *on_demand(servers, "at-once"))
    loads(servers, gateway, "busy", in_flight=1)
    loads(servers, gateway, "kept", keep=-1.0)
    loads(servers, gateway, "at-once", keep=0.0)
    loads(servers, gateway, "short")
    for name in ("at-once", "short"):
        gateway.has_seen(servers, name)
        servers.until(name, "asleep")
    time.sleep(0.5)
    assert states(servers)["kept"] == states(servers)["busy"] == "ready"


def test_what_can_never_fit_says_so_before_it_is_asked_for(servers: Servers) -> None:
    made = [*on_demand(servers, "a"), *on_demand(servers, "huge")]
    servers.up(*made, memory=SMALL, needs={"a": SMALL, "huge": LARGE})
    problem = servers.until("huge", "asleep", reason="").problem
    assert problem == "it needs 200.0 MB of ram; models may take 100.0 MB"
    assert not servers.state()["a"].problem
    ((name, status),) = control.obey(servers.at, ["huge"], loads=True)
    assert name == "huge" and status.problem == problem
    assert servers.rows()["huge"].reason == problem


def test_by_hand(servers: Servers) -> None:
    boot = stand_in(servers.at.path, "boot")
    made = [boot, *on_demand(servers, "a"), *on_demand(servers, "wrong")]
    made[-1] = replace(made[-1], cmd=(*made[-1].cmd, "--exit", "3"), restart="never")
    servers.up(*made, memory=LARGE, needs={"boot": LARGE, "a": LARGE, "wrong": SMALL})
    assert states(servers) == {"boot": "ready", "a": "asleep", "wrong": "asleep"}
    assert control.obey(servers.at, ["a"], loads=True) == []
    assert states(servers) == {"boot": "asleep", "a": "ready", "wrong": "asleep"}
    assert control.obey(servers.at, ["a", "boot"], loads=False) == []
    assert not servers.running()
    for _ in range(2):  # one that failed is tried again
        ((name, status),) = control.obey(servers.at, ["wrong"], loads=True)
        assert (name, status.state) == ("wrong", "failed") and "exit status 3" in status.reason
    with pytest.raises(UsageError, match="name=ä: there is no such instance"):
        control.obey(servers.at, ["ä"], loads=True)
    servers.down()
    with pytest.raises(PipelineError, match="nothing is up"):
        control.obey(servers.at, ["a"], loads=True)


def test_one_that_failed_is_tried_again_by_a_request_after_a_growing_pause(
    servers: Servers, gateway: Gateway
) -> None:
    servers.timing = replace(QUICK, first_retry=1.0)
    servers.up(*on_demand(servers, "a", max_restarts=0))
    with socket.create_server(("127.0.0.1", servers.instances[0].port)):
        pauses = []
        for _ in range(2):
            gateway.waits("a")
            failed = servers.until("a", "failed")
            pauses.append((failed.retry_at or 0) - time.monotonic())
            assert "is in use by" in failed.reason
            gateway.tells("a")  # its request was answered
            asleep = servers.until("a", "asleep")
            assert asleep.reason == failed.reason and asleep.retry_at is None
    assert 0 < pauses[0] <= 1 < pauses[1] <= 2
    loads(servers, gateway, "a")
    status = servers.state()["a"]
    assert (status.reason, status.retry_at) == ("", None)
    control.obey(servers.at, ["a"], loads=False)
    gateway.tells("a", closed=status.ready_at)
    with socket.create_server(("127.0.0.1", servers.instances[0].port)):
        gateway.waits("a")
        failed = servers.until("a", "failed")
        assert (failed.retry_at or 0) - time.monotonic() <= 1, "a load that succeeded counts anew"


def test_up_and_load_try_a_failed_one_at_once(servers: Servers, gateway: Gateway) -> None:
    servers.up(*on_demand(servers, "a", max_restarts=0))
    with socket.create_server(("127.0.0.1", servers.instances[0].port)):
        gateway.waits("a")
        servers.until("a", "failed")
        gateway.tells("a")
    assert servers.up(*servers.instances) == {}
    servers.until("a", "asleep", reason="")
    with socket.create_server(("127.0.0.1", servers.instances[0].port)):
        gateway.waits("a")
        servers.until("a", "failed")
        gateway.tells("a")
    assert control.obey(servers.at, ["a"], loads=True) == []


def test_one_that_failed_stays_stopped_after_down(servers: Servers, gateway: Gateway) -> None:
    servers.timing = replace(QUICK, first_retry=1.0)
    servers.up(*on_demand(servers, "a", max_restarts=0), *on_demand(servers, "b"))
    with socket.create_server(("127.0.0.1", servers.instances[0].port)):
        gateway.waits("a")
        servers.until("a", "failed")
    servers.down("a")
    assert servers.state()["a"].retry_at is None
    time.sleep(1.2)
    assert states(servers) == {"a": "stopped", "b": "asleep"}
    servers.down()
    servers.nothing_left()


def test_those_that_up_loads_make_room_too(servers: Servers, gateway: Gateway) -> None:
    servers.up(*on_demand(servers, "a"), memory=LARGE, needs={"a": LARGE})
    loads(servers, gateway, "a")
    gateway.tells("a")
    more = [*servers.instances, stand_in(servers.at.path, "boot")]
    usage.remove(servers.at)  # no gateway any more: nobody to wait for
    assert servers.up(*more, memory=LARGE, needs={"a": LARGE, "boot": LARGE}) == {}
    assert states(servers) == {"a": "asleep", "boot": "ready"}


def test_one_that_up_cannot_load_is_told(servers: Servers) -> None:
    made = [stand_in(servers.at.path, "boot"), *on_demand(servers, "a")]
    failed = servers.up(*made, memory=SMALL, needs={"boot": LARGE, "a": SMALL})
    assert list(failed) == ["boot"] and failed["boot"].problem.startswith("it needs 200.0 MB")
    assert set(states(servers).values()) == {"asleep"}


def test_a_load_is_timed_by_one_clock(tmp_path: Path) -> None:
    """When a process began is told by the kernel's clock, which is off by up to a second."""
    server = stand_in(tmp_path, "a", start="demand")
    book = books.Books(Folder(tmp_path), Event())
    book.open(DesiredState(config="x", instances=(server,), needs={"a": SMALL}))
    status = ServerStatus(name="a", state="ready", started=100.0, ready_at=101.7, load_seconds=1.5)
    book.loaded(server, status)
    assert book.load_seconds("a") == 1.5


def test_what_takes_more_than_was_computed_is_counted_so(
    servers: Servers, gateway: Gateway
) -> None:
    made = on_demand(servers, "a", "b")
    little = {"ram": 1_000_000}
    servers.up(*made, memory={"ram": 30_000_000}, needs={"a": little, "b": little})
    loads(servers, gateway, "a")
    entry = wait_for(lambda: (e := books.read(servers.at)["a"]).measured and e)
    assert entry.need["ram"] > 10_000_000 and entry.load_seconds > 0
    row = servers.rows()["a"]
    assert row.need == entry.need and row.last_use and row.load_seconds == entry.load_seconds
    gateway.waits("b")
    servers.until("b", "ready")
    gateway.tells("b")
    for name in ("a", "b"):  # together they take too much
        if states(servers)[name] == "unloading":
            gateway.has_seen(servers, name)
    wait_for(lambda: "asleep" in states(servers).values())


def test_a_killed_supervisor_leaves_nothing_loaded(servers: Servers, gateway: Gateway) -> None:
    made = on_demand(servers, "a", "b")
    servers.up(*made, memory=ALL, needs={"a": SMALL, "b": SMALL})
    loads(servers, gateway, "a")
    servers.kill_supervisor()
    wait_for(lambda: not servers.running())
    unfinished = [servers.at.path / "slots" / "a" / ".k-0.part", servers.at.usage / ".1.json.part"]
    for file in unfinished:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert servers.up(*made, memory=ALL, needs={"a": SMALL, "b": SMALL}) == {}
    assert set(states(servers).values()) == {"asleep"}
    assert not any(file.exists() for file in unfinished)
    loads(servers, gateway, "b")
    servers.down()
    servers.nothing_left()


def test_a_dead_gateway_is_not_waited_for(servers: Servers, gateway: Gateway) -> None:
    servers.up(*on_demand(servers, "a", "b"), memory=LARGE, needs={"a": LARGE, "b": LARGE})
    loads(servers, gateway, "a")
    gateway.tells("a")
    usage.remove(servers.at)
    dead = Usage(pid=2**22 - 7, started=1.0, servers={"a": ServerUse(in_flight=1)})
    usage.write(servers.at, dead)
    assert control.obey(servers.at, ["b"], loads=True) == []
    assert states(servers) == {"a": "asleep", "b": "ready"}
    assert not list(servers.at.usage.iterdir())


def test_a_crashed_one_is_restarted_and_one_that_ends_well_sleeps(
    servers: Servers, gateway: Gateway
) -> None:
    made = on_demand(servers, "a", "b")
    made[1] = replace(made[1], cmd=(*made[1].cmd, "--exit", "0", "--after", "0.6"))
    servers.up(*made)
    loads(servers, gateway, "a")
    os.kill(servers.state()["a"].pid or 0, signal.SIGKILL)
    wait_for(lambda: servers.state()["a"].restarts == 1)
    servers.until("a", "ready")
    loads(servers, gateway, "b")
    servers.until("b", "asleep")
