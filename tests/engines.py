"""What builds images and runs containers in the tests: Docker's engine, else buildah.

A private dockerd is started where Docker is installed and this is root. It listens on a socket of
its own, keeps its images in the user's cache folder, and leaves the machine's firewall and networks
alone. Tests that run at once share it; the last one stops it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import debian
import psutil
import pytest
from conftest import REPOSITORY, wait_for
from filelock import FileLock

from pipeline.core.paths import Home, cache
from pipeline.core.store.publish import part, publish_folder, remove

KEPT = cache(Home(REPOSITORY)) / "tests"
LARGEST_STORE = 4_000_000_000  # bytes
LEFT_SECONDS = 2 * 3600  # no run of the tests lasts that long
TAG = "localhost/llama-pipeline:test-"
ISOLATION = ("--isolation", "chroot", "--network", "host")
# Published ports work without any of them.
HANDS_OFF = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false")


@dataclass(frozen=True)
class Container:
    """One to be run. It has this machine's network."""

    name: str
    image: str
    words: tuple[str, ...] = ()
    program: str = ""  # in place of the image's entry point
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: Mapping[Path, str] = field(default_factory=dict)  # by what is mounted; `:ro` may follow
    read_only: bool = False  # nothing may be written, but in memory at /tmp and /data


def call(*words: str, check: bool = True) -> str:
    """Run it; what it prints on stdout."""
    done = subprocess.run(words, capture_output=True, text=True, errors="replace")
    assert not check or done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr}"
    return done.stdout.strip()


def used(store: Path) -> int:
    """Bytes in a store. Where a container of another worker vanishes meanwhile, du may give up
    without a word: the next run will know."""
    done = subprocess.run(["du", "-sk", store], capture_output=True, text=True)
    return int((done.stdout.split() or ["0"])[0]) * 1024


class Buildah:
    """buildah, in chroot isolation: a container sees this machine's processes."""

    def __init__(self) -> None:
        self.store = KEPT / "containers"
        self.lock = FileLock(self.store / ".lock")
        self.store.mkdir(parents=True, exist_ok=True)
        with self.lock:
            if used(self.store) > LARGEST_STORE:
                self._make_room()

    def close(self) -> None:
        """Nothing runs on."""

    def __call__(self, *words: str, check: bool = True) -> str:
        return call(*self._command(*words), check=check)

    def _command(self, *words: str) -> list[str]:
        root, run = self.store / "root", self.store / "run"
        return ["buildah", "--root", str(root), "--runroot", str(run), *words]

    def has(self, image: str) -> bool:
        return bool(self("images", "--quiet", image, check=False))

    def load(self, root: Path, image: str) -> None:
        """Make an image of a root file system."""
        made = self("from", "scratch")
        self("add", "--quiet", made, str(root), "/")
        self("commit", "--quiet", "--rm", made, image)

    def derive(self, image: str, base: str, files: Mapping[Path, str], **env: str) -> None:
        """Make an image of another one, with files and variables."""
        if self.has(image):
            return
        made = self("from", "--pull-never", base)
        for at, to in files.items():
            self("copy", "--quiet", made, str(at), to)
        for name, value in env.items():
            self("config", "--env", f"{name}={value}", made)
        self("commit", "--quiet", "--rm", made, image)

    def build(self, context: Path, tag: str, *words: str, mounts: Mapping[Path, str]) -> None:
        """Build a Dockerfile. Meanwhile the files and folders of `mounts` are there."""
        shown = [x for at, to in mounts.items() for x in ("--volume", f"{at}:{to}:ro")]
        kind = ("--layers", "--format", "docker", "--pull-never")
        self("bud", *ISOLATION, *kind, *shown, *words, "--tag", tag, str(context))

    def config(self, image: str) -> Any:
        """What the image says of itself."""
        return json.loads(self("inspect", "--type", "image", image))["Docker"]["config"]

    def command(self, it: Container) -> list[str]:
        """What runs a container in the foreground."""
        self("from", "--pull-never", "--name", it.name, it.image)
        start = [it.program] if it.program else self.config(it.image)["Entrypoint"]
        words = [*start, *(it.words or (() if it.program else self._own_words(it.image)))]
        if it.read_only:
            return self._locked_down(it, words)
        mounts = [f"--volume={at}:{to}" for at, to in it.mounts.items()]
        env = [f"--env={name}={value}" for name, value in it.env.items()]
        return self._command("run", *ISOLATION, *env, *mounts, it.name, "--", *words)

    def _own_words(self, image: str) -> list[str]:
        return self.config(image)["Cmd"] or []

    def _locked_down(self, it: Container, words: list[str]) -> list[str]:
        """As `docker run --read-only`: in a process namespace of its own."""
        script = """set -e
            mount --bind "$1" "$1" && mount --bind "$2" "$1$3"
            mount -o remount,bind,ro "$1$3"
            mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc"
            for place in tmp data; do mount -t tmpfs -o mode=1777 tmpfs "$1/$place"; done
            mount -o remount,bind,ro "$1"
            root=$1; shift 3
            exec chroot --userspec=10001:10001 "$root" env -i "$@"
        """
        ((at, to),) = it.mounts.items()
        own = self.config(it.image)["Env"]
        named = [*own, *(f"{name}={value}" for name, value in it.env.items())]
        apart = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh")
        return [*apart, self("mount", it.name), str(at), to.removesuffix(":ro"), *named, *words]

    def within(self, name: str, words: tuple[str, ...], env: Mapping[str, str]) -> list[str]:
        """What runs something in a container that is up: any other sees its processes too."""
        return []

    def signal(self, name: str, process: subprocess.Popen[bytes], number: int) -> None:
        """Send it to the container's first process."""
        below = psutil.Process(process.pid).children(recursive=True)
        next(one for one in below if one.name() == "tini").send_signal(number)

    def is_up(self, name: str, process: subprocess.Popen[bytes]) -> bool:
        """Whether its first process runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
            return any(one.name() == "tini" for one in below)
        return False

    def remove(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Remove a container, and end what runs in it."""
        end_all(process)
        root = Path(self("mount", name))
        if (daemon := root / "run" / "sshd.pid").exists():  # no namespace ends it
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(int(daemon.read_text())).kill()
        self("umount", name)
        self("rm", name)

    def _make_room(self) -> None:
        """Remove what was left hours ago: containers of killed runs, images of other checkouts."""
        for container in json.loads(self("containers", "--json") or "[]") or []:
            folder = self.store / "root" / "overlay-containers" / container["id"]
            if folder.exists() and time.time() - folder.stat().st_mtime > LEFT_SECONDS:
                self("rm", container["id"], check=False)
        for made in json.loads(self("images", "--json")):
            ours = [name for name in made["names"] or () if TAG in name]
            if ours and time.time() - made["created"] > LEFT_SECONDS:
                self("rmi", *ours, check=False)
        self("rmi", "--prune", check=False)  # layers of what was built before


class Docker:
    """A dockerd of the tests' own, and the docker program with its plugins."""

    def __init__(self) -> None:
        self.store = KEPT / "docker"
        self.store.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.store / ".lock")
        # A socket's path is short. The folder is root's alone.
        named = hashlib.sha256(os.fsencode(self.store)).hexdigest()[:8]
        self.run = Path("/run") / f"llama-pipeline-tests-{named}"
        self.run.mkdir(mode=0o700, exist_ok=True)
        self.env = {"DOCKER_HOST": f"unix://{self.run}/docker.sock"}
        self._daemon: subprocess.Popen[bytes] | None = None
        self._users = (self.run / "users").open("w")
        try:
            with self.lock:
                self._open()
        except BaseException:
            self._users.close()
            raise

    def _open(self) -> None:
        """Have the plugins, and an engine that answers, which stays while this one uses it."""
        import fcntl  # which Windows does not have

        self.env["DOCKER_CONFIG"] = str(plugins(self.store / f"plugins-{debian.SUITE}"))
        fcntl.flock(self._users, fcntl.LOCK_SH)
        if not self._answers():
            self._start()
        if used(self.store / "root") > LARGEST_STORE:
            hours = f"until={LEFT_SECONDS // 3600}h"
            self("image", "prune", "--all", "--force", "--filter", hours, check=False)
            self("builder", "prune", "--force", "--filter", hours, check=False)

    def _answers(self) -> bool:
        return bool(self("version", "--format", "{{.Server.Version}}", check=False))

    def _start(self) -> None:
        """Raises RuntimeError where it does not come up, as in a container without the rights."""
        places = (f"--data-root={self.store / 'root'}", f"--exec-root={self.run / 'exec'}")
        whole = (f"--pidfile={self.run / 'docker.pid'}", *HANDS_OFF)
        with (self.run / "dockerd.log").open("wb") as log:
            self._daemon = daemon = subprocess.Popen(
                ["dockerd", f"--host={self.env['DOCKER_HOST']}", *places, *whole],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        with contextlib.suppress(TimeoutError, AssertionError):
            wait_for(lambda: daemon.poll() is not None or self._answers(), 30)
        if daemon.poll() is not None or not self._answers():
            end_all(daemon)
            lines = (self.run / "dockerd.log").read_text(errors="replace").splitlines()
            raise RuntimeError(f"dockerd does not start: {' '.join(lines[-1:])}")

    def close(self) -> None:
        """Stop the engine, unless other tests use it."""
        import fcntl

        with self.lock:
            try:
                fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if self._daemon:
                    self._daemon.returncode = 0  # it is theirs now
                return
            finally:
                self._users.close()
            with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
                daemon = psutil.Process(int((self.run / "docker.pid").read_text()))
                daemon.terminate()
                psutil.wait_procs([daemon], 30)
            if self._daemon:
                self._daemon.wait(30)

    def __call__(self, *words: str, check: bool = True) -> str:
        return call(*self.cli(*words), check=check)

    def cli(self, *words: str) -> list[str]:
        """Docker's own command line, for this engine."""
        return ["env", *(f"{name}={value}" for name, value in self.env.items()), "docker", *words]

    def has(self, image: str) -> bool:
        return bool(self("images", "--quiet", image))

    def load(self, root: Path, image: str) -> None:
        """Make an image of a root file system."""
        with tempfile.TemporaryDirectory() as folder:
            tar = f"{folder}/root.tar"
            call("tar", "--create", "--file", tar, "--directory", str(root), ".")
            self("import", tar, image)

    def derive(self, image: str, base: str, files: Mapping[Path, str], **env: str) -> None:
        """Make an image of another one, with files and variables."""
        with tempfile.TemporaryDirectory() as folder:
            lines = [f"FROM {base}"]
            for number, (at, to) in enumerate(files.items()):
                copy = Path(folder, str(number))
                shutil.copytree(at, copy) if at.is_dir() else shutil.copy(at, copy)
                lines.append(f"COPY {number} {to}")
            lines += [f'ENV {name}="{value}"' for name, value in env.items()]
            Path(folder, "Dockerfile").write_text("\n".join(lines))
            self("buildx", "build", "--tag", image, folder)

    def build(self, context: Path, tag: str, *words: str, mounts: Mapping[Path, str]) -> None:
        """Build a Dockerfile. `mounts` must be in its base: no build can mount what lies here."""
        self("buildx", "build", "--network", "host", *words, "--tag", tag, str(context))

    def config(self, image: str) -> Any:
        """What the image says of itself."""
        return json.loads(self("image", "inspect", image))[0]["Config"]

    def command(self, it: Container) -> list[str]:
        """What runs a container in the foreground."""
        switches = [f"--volume={at}:{to}" for at, to in it.mounts.items()]
        switches += [f"--env={name}={value}" for name, value in it.env.items()]
        if it.read_only:
            switches += ["--read-only", "--tmpfs=/tmp", "--tmpfs=/data:exec"]
        if it.program:
            switches.append(f"--entrypoint={it.program}")
        whole = ("run", "--rm", "--network=host", f"--name={it.name}", *switches)
        return self.cli(*whole, it.image, *it.words)

    def within(self, name: str, words: tuple[str, ...], env: Mapping[str, str]) -> list[str]:
        """What runs something in a container that is up."""
        return self.cli(
            "exec", *(f"--env={key}={value}" for key, value in env.items()), name, *words
        )

    def signal(self, name: str, process: subprocess.Popen[bytes], number: int) -> None:
        """Send it to the container's first process."""
        self("kill", f"--signal={int(number)}", name)

    def is_up(self, name: str, process: subprocess.Popen[bytes]) -> bool:
        """Whether it runs."""
        return process.poll() is None

    def remove(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Remove a container, and end what runs in it."""
        if process.poll() is None:
            self("rm", "--force", name, check=False)
        end_all(process)


def plugins(folder: Path) -> Path:
    """A configuration of docker's with the plugins that build, and read Compose files: this
    machine's own, else those of Debian 13."""
    found = [call("docker", name, "version", check=False) for name in ("buildx", "compose")]
    if all(found):
        return folder.with_name("no-configuration")
    if not folder.exists():
        made = part(folder)
        try:
            made.mkdir(parents=True)
            debian.fetch(("docker-buildx", "docker-compose"), made)
            (made / "cli-plugins").symlink_to("usr/libexec/docker/cli-plugins")
            publish_folder(made, folder)
        finally:
            remove(made)
    return folder


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Kill it, and what it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        for one in [first, *first.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def choose() -> Docker | Buildah:
    """Docker's engine where it can run; else buildah; else the test is skipped."""
    if os.geteuid():
        pytest.skip("as root: images are built and run with a private dockerd, or with buildah")
    if os.environ.get("TESTS_WITHOUT_DOCKER") != "1" and all(
        map(shutil.which, ("docker", "dockerd"))
    ):
        try:
            return Docker()
        except (RuntimeError, pytest.skip.Exception) as error:
            print(f"{error}; buildah is used")
    debian.require("buildah")
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("building an image takes the right to mount")
    return Buildah()


@pytest.fixture(scope="session")
def engine() -> Iterator[Docker | Buildah]:
    chosen = choose()
    yield chosen
    chosen.close()


@pytest.fixture
def docker(engine: Docker | Buildah) -> Docker:
    """Docker alone: what others do otherwise, or not at all."""
    if not isinstance(engine, Docker):
        pytest.skip("needs Docker's engine, as root: apt-get install docker.io")
    return engine
