from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from pipeline.bins.compile import git_tree, source
from pipeline.commands import check, request
from pipeline.commands.model import Model
from pipeline.commands.programs import Programs
from pipeline.core import packages
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import receipts

FILES = {"CMakeLists.txt": b"project(x)\n", "ggml/src/a.c": b"int a;\n", "build.sh": b"#!/bin/sh\n"}
INSIDE = "package-1.0/vendor/llama.cpp"


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", folder, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "build.sh").chmod(0o755)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home, a checkout without a submodule, and a git without the user's settings."""
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(source, "REPOSITORY", tmp_path / "checkout")
    (tmp_path / "user").mkdir()
    return Home(tmp_path / "home")


@pytest.fixture
def module(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checked-out submodule, clean at the pin."""
    folder = tmp_path / "checkout" / "vendor" / "llama.cpp"
    write(folder)
    (folder / ".gitignore").write_text("build/\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=pinned")
    commit, found = git(folder, "rev-parse", "HEAD", "HEAD^{tree}").split()
    changed = replace(pins(), llama_cpp_commit=commit, llama_cpp_tree=found)
    monkeypatch.setattr(source, "pins", lambda: changed)
    return folder


class TestSubmodule:
    def test_clean_at_the_pin(self, module: Path, home: Home) -> None:
        found = source.find(home)
        assert found == source.Source(
            folder=module,
            commit=source.pins().llama_cpp_commit,
            tree=source.pins().llama_cpp_tree,
            local=False,
        )
        assert found.tree == git_tree.folder_hash(module)
        assert source.is_current(found)
        assert not found.fetched

    def test_what_git_ignores_does_not_count(self, module: Path, home: Home) -> None:
        (module / "build").mkdir()
        (module / "build" / "x.o").touch()
        os.utime(module / "CMakeLists.txt", ns=(1, 1))
        assert not source.find(home).local

    @pytest.mark.parametrize("name", ["CMakeLists.txt", "ggml/src/größe.c", "new/folder/x y.c"])
    def test_a_changed_or_new_file_is_another_source(
        self, module: Path, home: Home, name: str
    ) -> None:
        clean = source.find(home)
        (module / name).parent.mkdir(parents=True, exist_ok=True)
        (module / name).write_text("one")
        one = source.find(home)
        assert one.local
        assert one.commit == clean.commit
        assert one == source.find(home)  # stable
        os.utime(module / name, ns=(1, 1))
        assert one == source.find(home)
        (module / name).write_text("two")
        two = source.find(home)
        git(module, "add", "--all")
        assert two == source.find(home)
        assert len({clean.tree, one.tree, two.tree}) == 3
        (module / name).write_text("one")
        assert one == source.find(home)

    def test_a_removed_or_renamed_file(self, module: Path, home: Home) -> None:
        (module / "ggml" / "src" / "a.c").rename(module / "ggml" / "src" / "b.c")
        renamed = source.find(home)
        (module / "ggml" / "src" / "b.c").unlink()
        removed = source.find(home)
        assert renamed.local
        assert removed.local
        assert renamed.tree != removed.tree
        git(module, "checkout", "--quiet", ".")
        assert not source.find(home).local

    def test_another_commit(self, module: Path, home: Home) -> None:
        (module / "CMakeLists.txt").write_text("project(y)\n")
        git(module, "commit", "--quiet", "--all", "--message=other")
        found = source.find(home)
        assert found.local
        assert [found.commit, found.tree] == git(module, "rev-parse", "HEAD", "HEAD^{tree}").split()

    def test_files_without_git(self, module: Path, home: Home) -> None:
        (module / ".git").rename(module.parent / "elsewhere")
        assert not source.find(home).local
        (module / "CMakeLists.txt").write_text("changed")
        with pytest.raises(PipelineError, match="not the pinned llama") as caught:
            source.find(home)
        assert git_tree.folder_hash(module) in caught.value.message

    def test_a_git_that_talks_on_stderr(self, module: Path, home: Home) -> None:
        git(module, "config", "core.fsmonitor", "/no/such/monitor")
        assert not source.find(home).local

    def test_the_callers_git_variables_do_not_reach_it(
        self, module: Path, home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """As in a git hook of the checkout that calls doit."""
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
        monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
        assert not source.find(home).local

    def test_nor_do_credentials(
        self, module: Path, home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """git runs programs that the checkout's own settings name."""
        seen, monitor = tmp_path / "seen", tmp_path / "monitor"
        monitor.write_text(f"#!/bin/sh\nenv >'{seen}'\n")
        monitor.chmod(0o755)
        git(module, "config", "core.fsmonitor", str(monitor))
        monkeypatch.setenv("HF_TOKEN", "secret")
        source.find(home)
        assert "PATH=" in seen.read_text() and "secret" not in seen.read_text()

    def test_what_git_refuses_is_passed_on(self, module: Path, home: Home) -> None:
        (module / ".git" / "HEAD").write_text("ref: refs/heads/none\n")
        with pytest.raises(PipelineError, match="`git rev-parse") as caught:
            source.find(home)
        assert str(module) in caught.value.message

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can give away")
    def test_the_reason_of_a_refusal_is_told(self, module: Path, home: Home) -> None:
        """A checkout that another user owns, as in a container: git names the way out."""
        subprocess.run(["chown", "-R", "12345", module], check=True)
        with pytest.raises(PipelineError, match="dubious ownership"):
            source.find(home)

    def test_neither_fetch_nor_clean_touches_it(
        self,
        module: Path,
        home: Home,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("LLAMA_PIPELINE_HOME", str(home.root))
        check.check_request(Model(request.Request(), Programs(request.Request(), home)))
        assert capsys.readouterr().err == "", "nothing is worth saying"
        (module / "CMakeLists.txt").write_text("changed")
        found = source.find(home)
        check.check_request(Model(request.Request(), Programs(request.Request(), home)))
        assert f"recorded as {found.tree}" in capsys.readouterr().err
        source.fetch(found, home)
        source.clean(found)
        source.forget(found)
        assert (module / "CMakeLists.txt").read_text() == "changed"
        assert not home.root.exists()


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"evil", **more: object) -> Member:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    for key, value in more.items():
        setattr(info, key, value)
    if not info.isreg():
        info.size = 0
    return info, content


GOOD = [
    member(f"{INSIDE}/{name}", content, mode=0o755 if name.endswith(".sh") else 0o644)
    for name, content in FILES.items()
]


def archive(path: Path, *members: Member) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return path


class TestUnpack:
    def test_only_what_is_inside(self, tmp_path: Path) -> None:
        other = [member("setup.py"), member("package-1.0/vendor/other/x"), member(f"{INSIDE}2/x")]
        found = source._unpack(archive(tmp_path / "a", *GOOD, *other), INSIDE, tmp_path / "out")
        write(tmp_path / "expected")
        assert (
            found
            == git_tree.folder_hash(tmp_path / "expected")
            == git_tree.folder_hash(tmp_path / "out")
        )
        assert os.access(tmp_path / "out" / "build.sh", os.X_OK)

    @pytest.mark.parametrize(
        "name", ["../evil", "x/../../evil", "..", "x/..", f"../../../{INSIDE}/evil", "//evil"]
    )
    def test_names_that_lead_outside_are_refused(self, tmp_path: Path, name: str) -> None:
        out = tmp_path / "deep" / "out"
        with pytest.raises(PipelineError, match="a file in it is named"):
            source._unpack(archive(tmp_path / "a", *GOOD, member(f"{INSIDE}/{name}")), INSIDE, out)
        assert {path.name for path in tmp_path.rglob("*")} & {"evil"} == set()

    @pytest.mark.parametrize(
        "hostile",
        [
            member("/evil"),
            member("../evil"),
            member(f"/{INSIDE}/evil"),
            member(f"x/../{INSIDE}/evil"),
            member(f"./{INSIDE}/evil"),
            member(f"{INSIDE}/evil", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            member(f"{INSIDE}/evil", type=tarfile.LNKTYPE, linkname=f"{INSIDE}/CMakeLists.txt"),
            member(f"{INSIDE}/evil", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
            member(f"{INSIDE}/evil", type=tarfile.BLKTYPE),
            member(f"{INSIDE}/evil", type=tarfile.FIFOTYPE),
            member(f"{INSIDE}/evil", type=tarfile.DIRTYPE),
            member(f"{INSIDE}/.git"),
        ],
        ids=lambda one: f"{one[0].name}-{one[0].type.decode()}",
    )
    def test_what_is_no_plain_file_inside_is_skipped(self, tmp_path: Path, hostile: Member) -> None:
        out = tmp_path / "deep" / "out"
        found = source._unpack(archive(tmp_path / "a", hostile, *GOOD), INSIDE, out)
        write(tmp_path / "expected")
        assert found == git_tree.folder_hash(tmp_path / "expected")
        assert not any(path.name in ("evil", ".git") for path in tmp_path.rglob("*"))

    def test_a_file_does_not_follow_a_link_before_it(self, tmp_path: Path) -> None:
        (tmp_path / "outside").mkdir()
        link = member(f"{INSIDE}/sub", type=tarfile.SYMTYPE, linkname=str(tmp_path / "outside"))
        path = archive(tmp_path / "a", link, member(f"{INSIDE}/sub/x", b"x"))
        source._unpack(path, INSIDE, tmp_path / "out")
        assert list((tmp_path / "outside").iterdir()) == []
        assert (tmp_path / "out" / "sub" / "x").read_bytes() == b"x"

    def test_special_modes_are_not_taken_over(self, tmp_path: Path) -> None:
        path = archive(tmp_path / "a", member(f"{INSIDE}/x", mode=0o7777))
        source._unpack(path, INSIDE, tmp_path / "out")
        assert (tmp_path / "out" / "x").stat().st_mode & 0o7777 == 0o755


@pytest.fixture
def pinned(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Pin an archive of the given members, and put it where fetched archives are kept."""

    def pin(*members: Member, tree_hash: str = "") -> Path:
        path = archive(tmp_path / "package-1.0.tar.gz", *members)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        write(tmp_path / "expected")
        own = replace(pins().llama_cpp_archive, file=path.name, folder=INSIDE, sha256=digest)
        wanted = tree_hash or git_tree.folder_hash(tmp_path / "expected")
        changed = replace(pins(), llama_cpp_archive=own, llama_cpp_tree=wanted)
        monkeypatch.setattr(source, "pins", lambda: changed)
        target = packages.cached(own, home)
        target.parent.mkdir(parents=True)
        return path.rename(target)

    return pin


class TestArchive:
    def test_unpacked_once(
        self, home: Home, pinned: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        kept = pinned(*GOOD)
        found = source.find(home)
        assert found.fetched
        assert not found.local
        assert not source.is_current(found)
        source.fetch(found, home)
        assert git_tree.folder_hash(found.folder) == source.pins().llama_cpp_tree == found.tree
        assert source.is_current(found)
        assert "unpacking" in capsys.readouterr().err
        kept.unlink()
        source.fetch(found, home)
        assert capsys.readouterr().err == ""
        left = [path.name for path in found.folder.parent.iterdir() if path.suffix != ".lock"]
        assert sorted(left) == [".state.json", found.folder.name]

    def test_an_edited_tree_is_unpacked_again(
        self, home: Home, pinned: Callable[..., Path]
    ) -> None:
        pinned(*GOOD)
        found = source.find(home)
        source.fetch(found, home)
        (found.folder / "CMakeLists.txt").write_text("changed")
        assert not source.is_current(found)
        source.fetch(found, home)
        assert (found.folder / "CMakeLists.txt").read_bytes() == FILES["CMakeLists.txt"]
        assert source.is_current(found)

    def test_a_copied_tree_is_hashed_and_kept(
        self, home: Home, pinned: Callable[..., Path]
    ) -> None:
        kept = pinned(*GOOD)
        found = source.find(home)
        source.fetch(found, home)
        for path in [found.folder, *found.folder.rglob("*")]:
            os.utime(path, ns=(1, 1))
        assert not source.is_current(found)
        kept.unlink()  # it could not be unpacked again
        source.fetch(found, home)
        assert source.is_current(found)

    def test_what_a_killed_run_left_is_mended(
        self, home: Home, pinned: Callable[..., Path]
    ) -> None:
        pinned(*GOOD)
        found = source.find(home)
        for left in (f".{found.folder.name}.part", f".{found.folder.name}.old"):
            (found.folder.parent / left).mkdir(parents=True)
            (found.folder.parent / left / "half").touch()
        source.fetch(found, home)
        assert source.is_current(found)
        assert git_tree.folder_hash(found.folder) == found.tree
        left = [path.name for path in found.folder.parent.iterdir() if path.suffix != ".lock"]
        assert sorted(left) == [".state.json", found.folder.name]

    @pytest.mark.parametrize(
        ("members", "told"),
        [
            (GOOD[:-1], "tree hash"),
            ([*GOOD, member(f"{INSIDE}/more")], "tree hash"),
            ([*GOOD, member(f"{INSIDE}/../more")], "is named"),
        ],
        ids=["less", "more", "outside"],
    )
    def test_another_tree_is_refused(
        self, home: Home, pinned: Callable[..., Path], members: list[Member], told: str
    ) -> None:
        pinned(*members)
        found = source.find(home)
        with pytest.raises(PipelineError, match=told):
            source.fetch(found, home)
        assert not source.is_current(found)
        assert [p.name for p in found.folder.parent.iterdir() if p.suffix != ".lock"] == []

    def test_another_pin_is_another_source(self, home: Home, pinned: Callable[..., Path]) -> None:
        pinned(*GOOD)
        found = source.find(home)
        source.fetch(found, home)
        assert not source.is_current(replace(found, tree="0" * 40))
        assert not source.is_current(replace(found, commit="0" * 40))

    def test_forget_and_clean(self, home: Home, pinned: Callable[..., Path]) -> None:
        pinned(*GOOD)
        found = source.find(home)
        source.fetch(found, home)
        source.forget(found)
        assert receipts.load(found.folder.parent) == {}
        source.forget(found)
        assert not source.is_current(found)
        assert found.folder.exists()
        source.fetch(found, home)
        source.clean(found)
        assert not found.folder.exists()
        assert receipts.load(found.folder.parent) == {}
