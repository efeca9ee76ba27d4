"""What `prune` keeps for the way back."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.bins.compile import active
from pipeline.bins.compile.active import Active, Revision
from pipeline.commands import prune
from pipeline.commands.request import request
from pipeline.commands.session import Session
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import json_file
from pipeline.models import on_disk

ONE, TWO = (Revision(commit=digit * 40, tree=digit * 40) for digit in "12")
PINNED = pins().llama_cpp_commit


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        (None, [PINNED]),
        (Active(active=ONE), [ONE.commit, PINNED]),
        (Active(active=TWO, previous=ONE), [TWO.commit, ONE.commit]),
        (Active(previous=ONE), [PINNED, ONE.commit]),
    ],
    ids=["never upgraded", "once", "twice", "back"],
)
def test_the_llama_cpp_before_this_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Active | None, kept: list[str]
) -> None:
    monkeypatch.setenv("LLAMA_PIPELINE_HOME", str(tmp_path))
    home = Home(tmp_path)
    home.bins.mkdir()
    if state:
        active.write(home, state)
    session = Session(request({}), {})
    assert [source.commit for source in prune.kept_sources(session)] == kept


def test_what_another_run_has_just_removed_is_not_old(tmp_path: Path) -> None:
    assert not prune.is_older(tmp_path / "gone", 0)


def test_answers_about_models_on_a_disk_that_is_not_there_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_PIPELINE_HOME", str(tmp_path))
    home, slugs = Home(tmp_path), ("org__far__0123456789ab", "org__gone__0123456789ab")
    (home.models / "resolved").mkdir(parents=True)
    for slug in slugs:
        json_file.write(home.models / "resolved" / f"{slug}.json", {"slug": slug})
    (home.models / "gguf").mkdir()
    (home.models / "gguf" / slugs[0]).symlink_to(tmp_path / "not mounted")
    found = prune.of_answers(home, on_disk.look(home))
    assert [path.stem for each in found for path in each.paths] == [slugs[1]]

    (home.models / "source").symlink_to(tmp_path / "not mounted")
    with pytest.raises(PipelineError, match=r"is a link to .*not mounted, which is not there"):
        prune.candidates(Session(request({}), {}))
