"""What another run does at the same time."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.commands import clean, verify
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.store import artifacts, json_file, receipts
from pipeline.core.store.locks import lock_of, only_one
from pipeline.models import memory
from pipeline.tasks import doit


def test_verify_looks_again_before_it_says_that_something_is_wrong(tmp_path: Path) -> None:
    target = tmp_path / "a"

    def make(text: str) -> None:
        artifacts.make(target, {"step": text}, lambda made: made.write_text(text) and None)

    make("one")
    old = receipts.load(tmp_path)["a"]
    assert verify.check(target, old) == ""
    make("another")
    problem = verify.check(target, old)
    assert problem and verify.checked_again(target, problem) == ""
    target.write_text("changed")
    assert verify.checked_again(target, "x")
    target.unlink()
    assert verify.checked_again(target, "x") == "is missing"
    artifacts.take_away(target)
    assert verify.checked_again(target, "is missing") == ""


def test_headers_are_removed_and_their_locks_stay(tmp_path: Path) -> None:
    """Whoever waits for a lock whose file is gone would work beside whoever makes a new one."""
    file = tmp_path / "slug" / "model.gguf"
    with only_one(file):
        file.touch()
    clean.remove_files(file.parent)
    assert [path.name for path in file.parent.iterdir()] == [lock_of(file).name]
    clean.remove_files(tmp_path / "none")


def test_clean_leaves_what_a_server_reads(tmp_path: Path) -> None:
    home, file = Home(tmp_path), tmp_path / "a.gguf"
    file.touch()
    run = home.run / "active" / f"{os.getppid()}.json"
    json_file.write_private(run, {"command": "serve model=a", "files": [str(file.resolve())]})
    resolved = SimpleNamespace(
        local=False, folder=tmp_path, files=[SimpleNamespace(name=file.name)]
    )
    chain = SimpleNamespace(conversion=None, quantization=None, resolved=resolved)
    model: Any = SimpleNamespace(
        home=home, request=SimpleNamespace(named="a"), require_chain=lambda: chain
    )
    with pytest.raises(PipelineError, match="model=a: is used by serve model=a; nothing was"):
        clean.clean(model, "fetch")
    assert file.exists()
    run.unlink()
    clean.clean(model, "fetch")
    assert not file.exists()


def test_a_model_that_goes_while_it_is_measured_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "a.gguf"
    model.touch()

    def fails(program: Path, model: Path, words: list[str]) -> tuple[str, str]:
        model.unlink()
        return "", ": failed to open it"

    monkeypatch.setattr(memory, "_load", fails)
    with pytest.raises(FileNotFoundError):
        memory.measure(tmp_path / "fit", "build", model, [], 512, tmp_path / "cache.json")


def test_what_another_run_has_removed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_PIPELINE_HOME", str(tmp_path))

    def told(path: Path) -> str:
        failed = doit.guarded(lambda: path.read_text() and None)()
        assert failed
        return str(failed.get_msg())

    assert "a.gguf is gone: another run may have removed it" in told(tmp_path / "a.gguf")
    assert "No such file" in told(tmp_path.parent / "own.pem")
