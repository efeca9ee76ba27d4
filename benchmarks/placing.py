"""Which order of making room loads least: the requests of demand.py, simulated, beside its oracle.

    .venv/bin/python benchmarks/placing.py [seconds] [seeds=…] [slower=…]

Nothing is served. `placing.place`, `placing.order` and `placing.pause` decide as in the supervisor,
with one of these as the last use, and with `swap_wait`:

    uses         as the supervisor does
    last use     the last one alone
    minutes      uses, those of two minutes ago for a third
    shares       how often each model is asked for now in truth, which nobody knows

Memory and load times are those that demand.py measured. Each mix of models is tried with some
seeds; `mean`, `median` and `p95` are seconds until an answer. `slower` multiplies the load times.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from demand import CLIENTS, MODELS, PHASE, SHARES, Request, oracle, requests_of
from msgspec.structs import replace

from pipeline.serve import placing
from pipeline.serve.placing import Resident, Waiting

STEP = 0.05  # seconds, as the supervisor's
NEED = {"a": 227, "b": 375, "c": 276, "d": 96, "e": 163, "f": 75}  # MB
LOAD = {"a": 0.8, "b": 0.9, "c": 0.8, "d": 0.4, "e": 0.4, "f": 0.3}  # seconds, while others work
BUDGET = NEED["a"] + NEED["b"] + NEED["e"]
STOP, FIRST, TOKEN = 0.2, 0.1, 0.02  # seconds: to stop a server, to begin an answer, for a token
PHASES = 40  # in the mix where popularity changes
MINUTES = 120.0
NAMED = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
SLOWER = float(NAMED.get("slower", "1"))
LEAVING = ("unloading", "stopping")


@dataclass
class Model:
    name: str
    state: str = "asleep"
    until: float = 0.0  # when it is ready, or has stopped
    last: float = 0.0
    recent: float = 0.0
    uses: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)  # for each phase
    in_flight: int = 0
    waiting: list[tuple[float, int, int]] = field(default_factory=list)  # since, client, tokens


Value = Callable[[Model, float], float]


def minutes(model: Model, now: float) -> float:
    return sum(math.exp((x - now) / MINUTES) for x in model.uses)


ORDERS: dict[str, tuple[Value, float]] = {
    "last use": (lambda model, now: model.last, 0),
    "minutes": (minutes, 0),
    "shares": (lambda model, now: model.shares[int(now // PHASE) % len(model.shares)], 0),
    "uses": (lambda model, now: model.recent, 0),
    "last use, wait 1 s": (lambda model, now: model.last, 1),
    "uses, wait 0.5 s": (lambda model, now: model.recent, 0.5),
    "uses, wait 1 s": (lambda model, now: model.recent, 1),
    "uses, wait 2 s": (lambda model, now: model.recent, 2),
}


def shares(mix: str, seed: int) -> list[list[float]]:
    """The weights of all models, for each phase."""
    chance, exponent = random.Random(f"{mix} {seed}"), {"uniform": 0.0, "zipf": 1.0, "phases": 1.5}
    if mix == "benchmark":
        return [SHARES]
    weights = [1 / (rank + 1) ** exponent[mix] for rank in range(len(MODELS))]
    count = PHASES if mix == "phases" else 1
    return [chance.sample(weights, len(weights)) for _ in range(count)]


class Simulation:
    """One run: `loads`, and for each request when it was sent, its model, and its seconds."""

    def __init__(
        self,
        clients: Sequence[Sequence[Request]],
        phases: Sequence[Sequence[float]],
        value: Value,
        swap_wait: float,
    ) -> None:
        each = zip(MODELS, zip(*phases, strict=True), strict=True)
        self.models = {name: Model(name, shares=[*its]) for name, its in each}
        self.value, self.swap_wait, self.now, self.loads = value, swap_wait, 0.0, 0
        self.results: list[tuple[float, str, float]] = []
        self._ends: list[tuple[float, int, str, float]] = []
        self._left = {number: list(requests) for number, requests in enumerate(clients)}
        self._idle = set(self._left)
        self._making_room: dict[str, list[Model]] = {}
        while any(self._left.values()) or len(self._idle) < len(self._left):
            self._answer()
            self._send()
            self._move()
            self._place()
            self.now += STEP
        self.results.sort()

    def _answer(self) -> None:
        while self._ends and self._ends[0][0] <= self.now:
            at, client, name, sent = heapq.heappop(self._ends)
            self.models[name].in_flight -= 1
            self._use(self.models[name])
            self.results.append((sent, name, at - sent))
            self._idle.add(client)

    def _send(self) -> None:
        for client in sorted(self._idle):
            if self._left[client] and self._left[client][0].at <= self.now:
                request = self._left[client].pop(0)
                self._idle.remove(client)
                model = self.models[request.model]
                model.uses.append(self.now)
                model.waiting.append((self.now, client, request.tokens))

    def _move(self) -> None:
        for model in self.models.values():
            if model.state in ("loading", "stopping") and self.now >= model.until:
                model.state = "ready" if model.state == "loading" else "asleep"
            if model.state == "unloading" and not model.in_flight:
                model.state, model.until = "stopping", self.now + STOP
            if model.state == "ready":
                for sent, client, tokens in model.waiting:
                    end = self.now + FIRST + TOKEN * tokens
                    heapq.heappush(self._ends, (end, client, model.name, sent))
                    model.in_flight += 1
                    self._use(model)
                model.waiting = []

    def _use(self, model: Model) -> None:
        model.last, model.recent = self.now, placing.used_again(model.recent, self.now)

    def _place(self) -> None:
        """As Scheduler._load, in short."""
        residents = [self._resident(each) for each in self.models.values() if _has_memory(each)]
        asleep = [each for each in self.models.values() if not _has_memory(each) and each.waiting]
        waiting = [Waiting(each.name, each.waiting[0][0], len(each.waiting)) for each in asleep]
        for each in placing.order(waiting, self.now):
            if not any(x.state in LEAVING for x in self._making_room.get(each.name, ())):
                self._load(each, residents)
            need = {"ram": NEED[each.name]}
            residents.append(Resident(each.name, need, self.now, is_busy=True))

    def _load(self, wanted: Waiting, residents: list[Resident]) -> None:
        """Load it, or have others make room."""
        need, waited = {"ram": NEED[wanted.name]}, self.now - wanted.since
        placement = placing.place(wanted.name, need, residents, {"ram": BUDGET})
        if placement.hold and waited <= placing.PATIENCE:
            return
        if not (placement.unload or placement.hold):
            model = self.models[wanted.name]
            model.state, model.until = "loading", self.now + LOAD[wanted.name] * SLOWER
            self.loads += 1
        elif placing.pause(wanted, self._recent(placement.unload), self.now, self.swap_wait) <= 0:
            leaving = [self.models[name] for name in (*placement.unload, *placement.hold)]
            for model in leaving:
                model.state = "unloading" if model.state == "ready" else model.state
            self._making_room[wanted.name] = leaving
            names = {model.name for model in leaving}
            residents[:] = [replace(x, is_busy=x.is_busy or x.name in names) for x in residents]

    def _recent(self, names: Sequence[str]) -> list[Resident]:
        """These, with their recent uses, whatever they are ordered by."""
        models = [self.models[name] for name in names]
        return [Resident(x.name, {}, x.recent) for x in models]

    def _resident(self, model: Model) -> Resident:
        value = self.value(model, self.now)
        is_busy = bool(model.in_flight or model.waiting) or model.state != "ready"
        need = {"ram": NEED[model.name]}
        return Resident(model.name, need, value, load_seconds=LOAD[model.name], is_busy=is_busy)


def _has_memory(model: Model) -> bool:
    return model.state != "asleep"


def compare(mix: str, seconds: float, seeds: Sequence[int]) -> None:
    print(f"{mix}:")
    for order, (value, swap_wait) in ORDERS.items():
        loads, fewest, times = 0, 0, list[float]()
        for seed in seeds:
            phases = shares(mix, seed)
            clients = [requests_of(client, seconds, seed, phases) for client in range(CLIENTS)]
            run = Simulation(clients, phases, value, swap_wait)
            loads += run.loads
            fewest += oracle([name for _, name, _ in run.results], NEED, BUDGET)
            times += [taken for _, _, taken in run.results]
        times.sort()
        mean, median = sum(times) / len(times), times[len(times) // 2]
        p95 = times[int(len(times) * 0.95)]
        print(
            f"  {order:<18} {loads:>5} loads, over the oracle's {loads / fewest:.2f}"
            f"  mean {mean:.2f} s  median {median:.2f} s  p95 {p95:.2f} s",
            flush=True,
        )


def main() -> None:
    seconds = float(next((word for word in sys.argv[1:] if "=" not in word), 600))
    for mix in ("benchmark", "zipf", "uniform", "phases"):
        compare(mix, seconds, range(1, 1 + int(NAMED.get("seeds", "5"))))


if __name__ == "__main__":
    main()
