"""SIGKILL at any moment while one model makes room for another: the next `up` is right again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
from conftest import free_port, often, wait_for, with_programs
from kills import Kills
from test_demand import MB, Site

from pipeline.serve.supervisor import books, liveness, marker
from pipeline.serve.supervisor.state import (
    ASLEEP,
    LOADING,
    READY,
    STOPPING,
    UNLOADING,
    read_state,
)

pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="signals of POSIX"),
]

NAMES = ("one", "two")
BUDGET = 110 * MB  # each is counted with some 75
VICTIMS = ("supervisor", "server", "group")
SAVING = "saving"  # slots
MOMENTS = (SAVING, STOPPING, LOADING, "any", UNLOADING)


class Pair(Site):
    """Two models of which one fits, that are up."""

    def says(self, name: str) -> str:
        """Its answer, the same each time; with a prompt that is long enough to be worth saving."""
        messages = [{"role": "user", "content": " ".join(f"word {n}" for n in range(40))}]
        answer = self.ask(
            "/v1/chat/completions", name, messages=messages, max_tokens=4, temperature=0
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        return str(answer.json()["choices"][0]["message"]["content"])

    def processes(self) -> dict[str, list[psutil.Process]]:
        """By server those of it; those of the supervisor and its reaper have no name."""
        marked = marker.marked(self.at)
        return {value.partition("/")[2]: found for value, found in marked.items()}

    def models(self) -> dict[str, list[psutil.Process]]:
        return {name: found for name, found in self.processes().items() if name in NAMES}

    def is_at(self, moment: str) -> bool:
        """Whether the swap has come to that moment."""
        if moment == SAVING:
            return any(self.at.path.glob("slots/*/.*.part"))
        state = read_state(self.at)
        return state is not None and moment in [x.state for x in state.instances]

    def kill(self, victim: str, number: int) -> None:
        state = liveness.living(self.at)
        assert state is not None
        if victim == "supervisor":
            psutil.Process(state.pid).kill()
            return
        processes = self.models() if victim == "server" else self.processes()
        every = [process for found in processes.values() for process in found]
        for process in every if victim == "group" else every[number % max(1, len(every)) :][:1]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue  # it has just ended

    def unfinished(self) -> list[Path]:
        """Files that are not whole."""
        return list(self.at.path.rglob("*.part"))

    def require_right(self, expected: dict[str, str]) -> None:
        """Both answer as before, what is written fits what runs, and nothing is left behind."""
        for name in NAMES:
            assert self.says(name) == expected[name]
        assert {name: row["state"] for name, row in self.rows().items() if name in NAMES} == {
            "one": ASLEEP,
            "two": READY,
        }
        (process,) = self.models()["two"]
        assert self.models().keys() == {"two"}
        state = read_state(self.at)
        assert state is not None
        assert {x.name: x.pid for x in state.instances if x.name in NAMES} == {
            "one": None,
            "two": process.pid,
        }
        entries = books.read(self.at)
        assert entries.keys() == set(NAMES)
        assert all(0 < entry.need["ram"] < BUDGET for entry in entries.values())
        assert len(self.processes()[""]) == 2, "one supervisor and one reaper"
        slots = [path.name for path in self.at.path.glob("slots/*/*")]
        assert len(slots) == 2 and all(name.endswith("-0.slot") for name in slots), slots
        assert len(list(self.at.usage.iterdir())) == 1, "of one gateway"


@pytest.fixture
def pair(built: Path, gguf: Path, tmp_path: Path) -> Iterator[Pair]:
    doit = with_programs(built, tmp_path / "hôme of two")
    port, file = free_port(), tmp_path / "two ü.toml"
    lines = [f'[master]\nmemory = "{BUDGET // MB}MB"', f"[gateway]\nenable = true\nport = {port}"]
    lines += ['[instance.control]\nstart = "demand"\nrestart_pause = 0.1']
    lines += [f"[instance.server]\nmodel = '{gguf}'\nctx_size = 512\nthreads = 1\nparallel = 1"]
    for name in NAMES:
        template = f"{name}:{{{{ messages[0].content }}}}"
        lines += [f'[instance.{name}.server]\nport = {free_port()}\nchat_template = "{template}"']
    file.write_text("\n\n".join(lines), encoding="utf-8")
    made = Pair(doit, file, port)
    try:
        yield made
    finally:
        made("down")
    assert not marker.marked(made.at)
    assert not (made.at.path / "slots").exists()


@often(4, 40)
def test_killed_at_any_moment_of_a_swap(pair: Pair, times: int) -> None:
    pair("up")
    expected = {name: pair.says(name) for name in NAMES}
    began = time.monotonic()
    pair.says("one")
    cut: list[tuple[str, str]] = []
    kills = Kills(times, time.monotonic() - began, lambda: len(cut) >= times // 2)
    for number in kills:
        pair.says("one")
        answers: list[int] = []

        def swap(answers: list[int] = answers) -> None:
            try:
                answers.append(pair.ask("/v1/chat/completions", "two", max_tokens=4).status_code)
            except httpx2.HTTPError:
                answers.append(0)  # its gateway was killed

        asking = threading.Thread(target=swap)
        asking.start()
        victim, moment = VICTIMS[number % len(VICTIMS)], MOMENTS[number % len(MOMENTS)]
        while moment != "any" and not answers and not pair.is_at(moment):
            time.sleep(0.0005)
        if moment == "any":
            kills.wait()
        elif moment != SAVING:  # which takes some milliseconds
            time.sleep(kills.chance.uniform(0, 0.05))
        if not answers:
            cut.append((victim, moment))
        print(f"{victim} is killed: {moment}")
        pair.kill(victim, number)
        asking.join(timeout=120)
        assert answers and answers[0] in ((200, 502) if victim == "server" else (0, 200, 502, 503))
        pair("up")
        wait_for(lambda: not pair.unfinished(), 5)
        pair.require_right(expected)
