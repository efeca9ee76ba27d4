from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipeline.core import capacity


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container's limits, as the kernel shows them."""
    monkeypatch.setattr(capacity, "GROUP", tmp_path)
    return tmp_path


def test_without_a_container(group: Path) -> None:
    assert 0 < capacity.memory() <= psutil.virtual_memory().total
    assert 1 <= capacity.processors() <= (psutil.cpu_count() or 1)


@pytest.mark.parametrize(
    ("text", "available"),
    [
        (
            "MemTotal:  4000 kB\nMemFree: 1 kB\nMemAvailable:  3000 kB\nHugePages_Total: 0\n",
            3000 * 1024,
        ),
        ("MemTotal: 4000 kB\nMemAvailable: 5000 kB\n", None),
        ("MemTotal: 4000 kB\n", None),
        ("what is this\n", None),
        ("", None),
    ],
)
def test_what_the_system_says_is_available(
    group: Path, monkeypatch: pytest.MonkeyPatch, text: str, available: int | None
) -> None:
    file = group / "meminfo"
    file.write_text(text)
    monkeypatch.setattr(capacity, "MEMINFO", file)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=7))
    assert capacity.memory() == (available or 7)


@pytest.mark.parametrize(
    ("quota", "count"),
    [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None), ("?", None)],
)
def test_a_container_with_less_time(group: Path, quota: str, count: int | None) -> None:
    free = capacity.processors()
    (group / "cpu.max").write_text(quota)
    assert capacity.processors() == (count or free)


def test_a_container_with_less_memory(group: Path) -> None:
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 300000\n")
    assert capacity.memory() == 400_000
    (group / "memory.current").write_text("2000000\n")
    assert capacity.memory() == 0
    (group / "memory.max").write_text("max\n")
    assert capacity.memory() > 1_000_000


@pytest.mark.parametrize(("quota", "count"), [("50000", 1), ("-1", None)])
def test_less_time_by_the_first_version_of_control_groups(
    group: Path, quota: str, count: int | None
) -> None:
    free = capacity.processors()
    (group / "cpu").mkdir()
    (group / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert capacity.processors() == (count or free)


def test_less_memory_by_the_first_version_of_control_groups(group: Path) -> None:
    folder = group / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("1000000\n")
    (folder / "memory.usage_in_bytes").write_text("900000\n")
    (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 300000\n")
    assert capacity.memory() == 400_000
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # none
    assert capacity.memory() > 1_000_000


@pytest.mark.parametrize(
    ("line", "inner", "files"),
    [
        ("0::/x.slice/job ü/step", "x.slice", ("memory.max", "memory.current", "memory.stat")),
        (
            "4:hugetlb,memory:/x.slice/job ü/step",
            "memory/x.slice/job ü",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_limits_of_a_service_or_a_job_deep_in_the_tree(
    group: Path, monkeypatch: pytest.MonkeyPatch, line: str, inner: str, files: tuple[str, ...]
) -> None:
    """Of systemd's units and Slurm's jobs; each limit above holds too."""
    (group / "own").write_text(f"9:name=systemd:/\n{line}\n")
    monkeypatch.setattr(capacity, "OWN_GROUPS", group / "own")
    for folder, limit in ((inner, 1_000_000), (inner + "/job ü/step", 2_000_000)):
        (group / folder).mkdir(parents=True)
        for name, text in zip(files, (f"{limit}\n", "600000\n", "anon 5\n"), strict=True):
            (group / folder / name).write_text(text)
    assert capacity.memory() == 400_000
    assert capacity.total() == 1_000_000


def test_a_quota_of_a_service(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (group / "own").write_text("0::/a/b\n")
    monkeypatch.setattr(capacity, "OWN_GROUPS", group / "own")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    (group / "a" / "b").mkdir(parents=True)
    (group / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (group / "a" / "cpu.max").write_text("250000 100000\n")
    assert capacity.processors() == 3
    (group / "own").write_text("0::/../other\n")  # seen from within another namespace
    assert capacity.processors() == 16
