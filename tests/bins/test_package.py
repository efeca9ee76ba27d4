"""Packages of stand-in programs: real archives, unpacked by other programs than ours and run."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from bills import invalid
from msgspec.structs import replace

from pipeline.bins.package import pack
from pipeline.bins.package.pack import Package
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.store import receipts
from pipeline.core.store.receipts import Status

linux = pytest.mark.skipif(os.name == "nt", reason="the stand-ins are shell scripts")
COMMIT = "0123456789abcdef" * 2 + "01234567"
SERVER = """#!/bin/sh
here=$(dirname "$0")
echo "version: 1 ($(cat "$here/libggml.so"))"
"""


def programs(folder: Path) -> Path:
    """A folder as `build_bins` publishes it."""
    folder.mkdir(parents=True)
    (folder / "llama-server").write_text(SERVER)
    (folder / "llama-server").chmod(0o755)
    (folder / "libggml.so.0").write_text("a library")
    (folder / "libggml.so").symlink_to("libggml.so.0")
    (folder / ".state.json.lock").touch()
    (folder / "subfolder").mkdir()
    return folder


@pytest.fixture
def plan(tmp_path: Path) -> Package:
    (tmp_path / "LICENSE").write_text("MIT License\n")
    return Package(
        folder=programs(tmp_path / "bins ü"),
        commit=COMMIT,
        tree="t" * 40,
        platform="linux-x64",
        backend="cpu",
        portable=True,
        home=Home(tmp_path / "hôme"),
        license=tmp_path / "LICENSE",
    )


FILES = (
    ["LICENSE", "README.md"]
    + [f"bin/{name}" for name in ("libggml.so", "libggml.so.0", "llama-server")]
    + ["bom.json"]
)


def sums(paths: list[Path]) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_the_members(plan: Package) -> None:
    found = pack.members(plan)
    assert list(found) == [*FILES, "manifest.json"]
    told = json.loads(found["manifest.json"].text)
    assert told.pop("files") == {
        name: {"sha256": found[name].sha256, "size": found[name].size} for name in FILES
    }
    assert told == {
        "schema": 1,
        "name": "llama-cpp",
        "commit": COMMIT,
        "tree": "t" * 40,
        "platform": "linux-x64",
        "backend": "cpu",
        "portable": True,
    }
    assert pack.members(plan) == found
    assert not plan.archive(".zip").parent.exists(), "a plan makes nothing"


def test_the_readme_says_what_it_is(plan: Package) -> None:
    text = pack.readme(plan)
    assert all(word in text for word in (COMMIT, "linux-x64", "cpu", "bin/llama-server", "MIT"))
    assert "see LICENSE" in text and "the processor at hand" in text
    native = pack.readme(replace(plan, portable=False, license=None))
    assert "the very processor" in native and "LICENSE" not in native
    assert "bin\\llama-server.exe" in pack.readme(replace(plan, platform="windows-x64"))


def is_current(plan: Package) -> bool:
    """Whether both archives stand as they would be made."""
    recipe, archives = pack.recipe(pack.members(plan)), map(plan.archive, pack.WRITERS)
    return all(receipts.status(each, recipe) is Status.CURRENT for each in archives)


def test_made_once(plan: Package, capsys: pytest.CaptureFixture[str]) -> None:
    assert not is_current(plan)
    made = pack.make(plan)
    stem = plan.home.bins / "packages" / "llama-cpp-0123456789ab-linux-x64-cpu"
    assert made == [Path(f"{stem}.tar.gz"), Path(f"{stem}.zip")]
    assert is_current(plan)
    assert "packing llama-cpp-0123456789ab-linux-x64-cpu.zip" in capsys.readouterr().err
    stamps = [path.stat().st_mtime_ns for path in made]
    assert pack.make(plan) == made
    assert [path.stat().st_mtime_ns for path in made] == stamps
    assert capsys.readouterr().err == ""

    others = [replace(plan, backend="cpu", portable=False), replace(plan, license=None)]
    assert not any(is_current(other) for other in others)
    (plan.folder / "libggml.so.0").write_text("another!!")
    assert not is_current(plan)
    before = sums(made)
    pack.make(plan)
    assert is_current(plan)
    assert all(one != other for one, other in zip(before, sums(made), strict=True))

    pack.forget(plan)
    assert not is_current(plan) and made[0].exists()
    pack.make(plan)
    pack.clean(plan)
    assert not any(path.exists() for path in made)
    assert receipts.load(made[0].parent) == {}
    pack.clean(plan)


def test_the_bill_of_materials_lists_every_file(plan: Package) -> None:
    source = plan.home.root / "llama.cpp"
    (source / "tools" / "ui").mkdir(parents=True)
    (source / "vendor" / "nlohmann").mkdir(parents=True)
    packages = {"node_modules/a": {"version": "1.0.0"}}
    (source / "tools" / "ui" / "package-lock.json").write_text(json.dumps({"packages": packages}))
    made_by = {"compiler": "12.2.0", "tools": {"cmake": "4.4"}, "page": {"node": "24.0.0"}}
    whole = replace(plan, source=source, made_by=made_by)
    data = json.loads(pack.members(whole)["bom.json"].text)
    assert invalid(data) == []
    found = {each["name"]: each for each in data["components"]}
    files = pack.members(whole)
    for name in [name for name in FILES if name != "bom.json"]:
        assert found[name]["hashes"] == [{"alg": "SHA-256", "content": files[name].sha256}]
    notes = {each["name"]: each["value"] for each in found["llama.cpp"]["properties"]}
    assert notes == {
        "llama-pipeline:git-tree": "t" * 40,
        "llama-pipeline:cmake": "4.4",
        "llama-pipeline:compiler": "12.2.0",
    }
    assert found["llama.cpp"]["components"][0]["name"] == "nlohmann"
    assert found["llama-server's page"]["components"][0]["purl"] == "pkg:npm/a@1.0.0"
    beside = pack.make(whole)[0].with_name(f"{whole.stem}.cdx.json")
    assert beside.read_bytes() == files["bom.json"].text
    prebuilt = pack.members(replace(plan, made_by={"release": "b10605"}))["bom.json"].text
    assert invalid(json.loads(prebuilt)) == [] and b"b10605" in prebuilt


@linux
def test_the_same_bytes_wherever_whenever_and_by_whomever(plan: Package, tmp_path: Path) -> None:
    first = sums(pack.make(plan))
    copied = shutil.copytree(plan.folder, tmp_path / "another folder", symlinks=True)
    for number, path in enumerate(sorted(copied.iterdir(), reverse=True)):
        os.utime(path, ns=(number, number), follow_symlinks=False)
        if os.geteuid() == 0:
            os.chown(path, 1234, 1234, follow_symlinks=False)
    (copied / "llama-server").chmod(0o700)
    (copied / "libggml.so.0").chmod(0o600)
    old = os.umask(0o077)
    try:
        again = replace(plan, folder=copied, home=Home(tmp_path / "another home"))
        assert sums(pack.make(again)) == first
        assert sums(pack.make(plan, force=True)) == first
    finally:
        os.umask(old)


def test_nothing_of_this_machine_is_in_it(plan: Package) -> None:
    packed, zipped = pack.make(plan)
    head = packed.read_bytes()[:10]
    assert head == b"\x1f\x8b\x08\0\0\0\0\0\0\xff", "neither a time nor a name"
    with tarfile.open(packed) as tar:
        infos = tar.getmembers()
    assert [info.name for info in infos] == [*FILES, "manifest.json"]
    assert {(info.uid, info.gid, info.uname, info.gname) for info in infos} == {(0, 0, "", "")}
    assert {info.mtime for info in infos} == {315532800}
    assert {info.mode for info in infos} <= {0o755, 0o644}
    with zipfile.ZipFile(zipped) as archive:
        assert archive.namelist() == [*FILES, "manifest.json"]
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.create_system for info in archive.infolist()} == {3}
    everything = gzip.decompress(packed.read_bytes()) + zipped.read_bytes()
    assert str(plan.home.root).encode() not in everything
    assert str(plan.folder).encode() not in everything


@linux
@pytest.mark.parametrize("tool", ["tar", "unzip"])
def test_it_runs_wherever_it_is_unpacked(plan: Package, tmp_path: Path, tool: str) -> None:
    if not shutil.which(tool):
        pytest.skip(f"needs {tool}")
    packed, zipped = pack.make(plan)
    place = tmp_path / "unpacked"
    place.mkdir()
    command = ["tar", "-xf", packed] if tool == "tar" else ["unzip", "-q", zipped]
    subprocess.run(command, cwd=place, check=True)
    moved = place.rename(tmp_path / "other ü folder")
    out = subprocess.check_output([moved / "bin" / "llama-server"], text=True)
    assert out == "version: 1 (a library)\n"
    assert (moved / "bin" / "libggml.so").readlink() == Path("libggml.so.0")
    told = json.loads((moved / "manifest.json").read_text())["files"]
    assert sorted(told) == FILES
    for name, entry in told.items():
        data = (moved / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def test_known_sums_are_taken_from_the_receipts(plan: Package) -> None:
    """A build stamped its programs: their content is hashed once, while it is packed."""
    server = plan.folder / "llama-server"
    receipts.change(server, receipts.stamp(server, {}, seconds=0, digest="f" * 64))
    assert pack.members(plan)["bin/llama-server"].sha256 == "f" * 64
    with pytest.raises(PipelineError, match="llama-server: changed while it was packed"):
        pack.make(plan)
    assert [path for path in plan.archive(".zip").parent.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
@pytest.mark.parametrize("ending", [".tar.gz", ".zip"])
def test_a_file_that_changes_meanwhile(
    plan: Package, tmp_path: Path, change: str, ending: str
) -> None:
    found, file = pack.members(plan), plan.folder / "libggml.so.0"
    if change == "gone":
        file.unlink()
    else:
        file.write_text({"shorter": "a", "longer": "a library and more"}[change])
    with pytest.raises(PipelineError, match=r"libggml\.so\.0: changed while it was packed"):
        pack.WRITERS[ending](tmp_path / "x", found)


def test_what_cannot_be_packed(plan: Package, tmp_path: Path) -> None:
    (plan.folder / "libout.so").symlink_to("../LICENSE")
    with pytest.raises(PipelineError, match=r"is a link to .*LICENSE"):
        pack.make(plan)
    (plan.folder / "libout.so").unlink()
    (plan.folder / "libgone.so").symlink_to("missing")
    with pytest.raises(PipelineError, match="is a link to missing"):
        pack.make(plan)
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(PipelineError, match="no llama-server in it") as caught:
            pack.make(replace(plan, folder=folder))
        assert "build_bins" in caught.value.hint
