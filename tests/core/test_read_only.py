"""What is said of a place that cannot be written: the path that the user knows, and a next step
that helps there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import disk

from pipeline.commands import provenance
from pipeline.core import paths
from pipeline.core.errors import PipelineError
from pipeline.core.store import artifacts, locks, publish
from pipeline.deploy.kubernetes import folder as manifests
from pipeline.models import lockfile


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / "a disk", "size=1m") as remount:
        remount("ro")
        yield tmp_path / "a disk"


def lock(at: Path) -> None:
    lockfile.write(at / lockfile.FILE, {"asked": {"model": "demo"}})


def require_lockable(at: Path) -> None:
    paths.require_writable(at, paths.HERE)


def make(at: Path) -> None:
    artifacts.make(at / "model.gguf", {"step": "x"}, lambda made: made.touch())


def state(at: Path) -> None:
    provenance.write(at / "a.intoto.jsonl", "text")


def manifest(at: Path) -> None:
    manifests.write({"a.yaml": "x"}, at / "written")


HOME, OUT = "set LLAMA_PIPELINE_HOME", "set out= to"
TYPED = "run this in another folder"


@pytest.mark.parametrize(
    ("write", "next_step"),
    [(lock, TYPED), (require_lockable, TYPED), (make, HOME), (state, OUT), (manifest, OUT)],
)
def test_the_folder_is_named_with_what_helps(
    read_only: Path, write: Callable[[Path], None], next_step: str
) -> None:
    with pytest.raises(PipelineError) as caught:
        write(read_only)
    assert caught.value.message in (
        f"{read_only}: Read-only file system",
        f"{read_only}: cannot be written to: Read-only file system",
    )
    assert next_step in caught.value.hint
    others = {HOME, OUT, TYPED} - {next_step}
    assert not any(other in caught.value.hint for other in others)


def test_an_error_of_a_probe_names_its_folder(read_only: Path) -> None:
    with pytest.raises(OSError, match="Read-only") as caught:
        locks.trouble(read_only)
    assert caught.value.filename == str(read_only)


@pytest.mark.parametrize("name", [".a.gguf.part", ".a.gguf.lock", ".a.json.17.part", ".a.old"])
def test_a_file_that_could_not_be_made_is_none_that_the_user_knows(
    tmp_path: Path, name: str
) -> None:
    error = PermissionError(13, "Permission denied", str(tmp_path / name))
    found = publish.disk_error(error, tmp_path)
    assert found and found.message == f"{tmp_path}: Permission denied"
    (tmp_path / name).touch()  # it is there, and in the way: somebody else's
    found = publish.disk_error(error, tmp_path)
    assert found and found.message == f"{tmp_path / name}: Permission denied"


def test_a_file_of_the_user_is_named(tmp_path: Path) -> None:
    error = PermissionError(13, "Permission denied", str(tmp_path / "a.gguf"))
    found = publish.disk_error(error, tmp_path)
    assert found and found.message == f"{tmp_path / 'a.gguf'}: Permission denied"
