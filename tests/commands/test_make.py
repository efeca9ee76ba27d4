"""What runs beside the build."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline.commands import make
from pipeline.commands.model import Model
from pipeline.commands.request import request
from pipeline.commands.session import Session
from pipeline.core.errors import PipelineError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_PIPELINE_HOME", str(tmp_path))


def session(**words: str) -> Session:
    return Session(request(words), words)


class Fetching:
    """In place of the download: by which threads it was called, and held up by `hold`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hold = threading.Event()
        self.threads: list[bool] = []
        self.error: Exception | None = None
        monkeypatch.setattr(make, "_fetch", self)

    def __call__(self, model: Model) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main:
            assert self.hold.wait(10)
        self.threads.append(is_main)
        if self.error and not is_main:
            raise self.error


@pytest.fixture
def fetching(monkeypatch: pytest.MonkeyPatch) -> Fetching:
    return Fetching(monkeypatch)


def test_a_model_is_fetched_while_the_programs_are_made(fetching: Fetching) -> None:
    one = session(model="demo")
    make.fetch_ahead(one)
    assert fetching.threads == [], "the build goes on meanwhile"
    threading.Timer(0.2, fetching.hold.set).start()
    make.fetch(one.model)
    assert fetching.threads == [False, True], "the step waits for it, and finds it done"


def test_what_fails_there_is_left_to_the_step(
    fetching: Fetching, capsys: pytest.CaptureFixture[str]
) -> None:
    fetching.error = PipelineError("no network")
    fetching.hold.set()
    one = session(model="demo")
    make.fetch_ahead(one)
    make.fetch(one.model)
    assert fetching.threads == [False, True]
    assert "no network\n(tried again once llama.cpp is built)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [{"force": "1"}, {"offline": "1"}, {"server.flash_attn": "on"}], ids=str
)
def test_nothing_is_fetched_that_may_not_be_needed(
    fetching: Fetching, words: dict[str, str]
) -> None:
    one = session(model="demo", **words)
    make.fetch_ahead(one)
    assert one.programs.fetched_ahead is None


def test_a_model_that_is_made_is_not_fetched_again(fetching: Fetching) -> None:
    one = session(model="demo-embed")
    chain = one.model.require_chain()
    chain.final.parent.mkdir(parents=True)
    chain.final.write_bytes(b"GGUF")  # whether it is current is known once the programs are
    fetching.hold.set()
    make.fetch_ahead(one)
    assert one.programs.fetched_ahead
    one.programs.fetched_ahead.wait()
    assert fetching.threads == []
