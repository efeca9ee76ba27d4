"""The runtime image, on a base that debootstrap makes, and what runs in it.

Both are kept in a store of their own in the user's cache folder: only what changed is made again.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlparse

import debian
import pytest
import workers
from conftest import REPOSITORY, wait_for, with_programs
from engines import TAG, Buildah, Container, Docker, end_all

BASE = "localhost/debian:bookworm-slim"  # a stand-in for the public one
READY = "localhost/debian:with-settings"  # with what pip is told on this machine
OWN_TRUST = Path("/usr/local/share/ca-certificates")  # what somebody added to this machine
NOT_BUILT_FROM = (".git", ".venv", "bins", "models", "logs", "run", "vendor", ".cache", "tests")
# What public images of Debian have and debootstrap does not: nothing that apt got is kept.
CLEAN = """rm -rf "$1"/usr/share/doc/* "$1"/usr/share/man/* "$1"/usr/share/locale/*
rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*
cat >"$1"/etc/apt/apt.conf.d/docker-clean <<'END'
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };
Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";
END
"""


def make_base(engine: Docker | Buildah) -> None:
    """Debian as debootstrap makes it, in place of the public image."""
    if engine.has(BASE):
        return
    debian.require("debootstrap")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        debian.call("debootstrap", "--variant=minbase", "bookworm", str(root))
        subprocess.run(["sh", "-c", CLEAN, "sh", str(root)], check=True)
        engine.load(root, BASE)


def pip_settings(folder: Path) -> dict[Path, str]:
    """What this machine's pip is told, so that packages come from where its own do: what lies here,
    and where a build needs it.

    Files and folders that the settings name have other names there.
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
    return {file: "/etc/pip.conf", **mounts}


def own_settings(engine: Docker | Buildah, base: str, name: str, scratch: Path, **env: str) -> str:
    """The base with this machine's certificates and, where a build cannot mount them, pip's
    settings. Packages on this machine's disk are left out there: they take too much space."""
    trust = {OWN_TRUST: f"{OWN_TRUST}/"} if OWN_TRUST.is_dir() else {}
    if isinstance(engine, Docker):
        trust |= {at: to for at, to in pip_settings(scratch).items() if at.is_file()}
    engine.derive(name, base, trust, **env)
    return name


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


def build(
    engine: Docker | Buildah, context: Path, package: Path, target: str, tag: str, scratch: Path
) -> None:
    """Build a stage of docker/Dockerfile with the programs of an archive in the context."""
    with engine.lock:
        make_base(engine)
        base = own_settings(engine, BASE, READY, scratch)
        given = {
            "BASE": base,
            "BINS": "package",
            "PACKAGE": str(package.relative_to(context)),
            "SERVICE_NAME": "under test",
            "SERVICE_VERSION": "1.2",
        }
        engine.build(
            context,
            tag,
            *("--file", str(REPOSITORY / "docker" / "Dockerfile"), "--target", target),
            *(x for name, value in given.items() for x in ("--build-arg", f"{name}={value}")),
            mounts=pip_settings(scratch),
        )


@dataclass(frozen=True)
class Running:
    """An entry point under way; what it prints goes to files, so that it can be read meanwhile."""

    process: subprocess.Popen[bytes]
    printed: Path
    said: Path  # on stderr
    engine: Docker | Buildah | None  # of a container
    name: str

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
        if self.engine:
            self.engine.signal(self.name, self.process, number)
        else:
            self.process.send_signal(number)


@dataclass(frozen=True)
class Machine:
    """Where an entry point is run, here or in a container of the image, with what it is given.
    Paths are the same inside, and so is the network."""

    folder: Path  # for a test's files
    home: Path
    env: dict[str, str] = field(default_factory=dict)
    image: str = ""
    engine: Docker | Buildah | None = None
    up: list[str] = field(default_factory=list)  # the names of containers that run

    @contextlib.contextmanager
    def running(
        self, *words: str, name: str = "", read_only: bool = False, **env: str
    ) -> Iterator[Running]:
        """The entry point with these words, or with `name` another command; nothing of it is left
        after the block. While a container is up, it is what runs inside that one."""
        env = {**self.env, **env}
        log = Path(tempfile.mkdtemp(dir=self.home.parent))
        called = f"test-{uuid.uuid4().hex[:12]}"
        command, is_inside = self._command(called, words, name, read_only, env)
        with (log / "out").open("wb") as out, (log / "err").open("wb") as err:
            process = subprocess.Popen(
                command,
                env={**os.environ, **({} if self.engine else self._own(env))},
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            running = Running(process, log / "out", log / "err", self.engine, called)
            self.up.append(called)
            try:
                yield running
            finally:
                self.up.remove(called)
                if not is_inside:
                    self._end(running)

    def _end(self, running: Running) -> None:
        # Asked, it ends its servers, too: they are not below it where it started them.
        with contextlib.suppress(Exception):
            if running.process.poll() is None:
                running.signal()
            running.end()
        if self.engine:
            self.engine.remove(running.name, running.process)
        end_all(running.process)

    def __call__(self, *words: str, status: int = 0, name: str = "", **env: str) -> Running:
        """Run to the end, which must be `status`."""
        with self.running(*words, name=name, **env) as running:
            found = running.end(120)
        assert found == status, f"{words}: {found}\n{running.out}\n{running.err}"
        return running

    def _own(self, env: dict[str, str]) -> dict[str, str]:
        return {"LLAMA_PIPELINE_HOME": str(self.home), **env}

    def _command(
        self, called: str, words: tuple[str, ...], name: str, read_only: bool, env: dict[str, str]
    ) -> tuple[list[str], bool]:
        """The command line, and whether it runs inside a container that is up."""
        if self.engine is None:
            return [sys.executable, "-m", "pipeline.deploy", name or "entrypoint", *words], False
        whole = (name, *words) if name else words
        if self.up and (inside := self.engine.within(self.up[-1], whole, env)):
            return inside, True
        mounts = {self.folder: f"{self.folder}:ro", self.home: "/data"}
        if read_only:
            mounts = {self.folder: "/models:ro"}
        it = Container(called, self.image, words, name, env, mounts, read_only)
        return self.engine.command(it), False


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
def image(
    engine: Docker | Buildah,
    context: Path,
    package: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """The name of the runtime image."""
    return built_image(engine, context, package, "runtime", tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="session")
def ray_image(
    engine: Docker | Buildah,
    context: Path,
    package: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """The name of the image of a node of a Ray cluster."""
    return built_image(engine, context, package, "runtime-ray", tmp_path_factory.mktemp("build"))


def built_image(
    engine: Docker | Buildah, context: Path, package: Path, target: str, scratch: Path
) -> str:
    """The name of the image of a stage, with this checkout's programs."""
    checkout_id = hashlib.sha256(os.fsencode(REPOSITORY)).hexdigest()[:8]
    tag = f"{TAG}{target}-{checkout_id}"
    archive = context / "bins" / "packages" / package.name
    build(engine, context, archive, target, tag, scratch)
    return tag


@pytest.fixture
def in_image(engine: Docker | Buildah, image: str, shared: Path, tmp_path: Path) -> Machine:
    """A container of the image: a place to run commands in."""
    home = tmp_path / "daten ü"
    home.mkdir()
    home.chmod(0o777)
    return Machine(shared, home, image=image, engine=engine)


@pytest.fixture(scope="session")
def shared(gguf: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that anybody may read, with a model and a package."""
    folder = tmp_path_factory.mktemp("shared") / "geteilt ü"
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(gguf.read_bytes())
    (folder / package.name).write_bytes(package.read_bytes())
    folder.chmod(0o755)
    return folder
