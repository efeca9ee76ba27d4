"""Tests side by side: which of them one worker keeps together, and what comes first.

`./doitw test` starts several workers (pytest-xdist), each of them a process with fixtures of its
own. A test that is marked with `xdist_group` goes where its group goes; the rest is decided here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from workers import WORKER

from pipeline.core.capacity import processors
from pipeline.core.paths import REPOSITORY, Home, cache
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import publish_text

GROUPS = pytest.StashKey[Path]()
BEFORE = pytest.StashKey[dict[str, float]]()  # seconds that tests took
MEASURED = cache(Home(REPOSITORY)) / "tests" / "seconds.json"  # of tests, in the last run of each
TOO_SHORT = 0.1  # seconds, to be written down
FEW = 50  # files, that each worker may compile
SLOW = 20.0  # seconds of a slow test that was not measured yet
seconds: Counter[str] = Counter()  # of tests, in this run

# What takes longest, with what it waits for, where no run has measured it: begun last, it would be
# all that still runs.
FIRST = (
    "test_house.py",
    "test_packing.py",
    "test_vulkan.py",
    "images",
    "infer-dev",
    "test_reruns.py",
    "test_from_hub.py",
    "test_hub.py",
    "test_bootstrap.py",
    "test_servers.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """In a fresh checkout have pytest compile each file of tests once: all workers would, at the
    same time, and that is two thirds of their start."""
    if sys.dont_write_bytecode or config.args != config.getini("testpaths"):
        return
    files = [str(file) for file in sorted(REPOSITORY.glob("tests/**/test_*.py")) if is_new(file)]
    words = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-p", "no:cacheprovider"]
    nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    count = processors()
    parts = [files[number::count] for number in range(count)] if len(files) > FEW else []
    collecting = [subprocess.Popen([*words, *part], cwd=REPOSITORY, **nowhere) for part in parts]
    for process in collecting:
        process.wait()


def is_new(file: Path) -> bool:
    """Whether pytest has never compiled it."""
    return not any(file.parent.glob(f"__pycache__/{file.stem}.*-pytest-*.pyc"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker where to write down the groups, and how long tests took: the same to all."""
    node.workerinput["groups"] = str(groups_of(node.config))
    node.workerinput["seconds"] = node.config.stash.setdefault(BEFORE, measured())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from schedule import Groups  # imports what a run without workers does not need

    return Groups(config, log, groups_of(config))


def measured() -> dict[str, float]:
    """How many seconds tests took when they last ran on workers. Empty where that is not known."""
    try:
        return dict(json.loads(MEASURED.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if hasattr(report, "node"):  # a worker's, where they come together
        seconds[report.nodeid] += report.duration


def pytest_sessionfinish() -> None:
    """Write down how long the tests took, for the order of the next run."""
    if not seconds:
        return
    now = {name: round(time, 1) for name, time in seconds.items() if time >= TOO_SHORT}
    with only_one(MEASURED):
        before = measured().items()
        kept = {name: time for name, time in before if name not in seconds and is_file(name)}
        publish_text(MEASURED, json.dumps(kept | now, indent=0))


def is_file(nodeid: str) -> bool:
    """Whether the test's file is still there."""
    return (REPOSITORY / nodeid.partition("::")[0]).exists()


def groups_of(config: pytest.Config) -> Path:
    """The file of the groups."""
    if GROUPS not in config.stash:
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        config.stash[GROUPS] = Path(folder.name) / "groups.json"
    return config.stash[GROUPS]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Find the group of each test, and put the longest groups first."""
    groups = {item: group(item) for item in items}
    known = getattr(config, "workerinput", {}).get("seconds", {})
    takes, guesses = Counter[str](), dict[str, float]()
    for item, name in groups.items():
        takes[name] += known.get(item.nodeid, 0)
        guesses[name] = max(guess(item, name), guesses.get(name, 0))
    # within a group the order stays
    items.sort(key=lambda item: takes[groups[item]] or guesses[groups[item]], reverse=True)
    if told := getattr(config, "workerinput", {}).get("groups"):
        made = Path(f"{told}.{WORKER}")
        named = {item.nodeid: name for item, name in groups.items()}
        made.write_text(json.dumps(named), encoding="utf-8")
        made.replace(told)  # all workers write the same


def group(item: pytest.Item) -> str:
    """Tests share a fixture of their file, or are so short that they go as a file; a slow one that
    shares nothing goes alone."""
    if mark := item.get_closest_marker("xdist_group"):
        return str(mark.args[0])
    if item.get_closest_marker("slow") and not shares_fixture(item):
        return item.nodeid
    return item.path.name


def shares_fixture(item: pytest.Item) -> bool:
    found = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
    return any(one.scope in ("module", "class") for every in found for one in every)


def guess(item: pytest.Item, group: str) -> float:
    """Seconds, where no run has measured them: the longest groups come before other slow tests, and
    quick ones fill the gaps at the end."""
    if group in FIRST or item.path.name in FIRST:
        return 1000.0 - FIRST.index(group if group in FIRST else item.path.name)
    return SLOW if item.get_closest_marker("slow") else 0.0
