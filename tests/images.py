"""The runtime image, built by buildah on a base that debootstrap makes, and what runs in it.

Both are kept in a store of their own in the user's cache folder: only what changed is made again.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import debian
import psutil
import pytest
import workers
from conftest import REPOSITORY, wait_for, with_programs
from filelock import FileLock

from pipeline.core.paths import Home, cache

BASE = "localhost/debian:bookworm-slim"  # a stand-in for the public one
STORE = cache(Home(REPOSITORY)) / "tests" / "containers"
LARGEST_STORE = 8_000_000_000  # bytes
LEFT_SECONDS = 6 * 3600  # no run of the tests lasts that long
TAG = "localhost/llama-pipeline:test-"
ISOLATION = ("--isolation", "chroot", "--network", "host")
NOT_BUILT_FROM = (".git", ".venv", "bins", "models", "logs", "run", "vendor", ".cache", "tests")
# What public images of Debian have and debootstrap does not: nothing that apt got is kept.
CLEAN = """rm -rf "$1"/usr/share/doc/* "$1"/usr/share/man/* "$1"/usr/share/locale/*
rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*
cat >"$1"/etc/apt/apt.conf.d/docker-clean <<'END'
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };
Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";
END
"""


def require_buildah() -> None:
    """Have buildah and debootstrap; the test is skipped where they cannot work."""
    debian.require("buildah", "debootstrap")
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("building an image takes root, and the right to mount")


def buildah(*words: str, check: bool = True) -> str:
    """Run it on the tests' own store; what it prints."""
    done = subprocess.run(command(*words), capture_output=True, text=True, errors="replace")
    assert not check or done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr}"
    return done.stdout.strip()


def command(*words: str) -> list[str]:
    return ["buildah", "--root", str(STORE / "root"), "--runroot", str(STORE / "run"), *words]


def has(image: str) -> bool:
    return bool(buildah("images", "--quiet", image, check=False))


def make_base() -> None:
    """Debian as debootstrap makes it, in place of the public image."""
    if has(BASE):
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        debian.call("debootstrap", "--variant=minbase", "bookworm", str(root))
        subprocess.run(["sh", "-c", CLEAN, "sh", str(root)], check=True)
        container = buildah("from", "scratch")
        buildah("add", "--quiet", container, str(root), "/")
        buildah("config", "--cmd", "bash", container)
        buildah("commit", "--quiet", "--rm", container, BASE)


def pip_settings(folder: Path) -> list[str]:
    """buildah's words for what this machine's pip is told: packages come from where its own do.

    Files and folders that the settings name are mounted, under other names.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    told: dict[str, list[str]] = {}
    mounts: dict[Path, str] = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        words = value.strip("'\"").replace("\\n", " ").split()
        name = name.rpartition(".")[2].replace("_", "-")
        told.setdefault(name, []).extend(_inside(word, mounts) for word in words)
    parser = configparser.RawConfigParser()
    parser["global"] = {name: " ".join(dict.fromkeys(words)) for name, words in told.items()}
    file = folder / "pip.conf"
    with file.open("w") as out:
        parser.write(out)
    pairs = [(file, "/etc/pip.conf"), *mounts.items()]
    return [word for here, there in pairs for word in ("--volume", f"{here}:{there}:ro")]


def _inside(word: str, mounts: dict[Path, str]) -> str:
    """A word of pip's settings as it is in the build. Of an index the folder above is mounted: its
    pages lead there."""
    parsed = urlparse(word)
    path = Path(unquote(parsed.path) if parsed.scheme == "file" else word)
    if not path.is_absolute() or not path.exists():
        return word
    mounted = path.parent if parsed.scheme == "file" else path
    place = mounts.setdefault(mounted, f"/mnt/pip/{len(mounts)}")
    return f"file://{place}/{path.name}" if parsed.scheme == "file" else place


def used() -> int:
    """Bytes in the store. Where a container of another worker vanishes meanwhile, du may give up
    without a word: the next run will know."""
    done = subprocess.run(["du", "-sk", STORE / "root"], capture_output=True, text=True)
    return int((done.stdout.split() or ["0"])[0]) * 1024


def make_room() -> None:
    """Remove what was left hours ago: containers of killed runs, images of other checkouts."""
    for container in json.loads(buildah("containers", "--json") or "[]") or []:
        folder = STORE / "root" / "overlay-containers" / container["id"]
        if folder.exists() and time.time() - folder.stat().st_mtime > LEFT_SECONDS:
            buildah("rm", container["id"], check=False)
    for made in json.loads(buildah("images", "--json")):
        ours = [name for name in made["names"] or () if TAG in name]
        if ours and time.time() - made["created"] > LEFT_SECONDS:
            buildah("rmi", *ours, check=False)
    buildah("rmi", "--prune", check=False)  # layers of what was built before


def build(context: Path, package: Path, target: str, tag: str, scratch: Path) -> None:
    """Build a stage of docker/Dockerfile with the programs of an archive in the context."""
    STORE.mkdir(parents=True, exist_ok=True)
    with FileLock(STORE / ".lock"):
        if used() > LARGEST_STORE:
            make_room()
        make_base()
        buildah(
            *("bud", *ISOLATION, "--layers", "--format", "docker", "--pull-never"),
            *("--file", str(REPOSITORY / "docker" / "Dockerfile"), "--target", target),
            *("--build-arg", f"BASE={BASE}", "--build-arg", "BINS=package"),
            *("--build-arg", f"PACKAGE={package.relative_to(context)}"),
            *("--build-arg", "SERVICE_NAME=under test", "--build-arg", "SERVICE_VERSION=1.2"),
            *pip_settings(scratch),
            *("--tag", tag, str(context)),
        )


@dataclass(frozen=True)
class Running:
    """An entry point under way; what it prints goes to files, so that it can be read meanwhile."""

    process: subprocess.Popen[bytes]
    printed: Path
    said: Path  # on stderr
    is_container: bool

    @property
    def out(self) -> str:
        return self.printed.read_text("utf-8")

    @property
    def err(self) -> str:
        return self.said.read_text("utf-8")

    def until(self, text: str, seconds: float = 90) -> None:
        """Wait until it has said this."""
        try:
            wait_for(
                lambda: text in self.out + self.err or self.process.poll() is not None, seconds
            )
        finally:
            assert text in self.out + self.err, f"{self.out}\n{self.err}"

    def end(self, seconds: float = 60) -> int:
        """Its exit status, once it has ended."""
        return self.process.wait(seconds)

    def signal(self, number: int = signal.SIGTERM) -> None:
        """A signal to what is the container's first process."""
        first = psutil.Process(self.process.pid)
        if self.is_container:
            below = first.children(recursive=True)
            first = next(one for one in below if one.name() == "tini")
        first.send_signal(number)


@dataclass(frozen=True)
class Machine:
    """Where an entry point is run, here or in a container of the image, with what it is given.
    Paths are the same inside, and so is the network."""

    folder: Path  # for a test's files
    home: Path
    env: dict[str, str] = field(default_factory=dict)
    container: str = ""

    @contextlib.contextmanager
    def running(self, *words: str, name: str = "", **env: str) -> Iterator[Running]:
        """The entry point with these words, or with `name` another command; nothing of it is left
        after the block."""
        env = {**self.env, **env}
        log = Path(tempfile.mkdtemp(dir=self.home.parent))
        with (log / "out").open("wb") as out, (log / "err").open("wb") as err:
            process = subprocess.Popen(
                self._command(words, name, env),
                env={**os.environ, **({} if self.container else self._own(env))},
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            running = Running(process, log / "out", log / "err", bool(self.container))
            try:
                yield running
            finally:
                # Asked, it ends its servers, too: they are not below it where it started them.
                with contextlib.suppress(psutil.Error, StopIteration, subprocess.TimeoutExpired):
                    running.signal()
                    running.end()
                end_all(process)

    def __call__(self, *words: str, status: int = 0, name: str = "", **env: str) -> Running:
        """Run to the end, which must be `status`."""
        with self.running(*words, name=name, **env) as running:
            found = running.end(120)
        assert found == status, f"{words}: {found}\n{running.out}\n{running.err}"
        return running

    def _own(self, env: dict[str, str]) -> dict[str, str]:
        return {"LLAMA_PIPELINE_HOME": str(self.home), "PYTHONUNBUFFERED": "1", **env}

    def _command(self, words: tuple[str, ...], name: str, env: dict[str, str]) -> list[str]:
        if not self.container:
            return [sys.executable, "-m", "pipeline.deploy", name or "entrypoint", *words]
        switches = [f"--env={key}={value}" for key, value in env.items()]
        switches += [f"--volume={self.folder}:{self.folder}:ro", f"--volume={self.home}:/data"]
        called = [name] if name else config(self.container)["Entrypoint"]
        return command("run", *ISOLATION, *switches, self.container, "--", *called, *words)


def config(container: str) -> Any:
    """What the image says of itself."""
    told = json.loads(buildah("inspect", "--type", "container", container))
    return told["Docker"]["config"]


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Kill it, and what it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        for one in [first, *first.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


@pytest.fixture(scope="session")
def package(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of the programs in `bins/`, made for this very processor."""

    def make(folder: Path) -> None:
        with_programs(built, folder / "hôme")("package", "backend=cpu", "portable=0")

    made = workers.shared(tmp_path_factory, "packed", make) / "hôme" / "bins" / "packages"
    return next(made.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def context(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the archive in it."""
    return checkout(tmp_path_factory.mktemp("context") / "project", package)


def checkout(made: Path, package: Path) -> Path:
    """A copy of the project with an archive in it, to build images from."""
    shutil.copytree(REPOSITORY, made, ignore=_top_ignored)
    (made / "bins" / "packages").mkdir(parents=True)
    shutil.copy(package, made / "bins" / "packages")
    return made


def _top_ignored(folder: str, names: list[str]) -> list[str]:
    top = Path(folder) == REPOSITORY
    return [x for x in names if x == "__pycache__" or (top and x in NOT_BUILT_FROM)]


@pytest.fixture(scope="session")
def image(context: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of the runtime image."""
    require_buildah()
    checkout_id = hashlib.sha256(os.fsencode(REPOSITORY)).hexdigest()[:8]
    tag = TAG + checkout_id
    archive = context / "bins" / "packages" / package.name
    build(context, archive, "runtime", tag, tmp_path_factory.mktemp("build"))
    return tag


@pytest.fixture(scope="session")
def container(image: str) -> Iterator[str]:
    """A container of the image: a place to run commands in."""
    made = buildah("from", "--pull-never", image)
    yield made
    buildah("rm", made)


@pytest.fixture(scope="session")
def shared(gguf: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that anybody may read, with a model and a package."""
    folder = tmp_path_factory.mktemp("shared") / "geteilt ü"
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(gguf.read_bytes())
    (folder / package.name).write_bytes(package.read_bytes())
    folder.chmod(0o755)
    return folder
