"""`doit test` says that the disk is too full, before the tests do it one by one."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest

from pipeline.commands import test as command
from pipeline.core.errors import PipelineError

Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_is_too_full_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(command.bootstrap, "install", lambda _: None)
    monkeypatch.setattr(command.process, "attached", lambda argv, **_: started.append(argv))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 10**9, 10**9))
    with pytest.raises(PipelineError, match=r"needed there and 1\.0 GB are free") as error:
        command.run([])
    assert "TMPDIR" in error.value.hint
    assert not started
    command.run(["tests/core"])  # a selection may need less
    assert started
