from __future__ import annotations

import re
from pathlib import Path

import pytest
from core_tools import names
from disks import disk

from pipeline.core import packages, paths
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.pins import pins


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA_PIPELINE_HOME", "LLAMA_PIPELINE_CACHE", "LLAMA_PIPELINE_CWD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "user"))
    monkeypatch.setenv("LLAMA_PIPELINE_CWD", str(tmp_path / "here" / "below"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x/y", "here/below/x/y"),
        ("../x", "here/below/../x"),  # not shortened: `below` may be a link
        ("./", "here/below"),
        ("~", "user"),
        ("~/größe 1", "user/größe 1"),
        ("a~b", "here/below/a~b"),
    ],
)
def test_paths_start_where_the_user_is(tmp_path: Path, text: str, expected: str) -> None:
    assert paths.absolute(text) == tmp_path / expected
    assert paths.absolute(Path(text)) == tmp_path / expected


def test_an_absolute_path_is_what_it_is(tmp_path: Path) -> None:
    assert paths.absolute(tmp_path / "a") == tmp_path / "a"


def test_the_home_of_nobody() -> None:
    with pytest.raises(UsageError, match="~nobody-of-that-name/x"):
        paths.absolute("~nobody-of-that-name/x")


def test_up_from_a_link_is_up_from_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "far" / "off").mkdir(parents=True)
    (tmp_path / "far" / "x").write_text("found")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "below").symlink_to(tmp_path / "far" / "off")
    assert paths.absolute("../x").read_text() == "found"


def test_a_file_has_one_path_however_it_is_spelled(tmp_path: Path) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "here")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "here" / "to.toml").symlink_to("other.toml")
    folder = (tmp_path / "here").resolve()
    for spelled in ("../to.toml", "../../link/to.toml", tmp_path / "link" / "below/../to.toml"):
        assert paths.one_path(spelled) == folder / "to.toml"
    current = tmp_path / "link" / "to.toml"
    assert paths.one_path(current) == current, "the link may come to lead elsewhere"
    assert paths.one_path(tmp_path / "loop" / ".." / "x").name == "x"


def test_without_doitw_the_working_folder_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_PIPELINE_CWD")
    monkeypatch.setattr("doit.loader.initial_workdir", None, raising=False)
    monkeypatch.chdir(tmp_path)
    assert paths.absolute("x") == Path.cwd() / "x"


def test_paths_are_absolute_even_where_the_variable_is_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLAMA_PIPELINE_CWD", "")
    assert paths.absolute("x").is_absolute()


@pytest.mark.parametrize(
    ("value", "expected"), [("mine", "here/below/mine"), ("~/mine", "user/mine"), (" ", None)]
)
def test_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: str | None
) -> None:
    monkeypatch.setenv("LLAMA_PIPELINE_HOME", value)
    root = tmp_path / expected if expected else paths.REPOSITORY
    home = paths.home()
    assert home.root == root
    assert [home.bins, home.models, home.logs, home.run] == [
        root / name for name in ("bins", "models", "logs", "run")
    ]


def test_a_file_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA_PIPELINE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"LLAMA_PIPELINE_HOME=.*file: is not a folder"):
        paths.home()
    monkeypatch.setenv("LLAMA_PIPELINE_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(UsageError, match=r"LLAMA_PIPELINE_HOME=.*home: .*file is not a folder"):
        paths.home()
    monkeypatch.setenv("LLAMA_PIPELINE_HOME", str(tmp_path / ("x" * 300)))
    with pytest.raises(UsageError, match=r"LLAMA_PIPELINE_HOME=.*x: File name too long"):
        paths.home()


def test_the_repository_is_the_home_by_default() -> None:
    assert (paths.home().root / "dodo.py").is_file()


def test_writable(tmp_path: Path) -> None:
    paths.require_writable(tmp_path / "new" / "folder")
    assert names(tmp_path / "new" / "folder") == []


def test_below_a_file_nothing_is_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(PipelineError, match="cannot be written to") as caught:
            paths.require_writable(folder)
        assert str(folder) in caught.value.message


def test_a_link_to_a_disk_that_is_not_there_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    (tmp_path / "models").symlink_to(gone)
    for folder in (tmp_path / "models", tmp_path / "models" / "gguf"):
        with pytest.raises(PipelineError) as caught:
            paths.require_writable(folder)
        link = f"{tmp_path / 'models'}: is a link to {gone}, which is not there"
        assert caught.value.message == link
        assert "mount the disk" in caught.value.hint


def test_a_read_only_disk_is_not_writable(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "size=64k") as remount:
        remount("ro")
        for folder in (tmp_path / "disk", tmp_path / "disk" / "new"):
            with pytest.raises(PipelineError, match="Read-only file system") as caught:
                paths.require_writable(folder)
            assert caught.value.hint.startswith("let this user write there")


def test_a_full_disk_is_not_writable(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "size=64k"):
        (tmp_path / "disk" / "filler").write_bytes(b"0" * 65536)
        with pytest.raises(PipelineError, match="No space left") as caught:
            paths.require_writable(tmp_path / "disk")
        assert caught.value.hint.startswith("free some space")


class TestCache:
    def test_chosen(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LLAMA_PIPELINE_CACHE", "~/kept")
        assert paths.cache(paths.Home(tmp_path)) == tmp_path / "user" / "kept"
        assert not (tmp_path / "user").exists()  # deciding writes nothing

    def test_the_platforms(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from platformdirs import user_cache_path

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        expected = user_cache_path("llama-pipeline", appauthor=False)
        assert paths.cache(paths.Home(tmp_path)) == expected
        assert names(tmp_path) == []

    def test_inside_the_home_where_that_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "user").touch()  # on macOS the platform's folder is below it
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user" / "xdg"))
        home = paths.Home(tmp_path / "home")
        assert paths.cache(home) == home.root / ".cache"
        assert names(tmp_path) == ["user"]

    def test_inside_the_home_where_the_disk_is_read_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = paths.Home(tmp_path / "home")
        with disk(tmp_path / "user", "size=64k") as remount:
            for name in ("HOME", "XDG_CACHE_HOME"):
                monkeypatch.setenv(name, str(tmp_path / "user" / "not there" / "yet"))
            assert tmp_path / "user" in paths.cache(home).parents
            remount("ro")
            assert paths.cache(home) == home.root / ".cache"

    def test_a_choice_is_not_replaced_by_a_guess(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(tmp_path / "file"))
        home = paths.Home(tmp_path / "home")
        assert paths.cache(home) == tmp_path / "file"
        # an OSError with the path in it is told as a plain error by the tasks
        with pytest.raises((PipelineError, OSError), match=re.escape(str(tmp_path / "file"))):
            packages.fetch(pins().demos["demo"].archive, home, offline=True)
        assert names(tmp_path) == ["file"]


def test_a_user_whose_name_cannot_be_written() -> None:
    with pytest.raises(UsageError):
        paths.absolute("~\ud800")
    with pytest.raises(UsageError):
        paths.absolute("~\0")
