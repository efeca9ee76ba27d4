"""What `model=` means: every form of the interface, and what is no form at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.errors import UsageError
from pipeline.models.reference import parse


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the user types in."""
    monkeypatch.setenv("LLAMA_PIPELINE_CWD", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "repo", "revision", "quant"),
    [
        ("org/model", "org/model", "", ""),
        ("org/model:Q4_K_M", "org/model", "", "Q4_K_M"),
        ("org/model:UD-Q4_K_XL", "org/model", "", "UD-Q4_K_XL"),
        ("org/model@v1.0", "org/model", "v1.0", ""),
        ("org/model@refs/pr/7", "org/model", "refs/pr/7", ""),
        ("org/model:Q8_0@main", "org/model", "main", "Q8_0"),
        ("org/model@main:Q8_0", "org/model", "main", "Q8_0"),
        ("hf:org/model:Q4_K_M@abc123", "org/model", "abc123", "Q4_K_M"),
        ("hf:Org-1/my_model.v2", "Org-1/my_model.v2", "", ""),
        ("hf:org/model.gguf", "org/model.gguf", "", ""),
    ],
)
def test_repositories(text: str, repo: str, revision: str, quant: str) -> None:
    found = parse(text)
    assert (found.kind, found.text) == ("hub", text)
    assert (found.repo, found.revision, found.quant) == (repo, revision, quant)


def test_the_demo_is_the_demo_even_beside_a_folder_of_its_name(here: Path) -> None:
    (here / "demo").mkdir()
    assert parse("demo").kind == "demo"
    assert parse("./demo").path == here / "demo"


def test_paths_start_where_the_user_types(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = here / "sub" / "A model.GGUF", here / "folder"
    file.parent.mkdir()
    file.touch()
    folder.mkdir()
    for text in ("sub/A model.GGUF", "./sub/A model.GGUF", str(file)):
        assert (parse(text).kind, parse(text).path) == ("gguf", file)
    for text in ("folder", "./folder/", str(folder)):
        assert (parse(text).kind, parse(text).path) == ("folder", folder)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    assert parse("~/folder").path == folder


def test_a_path_wins_over_a_repository_and_that_is_said(here: Path) -> None:
    (here / "org" / "model").mkdir(parents=True)
    found = parse("org/model")
    assert (found.kind, found.path) == ("folder", here / "org" / "model")
    assert str(here / "org" / "model") in found.note
    assert parse("hf:org/model").kind == "hub"
    assert parse("./org/model").note == ""  # no repository could be called that


@pytest.mark.parametrize(
    "text",
    [
        *("org/model.gguf", "./org/model", "../org/model", "/org/model", "~/nothing/here"),
        *(r"C:\models\m.gguf", "C:/models/m.gguf", r"org\model", "a/b/c", "m.gguf"),
        *("org/m.safetensors", "org/M.GGUF"),
    ],
)
def test_paths_that_do_not_exist_are_said_to_be_missing(text: str) -> None:
    with pytest.raises(UsageError, match="does not exist") as caught:
        parse(text)
    assert "org/model:QUANT" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        *("model", "hf:", "hf:model", "hf:a/b/c", "org/model:", "org/model@", "or g/model"),
        *("org/model:Q4@main:Q8", "hf:./model", "hf:../model", "hf:org/..", "hf:org/."),
        *("org/model;rm", "http://host/org/model"),
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


@pytest.mark.parametrize("text", ["x" * 300, "org/" + "x" * 5000, "~nobody-here/model"])
def test_impossible_paths_are_errors_and_no_crash(text: str) -> None:
    try:
        assert parse(text).kind == "hub"
    except UsageError as error:
        assert text in str(error)


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "gguf"])
def test_other_files_are_refused_with_what_to_give(here: Path, name: str) -> None:
    (here / name).touch()
    with pytest.raises(UsageError, match=r"neither a \.gguf file nor a folder") as caught:
        parse(f"./{name}")
    assert "config.json" in caught.value.hint
