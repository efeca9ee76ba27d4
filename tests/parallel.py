"""Tests side by side: which of them one worker keeps together, and what comes first.

`./doitw test` starts several workers (pytest-xdist), each of them a process with fixtures of its
own. A test that is marked with `xdist_group` goes where its group goes; the rest is decided here.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from workers import WORKER

GROUPS = pytest.StashKey[Path]()

# What takes longest, with what it waits for: begun last, it would be all that still runs.
FIRST = (
    "test_house.py",
    "test_packing.py",
    "test_vulkan.py",
    "images",
    "infer-dev",
    "test_kill.py",
    "test_reruns.py",
    "test_from_hub.py",
    "test_hub.py",
    "test_bootstrap.py",
    "test_servers.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker where to write down the groups."""
    node.workerinput["groups"] = str(groups_of(node.config))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from schedule import Groups  # imports what a run without workers does not need

    return Groups(config, log, groups_of(config))


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
    items.sort(key=lambda item: rank(item, groups[item]))  # within a group the order stays
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


def rank(item: pytest.Item, group: str) -> int:
    """The longest groups, other slow tests, and quick ones to fill the gaps at the end."""
    if group in FIRST or item.path.name in FIRST:
        return FIRST.index(group if group in FIRST else item.path.name)
    return len(FIRST) + (not item.get_closest_marker("slow"))
