"""Upstream's programs in `bins/`: archives with stand-ins for programs, from a site over HTTP."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from conftest import REPOSITORY
from fakes import releases as fake
from msgspec.structs import replace

from pipeline.bins import binaries, platform
from pipeline.bins.binaries import Binaries
from pipeline.bins.release import github, releases
from pipeline.bins.release.prebuilt import Prebuilt
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import receipts
from pipeline.core.store.publish import part

scripts = pytest.mark.skipif(os.name == "nt", reason="the stand-ins are shell scripts")
HERE = platform.platform_tag()
UPSTREAMS = {"linux": "ubuntu", "macos": "macos", "windows": "win"}
NO_DEVICE = "Available devices:\n  (none)\n"
VULKAN = "Available devices:\n  Vulkan0: llvmpipe (7936 MiB, 7936 MiB free)\n"


def name(tag: str, backend: str = "", platform: str = HERE, end: str = ".tar.gz") -> str:
    system, _, machine = platform.partition("-")
    words = ["llama", tag, "bin", UPSTREAMS[system], backend, machine]
    return "-".join(filter(None, words)) + end


def server(devices: str = NO_DEVICE) -> str:
    """A llama-server that needs the library beside it."""
    return f"""#!/bin/sh
. "$(dirname "$0")/libllama.so" || exit 1
case $1 in
  --version) echo "version: $version" >&2; echo "built with nothing" >&2 ;;
  --list-devices) cat <<'END'
{devices}END
  ;;
esac
"""


def program_files(tag: str, script: str) -> dict[str, str]:
    return {
        "llama-server": script,
        "llama-quantize": "#!/bin/sh\n",
        "libllama.so.0": f'version="stand-in {tag}"\n',
        "LICENSE": "Do what you like.\n",
    }


def tar(top: str, files: Mapping[str, str], links: Mapping[str, str] | None = None) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as file:
        for path, text in files.items():
            member = tarfile.TarInfo(top + path)
            member.size = len(text.encode())
            member.mode = 0o755 if text.startswith("#!") else 0o644
            file.addfile(member, io.BytesIO(text.encode()))
        for path, end in (links or {}).items():
            member = tarfile.TarInfo(top + path)
            member.type, member.linkname = tarfile.SYMTYPE, end
            file.addfile(member)
    return data.getvalue()


def archive(tag: str, script: str = "") -> bytes:
    """As upstream packs it: a folder on top, links among the libraries."""
    files = program_files(tag, script or server())
    return tar(f"llama-{tag}/", files, {"libllama.so": "libllama.so.0"})


def zipped(files: Mapping[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for path, content in files.items():
            file.writestr(path, content)
    return data.getvalue()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fake.Site]:
    for variable in list(os.environ):
        if variable.lower().endswith("_proxy") or variable in github.TOKENS:
            monkeypatch.delenv(variable)
    monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(tmp_path / "cäche"))
    with fake.start() as site:
        monkeypatch.setenv("GITHUB_API_URL", site.api)
        yield site


@pytest.fixture
def plan(site: fake.Site, tmp_path: Path) -> Prebuilt:
    """The release b7000 for this machine, which the site has."""
    site.add("b7000", {name("b7000"): archive("b7000")})
    home = Home(tmp_path / "mein häus")
    return Prebuilt(platform=HERE, backend="cpu", release="b7000", home=home)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def told(plan: Prebuilt) -> str:
    words = [plan.target / "llama-server", "--version"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stderr.splitlines()[0]


# The plan


def test_places(tmp_path: Path) -> None:
    home = Home(tmp_path)
    pinned = pins().prebuilt
    plan = Prebuilt(
        platform=pinned.platform, backend=pinned.backend, release=pinned.release, home=home
    )
    assert plan.target == home.bins / "windows-x64-cpu"
    assert plan.commit == pinned.release
    assert not plan.is_current()
    for other in (
        replace(plan, platform="linux-x64"),
        replace(plan, backend="vulkan"),
        replace(plan, release="b9"),
    ):
        assert other.tag == f"{other.platform}-{other.backend}-{other.release}"
        assert other.known_release is None
        assert not other.is_current()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("release", ["../b7", "", "b7/../..", "C:\\b7"])
def test_a_release_that_is_none(release: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be latest, or a tag"):
        Prebuilt(platform=HERE, backend="cpu", release=release, home=Home(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("told", "backend", "expected"),
    [
        (NO_DEVICE, "cpu", True),
        (NO_DEVICE, "cuda", False),
        (VULKAN, "vulkan", True),
        (VULKAN, "cuda", False),
        ("  CUDA0: NVIDIA H100 (81559 MiB, 80000 MiB free)", "cuda", True),
        ("  ROCm1: AMD Instinct", "hip", True),
        ("  SYCL0: Intel Arc", "sycl", True),
        ("  MTL0: Apple M3", "metal", True),
        ("  Metal: Apple M1", "metal", True),
        ("ggml_cuda_init: no device: CUDA0", "cuda", False),
        ("  BLAS: Accelerate", "metal", False),
    ],
)
def test_a_device_is_listed(told: str, backend: str, expected: bool) -> None:
    assert binaries.shows(told, backend) is expected


# The work


@scripts
def test_unpacked_once(plan: Prebuilt, site: fake.Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert not plan.is_current()
    plan.make()
    assert "unpacked llama.cpp stand-in b7000" in capsys.readouterr().err
    assert plan.is_current()
    assert plan.target == plan.home.bins / f"{HERE}-cpu-b7000"
    assert told(plan) == "version: stand-in b7000"
    files = ["LICENSE", "libllama.so", "libllama.so.0", "llama-quantize", "llama-server"]
    assert names(plan.target) == [".state.json", *files]
    assert (plan.target / "libllama.so").is_symlink()
    assert names(plan.home.bins) == [plan.target.name]

    entries = receipts.load(plan.target)
    assert sorted(entries) == files
    digest = hashlib.sha256(site.releases[0].assets[name("b7000")]).hexdigest()
    recipe = {"step": "prebuilt", "release": "b7000", "assets": {name("b7000"): f"sha256:{digest}"}}
    assert all(entry.recipe == recipe for entry in entries.values())
    programs = Binaries(folder=plan.target, commit=plan.commit, home=plan.home)
    assert programs.recipe("llama-server") == {
        "commit": "b7000",
        "build": f"sha256:{entries['llama-server'].sha256}",
    }

    asked = len(site.log)
    plan.make(offline=True)
    plan.make()
    assert len(site.log) == asked
    assert capsys.readouterr().err == ""


@scripts
def test_a_copy_is_hashed_and_what_was_changed_is_unpacked_again(
    plan: Prebuilt, site: fake.Site, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.make()
    asked = len(site.log)
    for file in receipts.files_in(plan.target):
        os.utime(file, ns=(1, 1))
    assert not plan.is_current()
    capsys.readouterr()
    plan.make(offline=True)
    assert "rehashing to verify" in capsys.readouterr().err
    assert plan.is_current()

    def damage() -> None:
        (plan.target / "llama-server").write_text(server().replace("stand-in", "st4nd-in"))

    def rewrite() -> None:
        text = (plan.target / "libllama.so.0").read_text()
        (plan.target / "libllama.so.0").write_text(text.replace("stand-in", "st4nd-in"))

    def half_swapped() -> None:
        shutil.copytree(plan.target, part(plan.target))

    changes: list[Callable[[], None]] = [
        *(damage, rewrite, half_swapped),
        lambda: (plan.target / "llama-quantize").unlink(),
        lambda: (plan.target / "libllama.so.0").unlink(),
        lambda: (plan.target / "other.so").touch(),
        lambda: (plan.target / receipts.FILE).write_text("{"),
        lambda: plan.forget(),
        lambda: shutil.rmtree(plan.target),
    ]
    for change in changes:
        change()
        assert not plan.is_current()
        plan.make(offline=True)  # the archive is in the cache
        assert plan.is_current()
        assert told(plan) == "version: stand-in b7000"
    assert len(site.log) == asked

    before = (plan.target / "llama-server").stat().st_ino
    plan.make(force=True)
    assert (plan.target / "llama-server").stat().st_ino != before
    plan.clean()
    assert names(plan.home.bins) == []
    assert not plan.record.exists()
    plan.forget()
    plan.clean()


@scripts
def test_the_latest_stays_until_it_is_asked_for_again(plan: Prebuilt, site: fake.Site) -> None:
    plan = replace(plan, release="latest")
    assert not plan.is_current()
    plan.make()
    assert plan.commit == "b7000"
    assert plan.target.name == f"{HERE}-cpu-b7000"
    site.add("b7001", {name("b7001"): archive("b7001")})
    site.add("b7002", {})
    plan.make()
    assert plan.commit == "b7000"
    plan.make(refresh=True)
    assert plan.commit == "b7001"
    assert told(plan) == "version: stand-in b7001"
    assert names(plan.home.bins) == [f"{HERE}-cpu-b7000", f"{HERE}-cpu-b7001"]
    assert plan.is_current()
    with pytest.raises(PipelineError, match="offline=1 forbids"):
        plan.make(refresh=True, offline=True)
    assert plan.is_current()


@scripts
def test_an_attestation_that_is_required_is_checked_of_what_is_here_already(
    plan: Prebuilt, site: fake.Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan.make()
    insists = replace(plan, attestation="required")
    assert plan.is_current() and not insists.is_current()
    gh = tmp_path / "bin" / "gh"
    gh.parent.mkdir()
    monkeypatch.setenv("PATH", f"{gh.parent}:/usr/bin:/bin")
    gh.write_text("#!/bin/sh\necho '✗ Verification failed' >&2; exit 1\n")
    gh.chmod(0o755)
    with pytest.raises(PipelineError, match="its attestation does not hold"):
        insists.make()
    assert plan.is_current(), "what was there stays"
    gh.write_text(f'#!/bin/sh\necho "$@" >{tmp_path / "asked"}\n')
    insists.make()
    assert insists.is_current() and told(insists) == "version: stand-in b7000"
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:2] == ["attestation", "verify"] and asked[-2:] == ["--repo", "ggml-org/llama.cpp"]
    assert hashlib.sha256(Path(asked[2]).read_bytes()).hexdigest() in {
        hashlib.sha256(data).hexdigest() for data in site.releases[0].assets.values()
    }


def test_offline(plan: Prebuilt, site: fake.Site) -> None:
    with pytest.raises(PipelineError, match=r"release=b7000: .* offline=1 forbids that"):
        plan.make(offline=True)
    assert site.log == []
    assert not plan.home.bins.exists()


@scripts
def test_an_unreadable_record_is_asked_for_again(
    plan: Prebuilt, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.make()
    for text in ("", "{}", "[]", '{"tag": "b7000", "choice": {"programs": {"a": 1}}}'):
        plan.record.write_text(text)
        assert not plan.is_current()
        plan.make()
        assert "treated as absent" in capsys.readouterr().err
        assert json.loads(plan.record.read_text())["tag"] == "b7000"
        assert plan.is_current()


def test_windows_with_cuda_and_its_libraries(
    plan: Prebuilt, site: fake.Site, capsys: pytest.CaptureFixture[str]
) -> None:
    if HERE == "windows-x64":
        pytest.skip("the programs would be tried out")
    programs = {"llama-server.exe": b"MZ", "ggml-cuda.dll": b"MZ", "LICENSE": b"1"}
    runtime = {"cudart64_12.dll": b"MZ", "cublas64_12.dll": b"MZ", "license": b"2"}
    made = {}
    for version in ("12.4", "13.1"):
        made[name("b7001", f"cuda-{version}", "windows-x64", ".zip")] = zipped(programs)
        made[f"cudart-llama-bin-win-cuda-{version}-x64.zip"] = zipped(runtime)
    site.add("b7001", made)
    asked = []

    def driver() -> tuple[int, int]:
        asked.append(True)
        return 12, 8

    plan = replace(
        plan, platform="windows-x64", backend="cuda", release="b7001", driver_cuda=driver
    )
    plan.make()
    plan.make()
    assert asked == [True]
    libraries = ["cublas64_12.dll", "cudart64_12.dll", "ggml-cuda.dll", "llama-server.exe"]
    assert names(plan.target) == [".state.json", "LICENSE", *libraries]
    assert (plan.target / "LICENSE").read_bytes() == b"1"
    assert sorted(receipts.load(plan.target)["LICENSE"].recipe["assets"]) == [
        "cudart-llama-bin-win-cuda-12.4-x64.zip",
        "llama-b7001-bin-win-cuda-12.4-x64.zip",
    ]
    assert "this is another machine" in capsys.readouterr().err


# What is refused


@scripts
def test_a_backend_that_sees_its_device(plan: Prebuilt, site: fake.Site) -> None:
    site.add("b1", {name("b1", "vulkan"): archive("b1", server(VULKAN))})
    plan = replace(plan, backend="vulkan", release="b1")
    plan.make()
    assert told(plan) == "version: stand-in b1"


@scripts
def test_a_backend_that_sees_no_device(plan: Prebuilt, site: fake.Site) -> None:
    site.add("b1", {name("b1", "vulkan"): archive("b1")})
    plan = replace(plan, backend="vulkan", release="b1")
    with pytest.raises(PipelineError, match=r"shows no device of vulkan:\n(.*\n)*.*\(none\)"):
        plan.make()
    assert names(plan.home.bins) == []


@scripts
@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "#!/bin/sh\necho GLIBC_2.99 not found; exit 1\n",
            r"--version ended with 1\):\n  \| GLIBC",
        ),
        ("#!/bin/sh\nkill -ILL $$\n", r"--version ended with -4"),
        ("#!/bin/sh\n", "does not run"),
        ("not a program", "does not run"),
        ("#!/bin/sh\n[ $1 = --version ] && echo 1\n", r"--list-devices ended with 1"),
    ],
    ids=["library", "crash", "silent", "text", "devices"],
)
def test_what_does_not_run_is_not_published(
    plan: Prebuilt, site: fake.Site, script: str, message: str
) -> None:
    plan.make()
    site.releases.clear()
    site.add("b7000", {name("b7000"): archive("b7000", script)})
    with pytest.raises(PipelineError, match=message) as caught:
        plan.make(refresh=True)
    assert "bins=build" in caught.value.hint
    assert told(plan) == "version: stand-in b7000"
    assert names(plan.home.bins) == [plan.target.name]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar("top/", {"llama-cli": "#!/bin/sh\n"}), "there is no llama-server"),
        (tar("", {"a/llama-server": "1", "b/LLAMA-server": "2"}), "two files named"),
        (tar("", {"a/llama-server": "1"}, {"a/x": "../../up"}), "up"),
        (tar("", {"llama-server": "1", "b/c/x": "1"}, {"b/y": "c/x"}), "what is not beside it"),
        (tar("", {"../llama-server": "1"}), "llama-server"),
        (b"no archive", "content"),
        (archive("b7000")[:200], "damaged or cut short"),
    ],
    ids=["server", "twice", "out", "deeper", "above", "none", "short"],
)
def test_archives_that_are_refused(
    plan: Prebuilt, site: fake.Site, data: bytes, message: str
) -> None:
    site.releases.clear()
    site.add("b7000", {name("b7000"): data})
    with pytest.raises(PipelineError, match=message):
        plan.make()
    assert names(plan.home.bins) == []
    assert not plan.is_current()


@scripts
def test_folders_and_hidden_files_in_an_archive(plan: Prebuilt, site: fake.Site) -> None:
    files = program_files("b7000", server())
    inside = {f"build/bin/{path}": text for path, text in files.items()}
    hidden = {"build/bin/._llama-server": "x", receipts.FILE: "{}"}
    links = {"build/bin/libllama.so": "libllama.so.0"}
    site.releases.clear()
    site.add("b7000", {name("b7000"): tar("", inside | hidden, links)})
    plan.make()
    assert plan.is_current()
    assert names(plan.target) == sorted([".state.json", "libllama.so", *files])


# Cut and doubled

MAKE = """
import sys
from pathlib import Path
from pipeline.bins.release import prebuilt
from pipeline.core.paths import Home
prebuilt.Prebuilt(
    platform=sys.argv[1], backend="cpu", release="b8000", home=Home(Path(sys.argv[2]))
).make(force=bool(sys.argv[3]))
"""


def making(plan: Prebuilt, *, force: bool = False) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKE, HERE, plan.home.root, "force" * force],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


@pytest.fixture
def large(plan: Prebuilt, site: fake.Site) -> Prebuilt:
    """A release of 12 MB, which takes some pieces to download."""
    files = program_files("b8000", server()) | {"large": os.urandom(6_000_000).hex()}
    data = tar("llama-b8000/", files, {"libllama.so": "libllama.so.0"})
    site.add("b8000", {name("b8000"): data})
    return replace(plan, release="b8000")


@scripts
def test_a_killed_download_goes_on(
    large: Prebuilt, site: fake.Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.faults["drip"] = 0.002
    with making(large) as process:
        choice = None
        while choice is None or not any(
            b"\n" in path.read_bytes().partition(b"\n")[2]
            for path in releases.cached(choice.programs, large.home).parent.glob(".*.part.*")
        ):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.01)
            choice = large.known_release.choice if large.known_release else None
        process.send_signal(signal.SIGKILL)
    assert not large.target.exists()
    site.faults.clear()
    site.log.clear()
    large.make()
    assert told(large) == "version: stand-in b8000"
    assert site.asked("api") == [f"/download/b8000/{name('b8000')}"] * len(site.asked("files"))
    assert "were downloaded by an earlier run" in capsys.readouterr().err


@scripts
def test_killed_at_any_instant_the_old_or_the_new_is_there(large: Prebuilt) -> None:
    large.make()
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(8):
        with making(large, force=True) as process:
            time.sleep(chance.uniform(0.1, 1.0))
            process.kill()
        assert told(large) == "version: stand-in b8000"
        large.make()
        assert large.is_current()
        assert names(large.home.bins) == [large.target.name]


@scripts
def test_two_at_once_make_it_once(large: Prebuilt, site: fake.Site) -> None:
    site.faults["drip"] = 0.001
    with making(large) as one, making(large) as other:
        ends = [process.communicate(timeout=120)[1] for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), ends
    assert sum("unpacked llama.cpp" in end for end in ends) == 1
    assert sum("waiting for it" in end for end in ends) == 1
    assert site.asked("api").count(f"{fake.BASE}/tags/b8000") == 1
    assert large.is_current()


# The pinned archive


def test_the_pinned_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one: no API is asked, each file is the pinned one, a second run does nothing."""
    monkeypatch.setenv("GITHUB_API_URL", "http://127.0.0.1:9")
    pinned = pins().prebuilt
    home = Home(tmp_path / "mein häus")
    plan = Prebuilt(platform="windows-x64", backend="cpu", release=pinned.release, home=home)
    plan.make()
    assert plan.target == home.bins / "windows-x64-cpu"
    assert plan.is_current()
    found = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in receipts.files_in(plan.target)
    }
    assert found == pinned.files
    assert found == {name: entry.sha256 for name, entry in receipts.load(plan.target).items()}
    assert {"llama-server.exe", "llama-quantize.exe", "ggml-cpu-zen4.dll"} <= found.keys()
    assert not plan.record.exists()
    before = plan.target.stat().st_ino
    plan.make(offline=True)
    assert plan.target.stat().st_ino == before
