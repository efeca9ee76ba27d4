"""What the tests share: a home of their own, doit as users run it, and real parts made once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import pytest
from workers import free_port as free_port
from workers import shared

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

pytest_plugins = [
    "browsing",
    "client_tools",
    "supervisor_tools",
    "engines",
    "figures",
    "images",
    "parallel",
    "quality_tools",
    "twins",
    "vulkan_sdk",
]

# A shell starts background jobs with SIGINT ignored, nohup does it with SIGHUP, and programs hand
# that on.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Nothing that the user's shell sets may reach the programs under test.
for name in list(os.environ):
    if name.startswith(("HF_", "LLAMA_ARG_", "LLAMA_SERVER_")) or name in (
        "LLAMA_PIPELINE_HOME",
        "LLAMA_PIPELINE_CWD",
        "LLAMA_PIPELINE_COMMAND",
        "PYTHONDONTWRITEBYTECODE",  # they are started a thousand times
        "PYTHONUNBUFFERED",  # users have it as rarely
    ):
        del os.environ[name]


# Workers share the processors: a thread of llama.cpp or torch that spins until the others have done
# their part takes the time that these need. On a busy machine the same answer then takes nine times
# as much of the processor.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Left out unless `-m` names them: of no use everywhere, or long.
BY_NAME = ("gpu", "network", "hostile", "long", "trust")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    expression = str(config.option.markexpr)
    unnamed = [name for name in BY_NAME if name not in re.findall(r"\w+", expression)]
    out = [item for item in items if any(map(item.get_closest_marker, unnamed))]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


OWN_PORT = ("port=", "profile=", "config=", "--")  # who says so has a port of its own


@dataclass(frozen=True)
class Run:
    """A finished doit: its exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def steps(self) -> list[str]:
        """The steps that were run, not the ones that were up to date."""
        return [line[3:] for line in self.err.splitlines() if line.startswith(".  ")]

    def json(self) -> Any:
        return json.loads(self.out)


class Doit:
    """doit on one home, as a user runs it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = {**os.environ, "LLAMA_PIPELINE_HOME": str(home)}
        self.summary: Any = {}  # of the server that was started last

    def command(self, *words: str) -> list[str]:
        if words[:1] == ("serve",) and not any(w.startswith(OWN_PORT) for w in words):
            words += (f"port={free_port()}",)  # another test may serve on the default one
        return [sys.executable, "-m", "doit", *words]

    def start(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        """doit in a session of its own, so that a test can signal it like a terminal."""
        return subprocess.Popen(
            self.command(*words),
            cwd=REPOSITORY,
            env=self.env,
            text=True,
            encoding="utf-8",
            start_new_session=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
        )

    def __call__(self, *words: str, status: int | None = 0, timeout: float = 1500) -> Run:
        """Run to the end; the exit status must be `status` unless that is None."""
        run = Run(*forked.run(self.command(*words)[1:], self.env, timeout))
        if status is not None:
            assert run.status == status, f"{words}: {run.status}\n{run.out}\n{run.err}"
        return run

    @contextmanager
    def serving(self, *words: str) -> Iterator[str]:
        """A server that is ready; yields its URL. It must end well when asked to."""
        port, logs = free_port(), self.home / "logs"
        logs.mkdir(exist_ok=True)
        command = self.command("serve", *words, f"port={port}", "format=json")
        printed, out = os.pipe()
        with os.fdopen(printed, encoding="utf-8") as summary:
            # A file: unread, a full pipe would stop the server.
            with (logs / f"serve-{port}.err").open("w") as err, os.fdopen(out, "w") as out_file:
                process = forked.start(command[1:], out_file.fileno(), err.fileno(), self.env)
            try:
                line = summary.readline()
                assert line, (logs / f"serve-{port}.err").read_text()
                self.summary = json.loads(line)
                yield self.summary["url"]
                process.send_signal(signal.SIGINT)
                assert process.wait(timeout=15) == 0
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, "the port is not free"


# How a program in Python begins, where the path of Python may hold blanks: the shell runs the
# second line, for Python it is a text.
SHEBANG = f'#!/bin/sh\n"exec" "{sys.executable}" "$0" "$@"'


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def chat(url: str) -> str:
    """What the server answers to a message: the same each time."""
    body = {
        "messages": [{"role": "user", "content": "hello there"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    return str(post(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"])


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)


def wait_for(question: Callable[[], Any], seconds: float = 120) -> Any:
    """The first true answer; the test fails where none comes in time, which is long enough for a
    machine with more to do than it has processors."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = question()
        if answer:
            return answer
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def often(few: int, many: int) -> pytest.MarkDecorator:
    """For a test of what chance decides: how many `times` it tries, and how many if `long`."""
    return pytest.mark.parametrize("times", [few, pytest.param(many, marks=pytest.mark.long)])


@pytest.fixture(scope="session")
def built() -> Path:
    """This checkout's own `bins/`, compiled by doit: minutes once, nothing after."""
    import kept

    kept.build_with_page(Doit(REPOSITORY))
    return REPOSITORY / "bins"


@pytest.fixture(scope="session")
def converter(built: Path) -> Path:
    """The converter's environment, shared by all checkouts; its Python."""
    from pipeline.core.paths import Home
    from pipeline.models import converter

    Doit(REPOSITORY)("converter")
    return converter.installed(Home(REPOSITORY)).python


def with_programs(built: Path, home: Path) -> Doit:
    """doit on `home`, which has this checkout's programs, page and source as though made there."""
    home.mkdir(parents=True)
    (home / "bins").mkdir()
    for folder in built.iterdir():
        if folder.is_dir() and not folder.name.startswith("."):
            shutil.copytree(folder, home / "bins" / folder.name, copy_function=os.link)
    if (built / ".ui").exists():  # else each home would run npm for its next build
        no_locks = shutil.ignore_patterns("*.lock")  # one file would be a lock of all homes
        shutil.copytree(
            built / ".ui", home / "bins" / ".ui", copy_function=os.link, ignore=no_locks
        )
    if (built / ".source").exists():
        (home / "bins" / ".source").symlink_to(built / ".source")
    know_machine(home)
    return Doit(home)


def know_machine(home: Path) -> None:
    """Copy what this checkout's home knows of the machine and of the programs: each home would find
    it out again, which takes some tenths of a second."""
    known = REPOSITORY / "run"
    (home / "run").mkdir()
    for name in ("backends.json", "compilers.json", "node.json"):
        with suppress(FileNotFoundError):
            shutil.copy(known / name, home / "run")
    if (known / "flags").exists():
        unfinished = shutil.ignore_patterns(".*")
        shutil.copytree(known / "flags", home / "run" / "flags", ignore=unfinished)


@pytest.fixture
def doit(built: Path, tmp_path: Path) -> Doit:
    """doit on an empty home with programs; its path has a space and letters beyond ASCII."""
    return with_programs(built, tmp_path / "mein häus")


@pytest.fixture(scope="session")
def builder(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Doit:
    """doit on a home that compiled its programs, with all of the build folder. For tests in the
    group `builder`, which build again: nobody else uses what they replace."""
    doit = with_programs(built, tmp_path_factory.mktemp("builder") / "hôme")
    doit("forget", "build_bins")  # force=1 would make the page again too
    doit("build_bins")
    return doit


@pytest.fixture
def bare(tmp_path: Path) -> Doit:
    """doit on an empty home: nothing is built, nothing should be."""
    home = tmp_path / "empty home"
    home.mkdir()
    return Doit(home)


@pytest.fixture(scope="session")
def demo(built: Path, converter: Path, tmp_path_factory: pytest.TempPathFactory) -> Doit:
    """doit on a home in which the embedding model of the demonstration was prepared as Q8_0 and
    Q4_K_M. For reading only."""

    def make(folder: Path) -> None:
        doit = with_programs(built, folder / "hôme")
        for quant in ("q8_0", "q4_k_m"):
            doit("prepare", "model=demo-embed", f"quant={quant}")

    return Doit(shared(tmp_path_factory, "demo", make) / "hôme")


@pytest.fixture
def embedder(demo: Doit, doit: Doit) -> Doit:
    """doit on a home with copies of these, and of what they were made from."""
    shutil.copytree(demo.home / "models", doit.home / "models")
    return doit


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model as a safetensors folder. Tests that change it copy it first."""
    from fakes import tiny_llama

    made = shared(tmp_path_factory, "tiny", lambda top: tiny_llama.make(top / "tiny llama é"))
    return made / "tiny llama é"


@pytest.fixture(scope="session")
def gguf(
    built: Path, converter: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same as a GGUF, which needs nothing but a llama-server. For reading only."""

    def make(folder: Path) -> None:
        with_programs(built, folder / "hôme")("prepare", f"model={tiny}", "quant=q8_0")

    made = shared(tmp_path_factory, "gguf", make)
    return next((made / "hôme" / "models").rglob("*.gguf"))


@pytest.fixture(scope="session")
def prepared(built: Path, gguf: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `models` of a home in which `tiny` was prepared as Q8_0 and Q4_K_M. For reading only."""

    def make(folder: Path) -> None:
        doit = with_programs(built, folder / "hôme")
        shutil.copytree(models_of(gguf), doit.home / "models")
        doit("prepare", f"model={tiny}")

    return shared(tmp_path_factory, "prepared", make) / "hôme" / "models"


@pytest.fixture
def ready(prepared: Path, doit: Doit) -> Doit:
    """doit on a home in which `tiny` was prepared as Q8_0 and Q4_K_M: for tests of what comes
    after a conversion."""
    shutil.copytree(prepared, doit.home / "models")
    return doit


def models_of(file: Path) -> Path:
    """The `models` of the home that a prepared file lies in."""
    return next(folder for folder in file.parents if folder.name == "models")


@pytest.fixture
def own_tiny(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "tiny ü"))
