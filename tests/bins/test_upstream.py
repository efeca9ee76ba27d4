"""Which commit a name means, and its files: out of a stand-in for GitHub, or a submodule."""

from __future__ import annotations

import gzip
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import releases

from pipeline.bins.compile import git_tree, source, upstream
from pipeline.bins.compile.active import Revision
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", folder, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree ü"
    (folder / "src").mkdir(parents=True)
    (folder / "CMakeLists.txt").write_text("project(x)\n")
    (folder / "src" / "größe.c").write_bytes(b"int a;\n" * 50_000)
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    return folder


@pytest.fixture
def site(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[releases.Site]:
    for name in ("GITHUB_TOKEN", "GH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(source, "REPOSITORY", tmp_path / "checkout")
    with releases.start() as site:
        monkeypatch.setenv("GITHUB_API_URL", site.api)
        site.commit(tree, "b7001", "feature/x", "master")
        for tag in ("b6998", "b7000", "b7001"):
            site.add(tag, {})
        site.add("b9999", {}, draft=True)
        yield site


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "höme")


def fetched(revision: Revision, home: Home, *, offline: bool = False) -> source.Source:
    (home.bins / ".source").mkdir(parents=True, exist_ok=True)
    found = source.upgraded(home, revision)
    source.fetch(found, home, offline=offline)
    return found


class TestNames:
    @pytest.mark.parametrize("name", ["latest", "b7001", "master", "feature/x", 7, 12, 40])
    def test_a_commit_by_its_names(self, site: releases.Site, name: str | int) -> None:
        commit = site.commits[0]
        is_commit = isinstance(name, int)
        found = upstream.find(commit.sha[:name] if isinstance(name, int) else name)
        shown = "" if is_commit else {"latest": "b7001"}.get(str(name), str(name))
        assert found == Revision(commit=commit.sha, tree=commit.tree, name=shown, date="2026-10-10")

    @pytest.mark.parametrize(
        ("name", "near"),
        [("b7002", "b7001, b7000, b6998"), ("B7001", "b7001"), ("abcdef1", ""), ("zzz", "")],
    )
    def test_an_unknown_one(self, site: releases.Site, name: str, near: str) -> None:
        with pytest.raises(UsageError, match=f"to={name}: llama.cpp has no such tag") as caught:
            upstream.find(name)
        assert (f"nearest: {near}" in caught.value.hint) == bool(near)
        assert "latest" in caught.value.hint
        assert "b9999" not in caught.value.hint

    def test_the_token_stays_with_the_api(
        self, site: releases.Site, home: Home, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GITHUB_TOKEN", "secret")
        fetched(upstream.find("latest"), home)
        tokens = {(entry["where"], entry["token"]) for entry in site.log}
        assert tokens == {("api", "Bearer secret"), ("files", "")}

    @pytest.mark.parametrize(
        ("faults", "said", "hint"),
        [
            ({"rate_limit": {"x-ratelimit-remaining": "0"}}, "no more requests", "GITHUB_TOKEN"),
            ({"body": b"<html>sign in</html>"}, "no answer about llama.cpp's commits", "proxy"),
            ({"body": b"{}"}, "no answer about llama.cpp's commits", "proxy"),
            ({"status": 500}, "answered 500", "later"),
            ({"status": 403}, "answered 403", "proxy"),
            ({"status": 404}, "no such tag, branch or commit", "tags"),
        ],
    )
    @pytest.mark.parametrize("name", ["b7001", "latest"])
    def test_no_answer(
        self, site: releases.Site, faults: dict[str, Any], said: str, hint: str, name: str
    ) -> None:
        site.faults |= faults
        if name == "latest" and "status" in faults and faults["status"] == 404:
            said, hint = "answered 404", ""
        with pytest.raises(PipelineError, match=said) as caught:
            upstream.find(name)
        assert hint in caught.value.hint
        assert "bins=build" not in str(caught.value)

    def test_nobody_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GITHUB_API_URL", "http://127.0.0.1:9")
        with pytest.raises(PipelineError, match="commits could not be fetched") as caught:
            upstream.find("b7001")
        assert "network" in caught.value.hint

    def test_an_answer_about_another_commit(self, site: releases.Site) -> None:
        site.faults["body"] = b'{"sha": "%s", "commit": {"tree": {"sha": "%s"}}}' % (
            b"1" * 40,
            b"2" * 40,
        )
        with pytest.raises(PipelineError, match="1111 for abcdef1"):
            upstream.find("abcdef1")
        assert upstream.find("some-branch").commit == "1" * 40

    def test_a_build_tag_is_no_commit(self) -> None:
        assert not upstream.COMMIT.fullmatch("b123456")
        assert upstream.COMMIT.fullmatch("b123456f")
        assert not upstream.COMMIT.fullmatch("abc123")


class TestFiles:
    def test_they_are_fetched_once(self, site: releases.Site, home: Home, tree: Path) -> None:
        revision = upstream.find("b7001")
        found = fetched(revision, home)
        assert git_tree.folder_hash(found.folder) == git_tree.folder_hash(tree) == revision.tree
        assert found.folder.name == f"llama.cpp-{revision.commit[:12]}"
        assert source.unpacked(home) == [revision]
        assert [path.name for path in found.folder.parent.glob(".*tar")] == []
        asked = len(site.log)
        fetched(revision, home, offline=True)
        assert len(site.log) == asked

    @pytest.mark.parametrize(
        ("faults", "said"),
        [
            ({"tarball": b"<html>sign in</html>"}, "is damaged or incomplete"),
            ({"tarball": gzip.compress(b"<html>")}, "is damaged or incomplete"),
            ({"tarball": b""}, "is damaged or incomplete"),
            ({"cut": 300}, "could not be fetched"),
            ({"status": 404}, "there is no archive"),
            ({"status": 403}, "answered 403"),
            ({"rate_limit": {"retry-after": "60"}}, "no more requests for 1 min"),
        ],
    )
    def test_a_bad_download_leaves_nothing(
        self, site: releases.Site, home: Home, faults: dict[str, Any], said: str
    ) -> None:
        revision = upstream.find("b7001")
        site.faults |= faults
        with pytest.raises(PipelineError, match=said):
            fetched(revision, home)
        left = [path.name for path in (home.bins / ".source").iterdir()]
        assert [name for name in left if not name.endswith(".lock")] == []
        site.faults.clear()
        assert fetched(revision, home).folder.is_dir()

    def test_a_whole_archive_that_was_cut(self, site: releases.Site, home: Home) -> None:
        revision = upstream.find("b7001")
        site.faults["tarball"] = site.commits[0].archive[:700]
        with pytest.raises(PipelineError, match="is damaged or incomplete"):
            fetched(revision, home)

    def test_other_files_than_the_commits(
        self, site: releases.Site, home: Home, tree: Path
    ) -> None:
        revision = upstream.find("b7001")
        (tree / "run.sh").write_text("#!/bin/sh\nrm -r ~\n")
        site.faults["tarball"] = releases.packed(tree, revision.commit)
        with pytest.raises(PipelineError, match=f"expected {revision.tree}"):
            fetched(revision, home)
        assert not source.upgraded(home, revision).folder.exists()

    def test_offline(self, site: releases.Site, home: Home) -> None:
        revision = upstream.find("b7001")
        with pytest.raises(PipelineError, match="offline=1 forbids"):
            fetched(revision, home, offline=True)

    def test_too_much(
        self, site: releases.Site, home: Home, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        revision = upstream.find("b7001")
        monkeypatch.setattr(source, "MOST_BYTES", 1000)
        with pytest.raises(PipelineError, match="unpacks to more than"):
            fetched(revision, home)
        monkeypatch.setattr(upstream, "MOST_BYTES", 100)
        with pytest.raises(PipelineError, match="does not end"):
            fetched(revision, home)


class TestSubmodule:
    @pytest.fixture
    def module(self, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(source, "REPOSITORY", tmp_path / "checkout")
        folder = source.submodule()
        folder.parent.mkdir(parents=True)
        tree.rename(folder)
        git(folder, "init", "--quiet")
        for text in ("one\n", "two\n"):
            (folder / "CMakeLists.txt").write_text(text)
            git(folder, "add", "--all")
            git(folder, "commit", "--quiet", "--message=x")
            git(folder, "tag", f"b-{text.strip()}")
        return folder

    @pytest.mark.parametrize("name", ["b-one", 7, 40])
    def test_no_network_for_what_it_has(
        self, module: Path, home: Home, name: str | int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GITHUB_API_URL", "http://127.0.0.1:9")
        commit, tree = git(module, "rev-parse", "b-one", "b-one^{tree}").split()
        named = commit[:name] if isinstance(name, int) else name
        revision = upstream.in_submodule(named, module)
        assert revision is not None
        assert (revision.commit, revision.tree) == (commit, tree)
        found = fetched(revision, home, offline=True)
        assert (found.folder / "CMakeLists.txt").read_text() == "one\n"
        assert (module / "CMakeLists.txt").read_text() == "two\n", "the submodule stays as it is"
        assert git_tree.folder_hash(found.folder) == tree

    @pytest.mark.parametrize("name", ["latest", "b-three", "master", "HEAD", "abcdef1"])
    def test_what_it_has_not(self, module: Path, name: str) -> None:
        assert upstream.in_submodule(name, module) is None
