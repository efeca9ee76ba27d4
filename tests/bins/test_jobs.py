"""How many compilers run at once."""

from __future__ import annotations

import pytest

from pipeline.bins.compile.cmake import GIB, job_count


@pytest.mark.parametrize(
    ("backend", "processors", "memory", "count"),
    [
        ("cpu", 8, 64 * GIB, 8),
        ("cpu", 8, 3 * GIB, 3),
        ("cuda", 8, 64 * GIB, 8),
        ("cuda", 8, 7 * GIB, 3),
        ("hip", 8, 7 * GIB, 3),
        ("sycl", 8, 7 * GIB, 3),
        ("vulkan", 8, 7 * GIB, 3),
        ("cuda", 64, GIB, 1),
        ("cpu", 64, 0, 1),
        ("cpu", 1, 64 * GIB, 1),
    ],
)
def test_processors_and_memory_bound_them(
    backend: str, processors: int, memory: int, count: int
) -> None:
    assert job_count(None, backend, processors, memory) == count


def test_more_than_the_memory_allows_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert job_count(3, "cpu", 64, 64 * GIB) == 3
    assert job_count(16, "cpu", 2, 64 * GIB) == 16
    assert capsys.readouterr().err == ""
    assert job_count(16, "cuda", 64, 8 * GIB) == 4
    assert "jobs=16: running 4, all that the free memory allows" in capsys.readouterr().err
