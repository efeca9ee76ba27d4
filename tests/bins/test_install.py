"""Packages installed: stand-ins that really run, real kills, and archives that deserve none."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Doit
from disks import disk
from kills import Kills

from pipeline.bins import platform as host
from pipeline.bins.package import install, pack
from pipeline.bins.package.install import Installed, Packaged, platform_of
from pipeline.bins.package.pack import Package
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.store import receipts
from pipeline.core.store.publish import part

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-ins are shell scripts")
Files = Mapping[str, bytes | str]


def server(who: str) -> str:
    """A program that says who it is, out of the library beside it."""
    return f'#!/bin/sh\n[ "$(cat "$(dirname "$0")/libllama.so")" = {who} ] && echo version: {who}\n'


def files(who: str) -> dict[str, bytes | str]:
    return {"README.md": "read me", "bin/llama-server": server(who), "bin/libllama.so": who}


def write_tar(path: Path, content: Files, mode: int = 0o755) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in content.items():
            raw = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(raw), mode
            tar.addfile(info, io.BytesIO(raw))
    return path


def write_zip(path: Path, content: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o100755 << 16
            archive.writestr(info, data)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "mein häus")


@pytest.fixture
def target(home: Home) -> Path:
    return install.default_target(home)


def told(target: Path) -> str:
    return subprocess.check_output([target / "bin" / "llama-server"], text=True).strip()


def left(home: Home) -> list[str]:
    return sorted(path.name for path in home.bins.iterdir() if path.suffix != ".lock")


@pytest.fixture
def old(tmp_path: Path, home: Home, target: Path) -> Path:
    """The archive of the package that stands in the target."""
    archive = write_tar(tmp_path / "old.tar.gz", files("old"))
    install.install(archive, target, home=home)
    return archive


def refused(archive: Path, target: Path, home: Home, match: str) -> PipelineError:
    """It is refused, and the old package stands as it stood."""
    before = receipts.load(target / "bin")
    with pytest.raises(PipelineError, match=match) as caught:
        install.install(archive, target, home=home)
    assert told(target) == "version: old"
    assert left(home) == ["package"]
    assert receipts.load(target / "bin") == before
    assert install.is_current(target)
    return caught.value


# What is good


def test_round_trip(tmp_path: Path, home: Home, target: Path) -> None:
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, text in (("llama-server", server("ours")), ("libllama.so.0", "ours")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "libllama.so").symlink_to("libllama.so.0")
    plan = Package(
        folder=folder,
        commit="c" * 40,
        tree="t" * 40,
        platform=host.platform_tag(),
        backend="cpu",
        portable=False,
        home=home,
    )
    for archive in pack.make(plan):
        done = install.install(archive, target, home=home)
        assert done == Installed(folder=target, version="version: ours", commit="c" * 40)
        assert done.bin == target / "bin"
        assert told(target) == "version: ours"
        assert (target / "bin" / "libllama.so").is_symlink()
        assert install.is_current(target, install.recipe(archive, home))
        assert set(receipts.load(done.bin)) == {"llama-server", "libllama.so", "libllama.so.0"}
        moved = shutil.copytree(target, tmp_path / f"other ü {archive.name}", symlinks=True)
        assert told(moved) == "version: ours"


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".zip"])
def test_anyones_archive(
    tmp_path: Path, home: Home, target: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write = write_zip if ending == ".zip" else write_tar
    content = {**files("theirs"), "README": "", "share/more.txt": "more"}
    archive = write(tmp_path / f"anyone's{ending}", content)
    done = install.install(archive, target, home=home)
    assert done == Installed(folder=target, version="version: theirs", commit="")
    said = capsys.readouterr().err
    assert "no manifest.json, so its files are taken as they are" in said
    assert f"installed llama.cpp theirs in {target}" in said
    assert (target / "share" / "more.txt").read_text() == "more"


def test_installed_once(
    home: Home, target: Path, old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, inode = install.recipe(old, home), target.stat().st_ino
    assert install.is_current(target) and install.is_current(target, wanted)
    capsys.readouterr()
    done = install.install(old, target, home=home)
    assert capsys.readouterr().err == "" and target.stat().st_ino == inode
    assert done == install.installed(target)

    copy = Path(shutil.copy(old, tmp_path / "copy.tgz"))  # the name makes no difference
    install.install(copy, target, home=home)
    assert target.stat().st_ino == inode

    os.utime(target / "bin" / "llama-server", ns=(1, 1))  # copied: hashed once
    assert not install.is_current(target, wanted)
    install.install(old, target, home=home)
    assert target.stat().st_ino == inode and install.is_current(target, wanted)

    (target / "bin" / "libllama.so").write_text("changed by hand")
    assert not install.is_current(target)
    install.install(old, target, home=home)
    assert target.stat().st_ino != inode and told(target) == "version: old"

    receipts.invalidate(target / "bin" / "libllama.so")  # one receipt is missing
    assert not install.is_current(target)
    install.install(old, target, home=home)
    assert install.is_current(target)

    inode = target.stat().st_ino
    install.install(old, target, home=home, force=True)
    assert target.stat().st_ino != inode

    Packaged(target).forget()
    assert install.installed(target) is None and not install.is_current(target)
    assert told(target) == "version: old"
    install.install(old, target, home=home)
    Packaged(target).clean()
    assert left(home) == [] and install.installed(target) is None
    Packaged(target).clean()


def test_another_takes_its_place(tmp_path: Path, home: Home, target: Path, old: Path) -> None:
    (target / "bin" / "llama-cli").touch()
    new = write_zip(tmp_path / "new.zip", files("new"))
    assert not install.is_current(target, install.recipe(new, home))
    install.install(new, target, home=home)
    assert told(target) == "version: new"
    assert not (target / "bin" / "llama-cli").exists()
    assert install.is_current(target, install.recipe(new, home))
    assert not install.is_current(target, install.recipe(old, home))
    assert left(home) == ["package"]


def test_a_running_program_is_not_disturbed(tmp_path: Path, home: Home, target: Path) -> None:
    cat = shutil.which("cat")
    assert cat
    script = '#!/bin/sh\n[ "$1" = --version ] && echo version: 1 || exec "$(dirname "$0")/cat"\n'
    content = {"README": "", "bin/llama-server": script, "bin/cat": Path(cat).read_bytes()}
    install.install(write_tar(tmp_path / "one.tar", content), target, home=home)
    with subprocess.Popen(
        [target / "bin" / "llama-server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as running:
        assert running.stdin and running.stdout
        running.stdin.write(b"before\n")
        running.stdin.flush()
        assert running.stdout.readline() == b"before\n"
        install.install(write_tar(tmp_path / "two.tar", files("new")), target, home=home)
        running.stdin.write(b"after\n")
        running.stdin.close()
        assert running.stdout.readline() == b"after\n"
        assert running.wait(timeout=60) == 0
    assert told(target) == "version: new"


# What is not


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"bin/llama-server": "x"}, r"not a package: there is no README\* at its root"),
        ({"README": "x"}, "there is no bin/llama-server"),
        ({"README": "x", "llama-server": "x"}, "there is no bin/llama-server"),
        ({f"top/{name}": text for name, text in files("x").items()}, "no bin/llama-server"),
        ({**files("x"), "../evil": "x"}, "leads out of the archive"),
        ({**files("x"), "bin/LLAMA-server": "x"}, "are the same name"),
    ],
)
def test_another_form(
    tmp_path: Path, home: Home, target: Path, old: Path, content: Files, match: str
) -> None:
    refused(write_tar(tmp_path / "x.tar.gz", content), target, home, match)
    refused(write_zip(tmp_path / "x.zip", content), target, home, match)


def listed(content: Files) -> dict[str, Any]:
    raw = {name: data.encode() if isinstance(data, str) else data for name, data in content.items()}
    return {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in raw.items()
    }


def with_manifest(path: Path, content: Files, **other: Any) -> Path:
    told = {"schema": 1, "commit": "c" * 40, "files": listed(content), **other}
    return write_tar(path, {**content, "manifest.json": json.dumps(told)})


def test_a_good_manifest(tmp_path: Path, home: Home, target: Path) -> None:
    archive = with_manifest(tmp_path / "x.tar", files("good"))
    assert install.install(archive, target, home=home).commit == "c" * 40


GOOD = listed(files("x"))
LIBRARY = GOOD["bin/libllama.so"]


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"files": {}}, "'README.md' is not listed in its manifest"),
        ({"files": {**GOOD, "bin/more": LIBRARY}}, "'bin/more' is not in the archive"),
        ({"files": {**GOOD, "../../x": LIBRARY}}, r"'\.\./\.\./x' is not in the archive"),
        (
            {"files": {**GOOD, "bin/libllama.so": {**LIBRARY, "sha256": "0" * 64}}},
            "'bin/libllama.so' is not the file listed",
        ),
        ({"files": {**GOOD, "bin/libllama.so": {**LIBRARY, "size": 2}}}, "is not the file listed"),
        ({"files": {**GOOD, "README.md": {"size": 7}}}, "cannot be read: .*`sha256`"),
        ({"files": {**GOOD, "README.md": []}}, "cannot be read: .*got `array`"),
        ({"files": []}, r"cannot be read: .*got `array` - at `\$\.files`"),
        ({"schema": 2}, "schema 2, this version reads 1"),
        ({"commit": "\u001b[2J"}, r"cannot be read: .* - at `\$\.commit`"),
        ({"commit": 7}, r"cannot be read: .*got `int` - at `\$\.commit`"),
    ],
)
def test_a_manifest_that_lies(
    tmp_path: Path, home: Home, target: Path, old: Path, other: dict[str, Any], match: str
) -> None:
    refused(with_manifest(tmp_path / "x.tar.gz", files("x"), **other), target, home, match)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, b"\xff\xfe", '{"schema": ' + "1" * 5000 + "}"]
)
def test_what_is_no_manifest(
    tmp_path: Path, home: Home, target: Path, old: Path, text: str | bytes
) -> None:
    archive = write_tar(tmp_path / "x.tar.gz", {**files("x"), "manifest.json": text})
    refused(archive, target, home, "its manifest.json cannot be read")


def test_a_manifest_too_large(tmp_path: Path, home: Home, target: Path, old: Path) -> None:
    text = json.dumps({"schema": 1, "files": "x" * 5_000_000})
    archive = write_tar(tmp_path / "x.tar", {**files("x"), "manifest.json": text})
    refused(archive, target, home, "is larger than 4000000 bytes")


@pytest.mark.parametrize(
    ("program", "match"),
    [
        ("#!/bin/sh\necho a bad day; exit 3", r"status 3\)\n  \| a bad day"),
        ("#!/bin/sh\necho no library >&2; exit 127", r"  \| no library"),
        ("#!/bin/sh\nkill -ILL $$", "status -4"),
        ("#!/bin/sh\nexit 0", "says nothing"),
        ("#!/no/such/shell\n", "No such file"),
        ("", "says nothing|Exec format error"),
        (b"\0\1\2\3 no program", "Exec format error"),
        ("#!/bin/sh\nprintf 'a\\033[2Jb\\377\\n'; exit 1", r"a\?\[2Jb\?"),
    ],
)
def test_a_program_that_does_not_start(
    tmp_path: Path, home: Home, target: Path, old: Path, program: str | bytes, match: str
) -> None:
    archive = write_tar(tmp_path / "x.tar.gz", {**files("x"), "bin/llama-server": program})
    assert host.platform_tag() in refused(archive, target, home, match).hint


def test_a_program_that_hangs(
    tmp_path: Path, home: Home, target: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "PATIENCE", 0.5)
    content = {**files("x"), "bin/llama-server": "#!/bin/sh\nexec sleep 600"}
    archive = write_tar(tmp_path / "x.tar", content)
    refused(archive, target, home, "timed out after 0.5 seconds")


def test_a_program_nobody_may_run(tmp_path: Path, home: Home, target: Path, old: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", files("x"), mode=0o644)
    assert "into=" in str(refused(archive, target, home, "may not be run").hint)


def test_a_disk_that_forbids_programs(tmp_path: Path, home: Home) -> None:
    with disk(tmp_path / "data", "noexec"):
        into = tmp_path / "data" / "soft"
        with pytest.raises(PipelineError, match="may not be run") as caught:
            install.install(write_tar(tmp_path / "x.tar", files("x")), into, home=home)
        assert "noexec" in caught.value.hint and not into.exists()


def test_a_full_disk_names_the_variable_that_chose_it(bare: Doit, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", files("x"))
    with disk(tmp_path / "data", "size=1m"):
        full = bare("install_package", f"pkg={archive}", f"into={tmp_path}/data/x", status=1)
    assert "set into= to" in full.err and "LLAMA_PIPELINE_HOME" not in full.err


def elf(machine: int, order: str = "<") -> bytes:
    head = b"\x7fELF\x02" + (b"\x01" if order == "<" else b"\x02") + b"\x01" + bytes(9)
    return head + struct.pack(order + "HH", 3, machine) + bytes(100)


def pe(machine: int) -> bytes:
    return b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0" + struct.pack("<H", machine)


PROGRAMS = {
    "linux-arm64": elf(0xB7),
    "linux-x64": elf(0x3E),
    "linux-riscv64": elf(0xF3),
    "linux-ppc64": elf(0x15, ">"),
    "linux-0x1234": elf(0x1234),
    "windows-x64": pe(0x8664),
    "windows-arm64": pe(0xAA64),
    "macos-arm64": b"\xcf\xfa\xed\xfe" + struct.pack("<I", 0x0100000C),
    "macos-x64": b"\xcf\xfa\xed\xfe" + struct.pack("<I", 0x01000007),
    "macos": b"\xca\xfe\xba\xbe" + bytes(8),
}


@pytest.mark.parametrize("platform", PROGRAMS)
def test_programs_of_other_machines(
    tmp_path: Path, home: Home, target: Path, old: Path, platform: str
) -> None:
    name = "bin/llama-server" + (".exe" if platform.startswith("windows") else "")
    content = {"README": "", name: PROGRAMS[platform]}
    (tmp_path / "program").write_bytes(PROGRAMS[platform])
    assert platform_of(tmp_path / "program") == platform
    here = host.platform_tag()
    match = f"program for {platform}, this is {here}" if platform != here else "does not run"
    refused(write_zip(tmp_path / "x.zip", content), target, home, match)


def test_the_platform_of_real_and_of_no_programs(tmp_path: Path) -> None:
    assert platform_of(Path(sys.executable)).split("-")[0] == host.platform_tag().split("-")[0]
    for data in (b"", b"#!/bin/sh", b"\x7f", b"text"):
        (tmp_path / "x").write_bytes(data)
        assert platform_of(tmp_path / "x") == ""
    (tmp_path / "x").write_bytes(b"MZ")
    assert platform_of(tmp_path / "x") == "windows-0x0"


def test_no_archive(tmp_path: Path, home: Home, target: Path, old: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        install.install(tmp_path / "missing.zip", target, home=home)
    with pytest.raises(UsageError, match="there is no such file"):
        install.install(tmp_path, target, home=home)
    assert told(target) == "version: old"


def test_a_folder_of_somebody_is_not_replaced(
    tmp_path: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = write_tar(tmp_path / "x.tar", files("x"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(PipelineError, match="holds something that was not installed"):
        install.install(archive, mine, home=home)
    Packaged(mine).clean()
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    prefix = tmp_path / "usr" / "local"  # somebody's own llama-server, among much else
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "llama-server").touch()
    with pytest.raises(PipelineError, match="holds something that was not installed"):
        install.install(archive, prefix, home=home)
    Packaged(prefix).clean()
    assert (prefix / "bin" / "llama-server").exists()
    (tmp_path / "file").touch()
    capsys.readouterr()
    with pytest.raises(PipelineError, match="is not a folder"):
        install.install(archive, tmp_path / "file", home=home)
    assert "receipts" not in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    install.install(archive, tmp_path / "empty", home=home)
    assert told(tmp_path / "empty") == "version: x"


def test_an_archive_that_changes_meanwhile(
    tmp_path: Path, home: Home, target: Path, old: Path
) -> None:
    """Its own llama-server changes it: what was unpacked is not what stands there now."""
    archive = tmp_path / "x.tar"
    program = f"#!/bin/sh\necho more >>'{archive}'; echo version: x\n"
    write_tar(archive, {**files("x"), "bin/llama-server": program})
    refused(archive, target, home, "changed while it was installed")


# What interrupts it

ONE = """
import resource, sys
from pathlib import Path
from pipeline.bins.package import install
from pipeline.core.paths import Home
archive, root, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("ready", flush=True)
home = Home(root)
install.install(archive, install.default_target(home), home=home)
"""
FOREVER = """
import itertools, sys
from pathlib import Path
from pipeline.bins.package import install
from pipeline.core.paths import Home
home = Home(Path(sys.argv[1]))
print("ready", flush=True)
for archive in itertools.cycle(sys.argv[2:]):
    install.install(Path(archive), install.default_target(home), home=home)
"""


def start(script: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_killed_at_any_instant(tmp_path: Path, home: Home, target: Path) -> None:
    seen, cut = set(), 0
    kills = Kills(25, 0.4, lambda: seen == {"a", "b"} and cut > 3)
    dice = kills.chance
    more = {f"bin/lib{i}.so": dice.randbytes(20_000) for i in range(20)}
    archives = {
        "a": write_tar(tmp_path / "a.tar.gz", {**files("a"), **more}),
        "b": write_zip(tmp_path / "b.zip", {**files("b"), **more}),
    }
    for _ in kills:
        with start(FOREVER, home.root, *dice.sample(sorted(archives.values()), 2)) as process:
            assert process.stdout and process.stdout.readline() == "ready\n"
            kills.wait()
            process.send_signal(signal.SIGKILL)
        if target.exists():
            who = told(target).removeprefix("version: ")
            seen.add(who)
            assert len(list((target / "bin").glob("lib*.so"))) == 21
            assert set(receipts.load(target / "bin")) >= {"llama-server", "libllama.so"}
        cut += part(target).exists()
        wanted = dice.choice("ab")
        install.install(archives[wanted], target, home=home)
        assert told(target) == f"version: {wanted}"
        assert install.is_current(target, install.recipe(archives[wanted], home))
        assert left(home) == ["package"]


def test_two_at_once(tmp_path: Path, home: Home, target: Path) -> None:
    program = '#!/bin/sh\necho run >>"$COUNT"\nsleep 1\necho version: slow\n'
    archive = write_tar(tmp_path / "x.tar", {**files("x"), "bin/llama-server": program})
    os.environ["COUNT"] = str(tmp_path / "count")
    try:
        both = [start(ONE, archive, home.root, 0) for _ in range(2)]
        said = [process.communicate(timeout=60)[1] for process in both]
    finally:
        del os.environ["COUNT"]
    assert [process.returncode for process in both] == [0, 0], said
    assert (tmp_path / "count").read_text() == "run\n", "it was installed once"
    assert any("another run is making package; waiting for it" in text for text in said)
    assert install.is_current(target, install.recipe(archive, home))


def test_a_file_that_cannot_be_written(tmp_path: Path, home: Home, target: Path, old: Path) -> None:
    large = {**files("new"), "bin/large.so": os.urandom(2_000_000)}
    archive = write_tar(tmp_path / "x.tar.gz", large)
    with start(ONE, archive, home.root, 1_000_000) as process:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "File too large" in err
    assert told(target) == "version: old"
    assert left(home) == ["package"]
    install.install(archive, target, home=home)
    assert told(target) == "version: new"
