"""Many processes at once on one home: what each of them does is drawn from a seed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import signal
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from conftest import Doit, free_port, get, post
from forked import Forker
from seeds import new_seed

from pipeline.core.store.artifacts import UNFINISHED
from pipeline.core.store.hashing import sha256

Words = tuple[str, ...]
STOP_SECONDS = 60.0  # for a server to end on SIGINT, on a machine that is far too busy

SMALL = ("ctx_size=256", "threads=1")  # threads that wait for each other want a processor each

# What a command may be refused with because of what others do at the same time.
REFUSALS = re.compile(
    r"is used by .*; nothing was removed"  # a server or a pipeline.lock has it
    r"|another run is under way"
    r"|is not on disk"  # taken away, or not made yet
    r"|there is no such file of it"
    r"|the model is not resolved yet"
    r"|to=previous: there was no other"
    # Taken away while `plan` looked at it; nothing that is being made.
    r"|/[^./][^/\n]* is gone: another run may have removed it"
    r"|/[^./][^/\n]*: cannot be read: No such file"
)
# `up` and `down` of others may come between: what was started is stopped again.
STOPPED = re.compile(r"\w+ is (stopped|failed|waiting|loading|stopping)")


@dataclass
class Report:
    """What happened: how often each command ended with each status, and what must not be."""

    ends: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    served: int = 0
    hashed: int = 0

    @property
    def commands(self) -> int:
        return sum(self.ends.values())


class Crowd:
    """A home, and the processes that work on it."""

    def __init__(
        self,
        doit: Doit,
        models: Mapping[str, Words],
        *,
        config: Path | None = None,
        upgrades: Sequence[str] = (),
        prelude: str = "",
        works: bool = True,
    ) -> None:
        """`models`: the words that name each, by a name for reports. `config`: a file for `up`.
        `upgrades`: what `upgrade to=` goes to. `prelude`: Python that each process runs first.
        `works`: whether locks do."""
        self.doit, self.models, self.config, self.works = doit, models, config, works
        self.upgrades, self.prelude = upgrades, prelude
        self.report = Report()
        self.hashes: dict[str, str] = {}  # of what is published, by its name
        self.answers: dict[str, str] = {}  # of a server, by the name of its model
        self.forker = Forker()
        self.over = threading.Event()

    # What each does

    def plan(self, seed: int, number: int) -> Iterator[Words]:
        """The endless plan of one process. `*` is a server in the foreground."""
        chance = random.Random(f"{seed}/{number}")
        kinds: dict[str, int] = {
            **{"prepare": 4, "plan": 4, "verify": 3, "models": 2, "lock": 1, "unlock": 2},
            **{"clean": 4, "forget": 2, "remove": 4, "prune": 3, "serve": 2},
        }
        if self.config:
            kinds |= {"up": 1, "down": 2, "ps": 2}
        if self.upgrades:
            kinds |= {"upgrade": 1}
        while True:
            (kind,) = chance.choices([*kinds], [*kinds.values()])
            model = self.models[chance.choice([*self.models])]
            if kind in ("prepare", "plan", "verify", "lock", "serve"):
                yield kind, *model
            elif kind in ("clean", "forget"):
                yield kind, chance.choice(("fetch", "convert", "quantize", "resolve")), *model
            elif kind == "remove":
                yield kind, *model, "yes=1"
            elif kind == "prune":
                yield kind, "yes=1"
            elif kind == "upgrade":
                yield kind, f"to={chance.choice(self.upgrades)}", "yes=1"
            elif kind in ("up", "down", "ps"):
                yield kind, f"config={self.config}"
            else:
                yield (kind,)

    # Doing it

    def run(self, plans: Sequence[Iterator[Words]], seconds: float) -> Report:
        """Carry out the plans side by side until the time is over or they end; then all have
        ended."""
        end = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._carry_out, args=(number, plan, end))
            for number, plan in enumerate(plans)
        ]
        watcher = threading.Thread(target=self._watch)
        for thread in (*threads, watcher):
            thread.start()
        for thread in threads:
            thread.join()
        self.over.set()
        watcher.join()
        return self.report

    def _carry_out(self, number: int, plan: Iterator[Words], end: float) -> None:
        folder = self.doit.home.parent / f"user {number}"
        folder.mkdir(exist_ok=True)
        env = {**self.doit.env, "LLAMA_PIPELINE_CWD": str(folder)}
        for count, words in enumerate(plan):
            if time.monotonic() > end:
                return
            try:
                if words[0] == "unlock":
                    (folder / "pipeline.lock").unlink(missing_ok=True)
                    continue
                status, out, err = self.one(words, env)
            except Exception as error:
                self.report.wrong.append(f"process {number}, command {count}, {words}: {error!r}")
                return
            self.report.ends[words[0], status] += 1
            if why := self.judged(words, status, out, err):
                self.report.wrong.append(
                    f"process {number}, command {count}, {' '.join(words)}: {why}, "
                    f"status {status}\n{out[-1500:]}\n{err[-3000:]}"
                )

    def one(self, words: Words, env: Mapping[str, str]) -> tuple[int, str, str]:
        """One command: its exit status and what it printed."""
        if words[0] == "serve":
            return self.serve(words, env)
        return self.forker.run(self.python(words), env, timeout=300)

    def python(self, words: Words) -> Words:
        if not self.prelude:
            return ("-m", "doit", *words)
        go_on = "import runpy; runpy.run_module('doit', run_name='__main__', alter_sys=True)"
        return ("-c", f"{self.prelude}\n{go_on}", *words)

    def serve(self, words: Words, env: Mapping[str, str]) -> tuple[int, str, str]:
        """A server in the foreground: asked once it is ready, then stopped."""
        words = (*words, f"port={free_port()}", "format=json", *SMALL)
        logs = self.doit.home.parent / "printed"
        logs.mkdir(exist_ok=True)
        name = f"{threading.get_ident()}-{time.monotonic_ns()}"
        err_file = logs / f"{name}.err"
        reading, writing = os.pipe()
        with os.fdopen(reading, encoding="utf-8") as printed, err_file.open("w") as err:
            with os.fdopen(writing, "w") as out:
                process = self.forker.start(self.python(words), env, [out.fileno(), err.fileno()])
            try:
                line = printed.readline()
                if line:
                    self.ask(json.loads(line))
                    process.send_signal(signal.SIGINT)
                status = process.wait(STOP_SECONDS)
            finally:
                process.kill()
            rest = printed.read()
        text = err_file.read_text("utf-8", "replace")
        err_file.unlink()
        return status, line + rest, text

    def ask(self, summary: Mapping[str, str]) -> None:
        """A server answers as its file does, and has loaded the one that its summary names."""
        url, name = summary["url"], Path(summary["file"]).name
        with contextlib.suppress(urllib.error.HTTPError):
            loaded = str(get(f"{url}/props").get("model_path", summary["file"]))
            assert loaded == summary["file"], f"serves {loaded}, says {summary['file']}"
        answer = said(url)
        assert answer == self.answers.setdefault(name, answer), f"{name} answers {answer!r}"
        self.report.served += 1

    # What must hold

    def judged(self, words: Words, status: int, out: str, err: str) -> str:
        """What is wrong with how a command ended; empty: nothing."""
        text = out + err
        if "Traceback (most recent" in text or "internal error" in text:
            return "a traceback"
        if status == 0:
            return ""
        if status not in (1, 3):
            return "no such status"
        if not (message := re.search(r"^error: .*", text, re.M)):
            return "no message"
        self.report.refused[f"{words[0]}: {message[0]}"] += 1
        if not self.works or REFUSALS.search(text):
            return ""
        if words[0] == "up" and STOPPED.search(err):
            return ""
        return "no refusal with a name"

    def published(self) -> Iterator[Path]:
        """The models under their final names."""
        models = self.doit.home / "models"
        for path in models.rglob("*"):
            names = path.relative_to(models).parts  # what begins with a dot is being made
            if path.suffix in (".gguf", ".safetensors") and not any(n[0] == "." for n in names):
                yield path

    def look(self, path: Path) -> None:
        """A file under its final name has the bytes that it always has: opened, it stays whole."""
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.report.hashed += 1
            known = self.hashes.setdefault(path.name, digest)
            if known != digest:
                size = os.fstat(file.fileno()).st_size
                self.report.wrong.append(f"{path}: {size} bytes with {digest}, not {known}")

    def _watch(self) -> None:
        while not self.over.wait(0.5):
            with contextlib.suppress(OSError):
                for path in self.published():
                    self.look(path)

    def settled(self) -> None:
        """All is idle: no process, no lock, nothing unfinished; what is there is as its receipt
        says, and each model can be served."""
        if self.config:
            self.doit("down", f"config={self.config}")
        assert processes_of(self.doit.home) == []
        left = [path for path in self.doit.home.rglob("*") if is_unfinished(path)]
        assert left == []
        assert not list((self.doit.home / "run" / "active").glob("*.[jr]*"))
        assert held_locks(self.doit.home) == []
        self.doit("verify")
        for model in self.models.values():
            with self.doit.serving(*model, *SMALL):
                self.ask(self.doit.summary)
        for path in self.published():
            assert sha256(path) == self.hashes.get(path.name, sha256(path))

    def close(self) -> None:
        self.forker.end()


def said(url: str) -> str:
    """What a server answers to a message: the same each time."""
    body = {"prompt": "Once upon a time", "n_predict": 4, "temperature": 0}
    return str(post(f"{url}/completion", body)["content"])


def is_unfinished(path: Path) -> bool:
    return bool(UNFINISHED.fullmatch(path.name)) and path.suffix != ".lock"


def processes_of(home: Path) -> list[str]:
    """The processes that work on a home."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_ours = process.environ().get("LLAMA_PIPELINE_HOME") == str(home)
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid}: {' '.join(process.cmdline())}")
    return found


def held_locks(home: Path) -> list[str]:
    """The files below a home that somebody holds the lock of."""
    held = []
    for path in home.rglob("*.lock"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    held.append(str(path))
    return held


def seeded(count: int, make: Callable[[int, int], Iterator[Words]]) -> list[Iterator[Words]]:
    """The plans of so many processes."""
    seed = new_seed()
    return [make(seed, number) for number in range(count)]
