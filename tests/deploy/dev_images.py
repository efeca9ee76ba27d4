"""The development image as it is made with Docker, and with PeiDocker: by buildah, as root.

What cannot be had here is stood in for: the public base by one of debootstrap, Pixi's archive by
one of a program that says its version.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import debian
import images
import psutil
import pytest
import yaml
from conftest import REPOSITORY, wait_for
from filelock import FileLock
from images import buildah

from pipeline.core import paths
from pipeline.core.packages import pip_environment
from pipeline.core.paths import Home
from pipeline.core.store.locks import only_one

PEI_DOCKER = "pei-docker==2.0.1"
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
MARK = "FROM ${DEV_BASE} AS infer-dev"
# Certificates that somebody added to this machine, what they and the system's become when
# ca-certificates is installed, and who has to be told.
OWN_TRUST = Path("/usr/local/share/ca-certificates")
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
TRUST = ("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")


def call(*words: str | Path, folder: Path | None = None, **environ: str) -> str:
    """Run a program; what it prints. The test fails with all of it where the program does."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=1200,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-6000:]}"
    return done.stdout


def pei_docker() -> Path:
    """The real program, in an environment of its own that all checkouts share."""
    home = Home(REPOSITORY)
    name = hashlib.sha256(f"{PEI_DOCKER} {sys.version}".encode()).hexdigest()[:12]
    folder = paths.cache(home) / f"pei-docker-{name}"
    program, done = folder / "bin" / "pei-docker-cli", folder / "done"
    with only_one(folder):
        if not done.exists():
            venv.create(folder, clear=True)
            into = ("-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet")
            call(sys.executable, *into, PEI_DOCKER, **pip_environment())
            done.touch()
    return program


def schema_errors(compose: Path) -> str:
    """What the compose specification's own schema has against a file; empty if nothing."""
    schema = ("--builtin-schema", "vendor.compose-spec")
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *schema, compose], capture_output=True, text=True
    )
    return done.stdout + done.stderr if done.returncode else ""


def filled_in(value: Any, **environ: str) -> Any:
    """What compose makes of each `${NAME:-default}`."""
    if isinstance(value, dict):
        return {name: filled_in(one, **environ) for name, one in value.items()}
    if isinstance(value, list):
        return [filled_in(one, **environ) for one in value]
    if isinstance(value, str):
        return VARIABLE.sub(lambda found: environ.get(found[1]) or found[2], value)
    return value


def checkout(into: Path) -> Path:
    """What git would hand out, with the changes that are not committed yet."""
    listed = call("git", "ls-files", "-z", "-co", "--exclude-standard", folder=REPOSITORY)
    for name in filter(None, listed.split("\0")):
        file = REPOSITORY / name
        if file.is_file():  # the submodule is a folder
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, into / name)
    return into


def project(into: Path, source: Path, **settings: str) -> Path:
    """A PeiDocker project, made and configured as docs/development-image.md says."""
    call(pei_docker(), "create", "-p", into)
    ours, stages = source / "docker" / "infer-dev", into / "installation"
    shutil.copy(ours / "user_config.yml", into)
    shutil.copytree(ours / "tools", stages / "stage-1" / "infer-dev" / "tools")
    shutil.copy2(ours / "install-tools.sh", stages / "stage-1" / "infer-dev")
    shutil.copytree(source, stages / "stage-2" / "llama-pipeline")
    call(pei_docker(), "configure", "-p", into, **settings)
    return into


def with_stand_in_for_pixi(source: Path) -> Path:
    """The archive lies where a machine without a network would have it, with its own sha256."""
    tools = source / "docker" / "infer-dev" / "tools"
    version = (tools / "pixi.version").read_text().strip()
    program = f"#!/bin/sh\necho pixi {version}\n".encode()
    archive = tools / f"pixi-{os.uname().machine}-unknown-linux-musl.tar.gz"
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        entry = tarfile.TarInfo("pixi")
        entry.mode, entry.size = 0o755, len(program)
        tar.addfile(entry, io.BytesIO(program))
    archive.write_bytes(gzip.compress(made.getvalue(), mtime=0))  # the same for the next build
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    (tools / "pixi.sha256").write_text(f"{digest}  {archive.name}\n")
    return source


def base() -> str:
    """Debian 12 with what this machine trusts, in the place of the public image."""
    if os.geteuid():
        pytest.skip("as root: images are built here with buildah in chroot isolation")
    debian.require("buildah", "debootstrap", "openssh-client")
    name = "localhost/infer-dev-base:bookworm"
    if not images.has(name):
        images.make_base()
        container = buildah("from", "--pull-never", images.BASE)
        if OWN_TRUST.is_dir():
            buildah("copy", "--quiet", container, str(OWN_TRUST), str(OWN_TRUST))
        trust = [word for one in TRUST for word in ("--env", f"{one}={BUNDLE}")]
        buildah("config", *trust, container)
        buildah("commit", "--quiet", "--rm", container, name)
    return name


def build(context: Path, file: Path, tag: str, arguments: Mapping[str, str]) -> None:
    """Build what a Dockerfile says, with packages from where this machine's pip has them."""
    with tempfile.TemporaryDirectory() as scratch:
        buildah(
            *("bud", "--layers", "--pull-never", *images.ISOLATION),
            *(word for one in arguments.items() for word in ("--build-arg", "=".join(one))),
            *images.pip_settings(Path(scratch)),
            *("--file", str(file), "--tag", tag, str(context)),
        )


def by_docker(source: Path) -> str:
    """The image of docker/Dockerfile's stage, without the stages before it."""
    files = sorted((source / "docker").glob("Dockerfile*"))
    (text,) = [text for text in (file.read_text() for file in files) if MARK in text]
    stage = source / "infer-dev.Dockerfile"
    stage.write_text("ARG DEV_BASE\n" + text[text.index(MARK) :])
    name = "localhost/infer-dev:by-docker"
    with one_builder():
        build(source, stage, name, {"DEV_BASE": base()})
    return name


def by_pei_docker(source: Path, folder: Path) -> tuple[str, Any]:
    """The image of a PeiDocker project made in `folder`, by the arguments that compose would
    give; and the service that it is for."""
    with one_builder():
        settings = {"INFER_DEV_BASE": base(), "INFER_DEV_DEVICE": "cpu"}
        made = project(folder, source, **settings)
        services = yaml.safe_load((made / "docker-compose.yml").read_text())["services"]
        for stage in ("stage-1", "stage-2"):
            told = services[stage]["build"]
            given = {name: _as_text(value) for name, value in told["args"].items()}
            if stage == "stage-2":
                given["BASE_IMAGE"] = f"localhost/{given['BASE_IMAGE']}"
            tag = f"localhost/{services[stage]['image']}"
            build(made, made / told["dockerfile"], tag, given)
    return tag, services["stage-2"]


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def one_builder() -> FileLock:
    """What other tests that build images hold too."""
    images.STORE.mkdir(parents=True, exist_ok=True)
    return FileLock(images.STORE / ".lock")


@dataclass(frozen=True)
class Running:
    """A container under way: the processes that end with it are the children of `process`."""

    process: subprocess.Popen[bytes]
    log: Path
    key: Path
    port: int

    def ssh(self, *words: str, user: str = "dev", key: bool = True) -> tuple[int, str]:
        """What a person who logs in gets: the status, and what is printed."""
        options = {
            "BatchMode": "yes",
            "IdentitiesOnly": "yes",
            "LogLevel": "ERROR",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
        }
        told = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        if key:
            told += ["-i", str(self.key)]
        done = subprocess.run(
            ["ssh", "-F", "/dev/null", *told, "-p", str(self.port), f"{user}@127.0.0.1", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return self.ssh("true")[0] == 0

    def stop(self, seconds: float) -> None:
        """As the end of a container: its first process, the init, has that long to end after
        SIGTERM. buildah has longer: it unmounts, which waits for the whole disk."""
        living = psutil.Process(self.process.pid).children(recursive=True)
        inits = [process for process in living if process.name() == "tini"]
        for init in inits:
            init.terminate()
        try:
            assert not psutil.wait_procs(inits, seconds)[1], self.log.read_text()
            self.process.wait(timeout=300)
        finally:
            self.process.kill()
            self.process.wait()


@contextmanager
def running(
    image: str,
    folder: Path,
    port: int,
    mounts: dict[Path, str],
    command: str = "",
    **environ: str,
) -> Iterator[Running]:
    """The image's entry point with `command`, by default the image's own, as a container's start
    would run them."""
    key, log = folder / "key", folder / "container.log"
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    container = buildah("from", "--pull-never", image)
    told = images.config(container)
    environ |= {
        "INFER_DEV_SSH_ADDRESS": f"127.0.0.1:{port}",
        "SSH_AUTHORIZED_KEYS": key.with_suffix(".pub").read_text().strip(),
    }
    words = images.command(
        *("run", *images.ISOLATION),
        *(f"--env={name}={value}" for name, value in environ.items()),
        *(f"--volume={at}:{to}" for at, to in mounts.items()),
        *(container, "--", *told["Entrypoint"], *(command.split() or told["Cmd"])),
    )
    root = Path(buildah("mount", container))
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        under_way = Running(process, log, key, port)
        try:
            wait_for(under_way.answers, 60)
            yield under_way
        finally:
            if process.poll() is None:
                under_way.stop(60)
    finally:
        # In chroot isolation a container has no processes of its own that would end with it.
        daemon = root / "run" / "sshd.pid"
        if daemon.exists():
            with_pid = psutil.Process(int(daemon.read_text()))
            assert with_pid.name() == "sshd"
            with_pid.kill()
        buildah("rm", container)
