"""Which servers are loaded: those that requests or users want, as far as memory allows.

This collects the numbers from which `placing` decides which server makes room for which, and has
the runners act on it. A server that is to make room first gets no new requests: see usage.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from threading import Event

from msgspec.structs import replace

from pipeline.serve import placing
from pipeline.serve.placing import Bytes, Placement, Resident, Waiting
from pipeline.serve.server import DEMAND, GATEWAY

from . import client, sleep
from .books import Books
from .child import Child
from .memory import FreeMemory, in_use
from .policy import Timing
from .runner import Runner
from .state import (
    ASLEEP,
    ENDED,
    EXITED,
    FAILED,
    LOADING,
    READY,
    STOPPING,
    UNLOADING,
    WAITING,
    DesiredState,
    Folder,
)
from .usage import Gateways, ServerUse, idle_limit

TICK_SECONDS = 0.05  # between two readings of the gateways' reports
SHORT_SECONDS = 5.0  # memory that others hold may be free again by then
PROBE_SECONDS = 1.0  # for a server to tell whether it is busy

Runners = Mapping[str, Runner]


class Scheduler:
    """Loads and unloads the servers of one supervisor. Times are those of time.monotonic()."""

    def __init__(self, at: Folder, timing: Timing, news: Event) -> None:
        self._timing = timing
        self._books, self._machine, self._gateways = Books(at, news), FreeMemory(), Gateways(at)
        self._uses: dict[str, ServerUse] = {}
        self._making_room: dict[str, list[str]] = {}  # by server: who unloads for it
        self._calls: dict[str, sleep.SleepCall] = {}  # by server that falls asleep, or wakes

    def step(self, wanted: DesiredState, runners: Runners) -> None:
        """Move on: take up orders, unload what is idle, make room for what is waited for."""
        now = time.monotonic()
        mine = {
            name: runner for name, runner in runners.items() if runner.instance.engine != GATEWAY
        }
        self._gateways.read()
        self._uses = {name: self._gateways.use(name) for name in mine}
        self._books.open(wanted)
        for runner in mine.values():
            self._follow(runner)
        self._books.settle()
        self._take_orders(wanted, mine, now)
        for runner in mine.values():
            if self._is_idle(runner, now):
                self._unload(runner, now)
            if runner.status.state == UNLOADING:
                self._end_unloading(runner, mine, wanted, now)
        self._load(wanted, mine, now)

    def tick(self, wanted: DesiredState) -> float:
        """Seconds until the next step."""
        return min(self._timing.tick, TICK_SECONDS) if wanted.unloads else self._timing.tick

    def _follow(self, runner: Runner) -> None:
        """Enter a finished load; one that ended well by itself is loaded again at a request, and
        one that failed after a pause."""
        self._take_up_call(runner)
        state = runner.status.state
        is_new = state == WAITING and not runner.claim.is_granted
        if runner.instance.start == DEMAND and (is_new or state == EXITED):
            runner.amend(state=ASLEEP)
        retry_at = runner.status.retry_at
        if state == FAILED and retry_at and time.monotonic() >= retry_at:
            runner.amend(state=ASLEEP, retry_at=None)
        if state == READY:
            self._books.loaded(runner.instance, runner.status)
        if state == READY or state in ENDED:
            runner.claim.wanted_since = None
        if runner.status.state == ASLEEP or state in ENDED:
            runner.claim.is_granted = False

    def _take_orders(self, wanted: DesiredState, runners: Runners, now: float) -> None:
        for name, order in wanted.orders.items():
            runner = runners.get(name)
            if runner is None or runner.unwanted or runner.status.order >= order.number:
                continue
            runner.amend(order=order.number)
            if order.loads:
                runner.claim.wanted_since = now
                runner.failures = 0
                if runner.is_over:
                    runner.amend(state=ASLEEP, reason="", restarts=0, retry_at=None)
            else:
                runner.claim.wanted_since = None
                self._unload(runner, now, ends=True)

    # Unloading

    def _is_idle(self, runner: Runner, now: float) -> bool:
        """Whether it has had no request for too long."""
        if runner.status.state != READY or self._is_busy(runner):
            return False
        use = self._uses[runner.instance.name]
        limit = idle_limit(runner.instance, use, was_used=use.last >= runner.ready_since)
        return limit is not None and now - self._last_use(runner) >= limit

    def _is_busy(self, runner: Runner) -> bool:
        use = self._uses[runner.instance.name]
        return bool(use.in_flight or use.waiting) or runner.status.state in (WAITING, LOADING)

    def _last_use(self, runner: Runner) -> float:
        return max(self._uses[runner.instance.name].last, runner.ready_since)

    def _unload(self, runner: Runner, now: float, *, ends: bool = False) -> None:
        """Give it no more requests; without a process it is unloaded already. One that sleeps is
        stopped, and with `ends` it does not fall asleep."""
        state = runner.status.state
        runner.claim.ends = ends or state == LOADING or (state == UNLOADING and runner.claim.ends)
        if state == ASLEEP and runner.child:
            runner.ask_to_stop(time.monotonic())
        if runner.is_over or _is_leaving(runner) or state == ASLEEP:
            return
        self._books.measure(runner.instance, runner.status)
        runner.claim.unloading_since = now
        runner.unloads, runner.failures = runner.child is not None, 0
        runner.amend(state=UNLOADING if runner.child else ASLEEP)

    def _end_unloading(
        self, runner: Runner, runners: Runners, wanted: DesiredState, now: float
    ) -> None:
        """Once it has answered all requests, have it fall asleep if it can; else stop it, once its
        conversations are saved."""
        name, child, claim = runner.instance.name, runner.child, runner.claim
        may_sleep = not (claim.ends or claim.cannot_sleep)
        if child is None or (may_sleep and name in self._calls) or not self._has_left(runner, now):
            return
        if may_sleep and client.can_sleep(runner.instance):
            if self._fits_asleep(runner, runners, wanted):
                self._call(sleep.fall_asleep, runner, child)
                return
            child.log("is stopped: too little memory is left for it to sleep")
        if child.slots.are_saved(wanted.saved_slots):
            runner.ask_to_stop(time.monotonic())

    def _has_left(self, runner: Runner, now: float) -> bool:
        """Whether it has answered all requests, those that no gateway knows among them."""
        name, seconds = runner.instance.name, now - runner.claim.unloading_since
        if not self._gateways.have_left(name, runner.status.ready_at, seconds):
            return False
        activity = client.activity(runner.instance, PROBE_SECONDS)
        return not (activity and activity.busy)

    def _fits_asleep(self, runner: Runner, runners: Runners, wanted: DesiredState) -> bool:
        """Whether what it holds asleep leaves room for the server that it is unloaded for."""
        name, held = runner.instance.name, self._books.held_asleep(runner.instance)
        gainer = next((x for x, leaving in self._making_room.items() if name in leaving), "")
        staying = [Resident(name, held, 0, is_busy=True)]
        free = _without(self._machine.free(), held)
        for other, each in runners.items():
            if _is_leaving(each):
                free = _with(free, self._books.need(other))
            elif self._is_loaded(each):
                staying.append(self._resident(each))
        need = self._books.need(gainer)
        return placing.place(gainer, need, staying, wanted.memory, free).is_at_once

    def _call(self, act: sleep.Act, runner: Runner, child: Child) -> None:
        instance = runner.instance
        self._calls[instance.name] = sleep.SleepCall(act, instance, child, self._timing.call)

    def _take_up_call(self, runner: Runner) -> None:
        """What follows once a server has fallen asleep or is awake, or could not. One that cannot
        wake is started again."""
        name, state, child = runner.instance.name, runner.status.state, runner.child
        call = self._calls.get(name)
        if call and call.child is not child:  # it has ended meanwhile
            del self._calls[name]
            runner.claim.cannot_sleep |= not call.child.stop_requested
            return
        if call is None or child is None or not call.is_over:
            return
        del self._calls[name]
        child.log(f"{call.name}: {call.error or 'done'}")
        runner.claim.cannot_sleep |= bool(call.error)
        if state == LOADING and call.error:
            runner.give_up(call.error, time.monotonic())
        elif state == LOADING:
            child.observed = READY
        elif state == UNLOADING and not (call.error or runner.claim.ends):
            self._books.measure(runner.instance, runner.status, is_asleep=True)
            runner.amend(state=ASLEEP, ready_at=None)

    # Loading

    def _load(self, wanted: DesiredState, runners: Runners, now: float) -> None:
        """Load those that are waited for, each in its turn, or make room for them. What one is
        given, or waits for, is not there for those after it."""
        budget = wanted.memory
        residents = [self._resident(each) for each in runners.values() if self._is_loaded(each)]
        staying = [each for each in residents if not _is_leaving(runners[each.name])]
        excess = placing.place("", {}, staying, budget)  # a server took more than was computed
        for name in excess.unload:
            self._unload(runners[name], now)
        waiting = self._waiting(runners, now)
        free = self._free(wanted, runners) if waiting else {}
        self._note_problems(budget, runners, residents, waiting)
        # Once all that left for it are gone, it is placed anew.
        self._making_room = {
            name: still
            for name, leaving in self._making_room.items()
            if name in waiting and (still := [x for x in leaving if _is_leaving(runners[x])])
        }
        for each in placing.order(list(waiting.values()), now, self._timing.patience):
            runner, need = runners[each.name], self._books.need(each.name)
            if each.name not in self._making_room:
                free_for_it = _with(free, self._held(runner))
                placement = placing.place(each.name, need, residents, budget, free_for_it)
                if self._has_to_wait(runner, each, placement, residents, wanted.swap_wait, now):
                    continue
                if placement.is_at_once:
                    self._grant(runner)
                    free = _without(free_for_it, need)
                leaving = self._make_room(placement, runners, now)
                self._making_room[each.name] = leaving
                residents = [replace(x, is_busy=x.is_busy or x.name in leaving) for x in residents]
            residents = [x for x in residents if x.name != each.name]  # if it sleeps
            residents.append(Resident(each.name, need, now, is_busy=True))

    def _has_to_wait(
        self,
        runner: Runner,
        waiting: Waiting,
        placement: Placement,
        residents: Sequence[Resident],
        swap_wait: float,
        now: float,
    ) -> bool:
        """Whether it cannot be loaded, or those that are in its way keep their memory for now: busy
        ones until patience ends, often used ones for a moment, but not where a user ordered it."""
        if placement.problem:
            self._refuse(runner, placement.problem, now)
            return True
        runner.claim.short_since = None
        if placement.hold and now - waiting.since <= self._timing.patience:
            return True
        if runner.claim.wanted_since is not None:
            return False
        leaving = [x for x in residents if x.name in placement.unload]
        return placing.pause(waiting, leaving, now, swap_wait) > 0

    def _make_room(self, placement: Placement, runners: Runners, now: float) -> list[str]:
        """Unload what is in its way; returns the names. What is not ready yet cannot leave yet."""
        ready = [name for name in placement.hold if runners[name].status.state == READY]
        leaving = [*placement.unload, *ready]
        for name in leaving:
            self._unload(runners[name], now)
        return leaving

    def _grant(self, runner: Runner) -> None:
        """Have it loaded: woken where it sleeps, else started."""
        runner.claim.is_granted, state = True, WAITING
        if child := runner.child:
            runner.begin(time.monotonic())
            child.observed, state = "", LOADING
            self._call(sleep.wake_up, runner, child)
        runner.amend(state=state, problem="", reason="")

    def _refuse(self, runner: Runner, problem: str, now: float) -> None:
        """Say that it cannot be loaded, unless that may pass: memory that others hold, also what
        just ended, may be free again soon."""
        runner.claim.short_since = runner.claim.short_since or now
        if now - runner.claim.short_since > SHORT_SECONDS:
            runner.amend(state=ASLEEP, problem=problem)

    def _note_problems(
        self,
        budget: Bytes,
        runners: Runners,
        residents: Sequence[Resident],
        waiting: Mapping[str, Waiting],
    ) -> None:
        """Say of each that is not loaded whether it can ever be, before anybody asks for it."""
        pinned = [each for each in residents if each.is_pinned]
        for name, runner in runners.items():
            if not _lacks_memory(runner):
                continue
            problem = placing.place(name, self._books.need(name), pinned, budget).problem
            if problem or name not in waiting:
                runner.claim.short_since = None
                state = ASLEEP if problem else runner.status.state
                runner.amend(state=state, problem=problem)

    def _waiting(self, runners: Runners, now: float) -> dict[str, Waiting]:
        """Who is waited for, by requests, by a user, or since `up`."""
        waiting: dict[str, Waiting] = {}
        for name, runner in runners.items():
            use, claim = self._uses[name], runner.claim
            if not _lacks_memory(runner):
                continue
            if runner.status.state == WAITING:
                claim.wanted_since = claim.wanted_since or now
            since = [use.since] if use.waiting else []
            since += [claim.wanted_since] if claim.wanted_since else []
            if since:
                count, priority = max(1, use.waiting), runner.instance.priority
                waiting[name] = Waiting(name, min(since), count, priority)
        return waiting

    def _is_loaded(self, runner: Runner) -> bool:
        """Whether it has its memory, or has been given it."""
        state = runner.status.state
        if state == WAITING:
            return runner.claim.is_granted
        return state not in ENDED and (state != ASLEEP or runner.child is not None)

    def admits(self, runner: Runner) -> bool:
        """Whether it is to be started now: it waits for that, and has been given its memory."""
        is_granted = runner.instance.engine == GATEWAY or runner.claim.is_granted
        return runner.status.state == WAITING and is_granted

    def _held(self, runner: Runner) -> Bytes:
        """The memory that the process of a sleeping server keeps."""
        sleeps = runner.child and runner.status.state == ASLEEP
        return self._books.held_asleep(runner.instance) if sleeps else {}

    def _resident(self, runner: Runner) -> Resident:
        instance, is_leaving = runner.instance, _is_leaving(runner)
        return Resident(
            name=instance.name,
            need=self._held(runner) or self._books.need(instance.name),
            last_use=max(self._uses[instance.name].recent, self._last_use(runner)),
            load_seconds=self._books.load_seconds(instance.name),
            priority=instance.priority,
            is_pinned=instance.pinned and not is_leaving,
            is_busy=is_leaving or (runner.status.state != ASLEEP and self._is_busy(runner)),
        )

    def _free(self, wanted: DesiredState, runners: Runners) -> Bytes:
        """What the machine says is free, less what those that load will still take."""
        if not wanted.unloads:
            return {}
        free = dict(self._machine.free())
        for name, runner in runners.items():
            state, pid = runner.status.state, runner.status.pid
            if state == LOADING or (state == WAITING and runner.claim.is_granted):
                used = in_use(pid) if pid else {}
                for device, need in self._books.need(name).items():
                    if device in free:
                        free[device] -= max(0, need - used.get(device, 0))
        return free


def _with(free: Bytes, back: Bytes) -> dict[str, int]:
    """What is free once so much is given back."""
    return {device: count + back.get(device, 0) for device, count in free.items()}


def _without(free: Bytes, taken: Bytes) -> dict[str, int]:
    """What is free once so much is taken."""
    return {device: count - taken.get(device, 0) for device, count in free.items()}


def _lacks_memory(runner: Runner) -> bool:
    """Whether it is not loaded, and has not been given its memory."""
    return runner.status.state in (ASLEEP, WAITING) and not runner.claim.is_granted


def _is_leaving(runner: Runner) -> bool:
    return runner.status.state in (UNLOADING, STOPPING)
