"""After a power cut the next run uses the old thing or the new one, or makes it again: whatever of
what was not flushed is lost."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import lost_sequences
import pytest
from figures import Figure
from lost_sequences import ALL, ALWAYS, NEW
from lost_writes import Recording, states
from seeds import dice

from pipeline.bins.compile import cmake, source
from pipeline.core.errors import PipelineError
from pipeline.core.store import publish, receipts

ACT = "import sys, pathlib, lost_sequences as s; s.ALL[sys.argv[1]].act(pathlib.Path(sys.argv[2]))"
# In the traced process: nothing reaches the disk before its time.
WITHOUT_FLUSH = """
import ctypes, os

class Library(ctypes.CDLL):
    def __getattr__(self, name):
        return (lambda handle: 0) if name == "syncfs" else super().__getattr__(name)

os.fsync = lambda handle: None
ctypes.CDLL = Library
"""
PLACE = str(Path(lost_sequences.__file__).parent)


@pytest.fixture
def top(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a sequence, in memory where that can be: thousands of states are built in it.
    What the next runs flush is not looked at, and would take long."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for module in (publish, source, cmake):
        monkeypatch.setattr(module, "flush_folder", lambda folder: None)
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path = Path(folder) / "mein häus"
        path.mkdir()
        yield path


def reboot() -> None:
    """What this process knows of files is forgotten."""
    receipts._cache.clear()
    publish._reachable.clear()


def cut(
    top: Path, name: str, *, bound: int, samples: int, code: str = ACT, lasts: bool = True
) -> Counter[str]:
    """Every state that a power cut in the sequence leaves is used by the next run; how often it
    took which. `lasts`: what was done is there after the end, if that is promised."""
    sequence, verdicts, chance = ALL[name], Counter[str](), dice()
    sequence.before(top)
    recording = Recording.of(
        top, f"import sys; sys.path.insert(0, {PLACE!r})\n{code}", name, str(top)
    )
    for has_ended, tree in states(recording, chance, bound=bound, samples=samples):
        recording.build(tree)
        reboot()
        verdict = sequence.after(top)
        must_last = lasts and sequence.lasts and has_ended
        assert not must_last or verdict == NEW, "lost after it was done"
        verdicts[verdict] += 1
    print(dict(verdicts))
    return verdicts


@pytest.mark.parametrize("name", ALWAYS)
def test_nothing_torn_is_taken_for_good(top: Path, name: str, figure: Figure) -> None:
    verdicts = cut(top, name, bound=16, samples=4)
    assert verdicts[NEW] and verdicts.total() > verdicts[NEW]
    figure("power cuts survived", verdicts.total())


@pytest.mark.trust
@pytest.mark.parametrize("name", ALL)
def test_nothing_torn_is_taken_for_good_in_any_sequence(
    top: Path, name: str, figure: Figure
) -> None:
    verdicts = cut(top, name, bound=512, samples=60)
    assert verdicts[NEW] and verdicts.total() > verdicts[NEW]
    figure("sequences with power cuts", 1)
    figure("power cuts survived", verdicts.total())
    figure("bytes lost to power cuts", 0)


@pytest.mark.trust
@pytest.mark.parametrize("name", [name for name in ALL if not ALL[name].notices])
def test_it_would_be_seen_if_nothing_were_flushed(top: Path, name: str) -> None:
    must_be_red(top, name, WITHOUT_FLUSH)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("a file", "flush"), ("a folder with one receipt", "flush_folder"), ("saved slots", "flush")],
)
def test_it_is_seen_that_a_flush_is_missing(top: Path, name: str, missing: str) -> None:
    change = f"from pipeline.core.store import publish\npublish.{missing} = lambda path: None\n"
    must_be_red(top, name, change)


def must_be_red(top: Path, name: str, change: str) -> None:
    with pytest.raises((AssertionError, PipelineError)) as caught:
        cut(top, name, bound=64, samples=30, code=change + ACT, lasts=False)
    print(caught.value)
