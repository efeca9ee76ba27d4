"""The development image as it is made with Docker, and with PeiDocker.

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
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import debian
import images
import yaml
from conftest import REPOSITORY, wait_for
from engines import Buildah, Container, Docker

from pipeline.core import paths
from pipeline.core.packages import pip_environment
from pipeline.core.paths import Home
from pipeline.core.store.locks import only_one

BASE = "localhost/infer-dev-base:bookworm"
PEI_DOCKER = "pei-docker==2.0.1"
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
MARK = "FROM ${DEV_BASE} AS infer-dev"
# What the certificates of the system and of this machine become when ca-certificates is installed,
# and who has to be told.
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


def base(engine: Docker | Buildah, scratch: Path) -> str:
    """Debian 12 with what this machine trusts, in the place of the public image."""
    debian.require("openssh-client")
    images.make_base(engine)
    trust = dict.fromkeys(TRUST, BUNDLE)
    return images.own_settings(engine, images.BASE, BASE, scratch, **trust)


def build(
    engine: Docker | Buildah, context: Path, file: Path, tag: str, arguments: Mapping[str, str]
) -> None:
    """Build what a Dockerfile says, with packages from where this machine's pip has them."""
    with tempfile.TemporaryDirectory() as scratch:
        given = (word for one in arguments.items() for word in ("--build-arg", "=".join(one)))
        mounts = images.pip_settings(Path(scratch))
        engine.build(context, tag, *given, "--file", str(file), mounts=mounts)


def by_docker(engine: Docker | Buildah, source: Path, scratch: Path) -> str:
    """The image of docker/Dockerfile's stage. buildah 1.28 would make the stages before it, too:
    they are left out."""
    file = source / "docker" / "Dockerfile"
    stage = source / "infer-dev.Dockerfile"
    text = file.read_text()
    stage.write_text("ARG DEV_BASE\n" + text[text.index(MARK) :])
    name = "localhost/infer-dev:by-docker"
    with engine.lock:
        build(engine, source, stage, name, {"DEV_BASE": base(engine, scratch)})
    return name


def by_pei_docker(engine: Docker | Buildah, source: Path, folder: Path) -> tuple[str, Any]:
    """The image of a PeiDocker project made in `folder`, by the arguments that compose would
    give; and the service that it is for."""
    with engine.lock:
        settings = {"INFER_DEV_BASE": base(engine, folder.parent), "INFER_DEV_DEVICE": "cpu"}
        made = project(folder, source, **settings)
        services = yaml.safe_load((made / "docker-compose.yml").read_text())["services"]
        for stage in ("stage-1", "stage-2"):
            told = services[stage]["build"]
            given = {name: _as_text(value) for name, value in told["args"].items()}
            if stage == "stage-2":
                given["BASE_IMAGE"] = f"localhost/{given['BASE_IMAGE']}"
            tag = f"localhost/{services[stage]['image']}"
            file = made / told["dockerfile"]
            # The engine reads it as well as the image that this line names, which is on a registry.
            file.write_text(re.sub(r"^# syntax=.*\n", "", file.read_text()))
            build(engine, made, file, tag, given)
    return tag, services["stage-2"]


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Running:
    """A container under way: the processes that end with it are the children of `process`."""

    process: subprocess.Popen[bytes]
    log: Path
    key: Path
    port: int
    engine: Docker | Buildah
    name: str

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
        """SIGTERM to its first process, which has that long to end. The engine may take longer:
        buildah unmounts, which waits for the whole disk."""
        began = time.monotonic()
        self.engine.signal(self.name, self.process, signal.SIGTERM)
        wait_for(lambda: not self.engine.is_up(self.name, self.process), seconds)
        assert time.monotonic() - began < seconds, self.log.read_text()
        self.process.wait(timeout=300)


@contextmanager
def running(
    engine: Docker | Buildah,
    image: str,
    folder: Path,
    port: int,
    mounts: dict[Path, str],
    command: str = "",
    **environ: str,
) -> Iterator[Running]:
    """The image's entry point with `command`, by default the image's own."""
    key, log = folder / "key", folder / "container.log"
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    environ |= {
        "INFER_DEV_SSH_ADDRESS": f"127.0.0.1:{port}",
        "SSH_AUTHORIZED_KEYS": key.with_suffix(".pub").read_text().strip(),
    }
    name = f"test-{uuid.uuid4().hex[:12]}"
    it = Container(name, image, tuple(command.split()), env=environ, mounts=mounts)
    with log.open("wb") as out:
        words, no = engine.command(it), subprocess.DEVNULL
        process = subprocess.Popen(words, stdin=no, stdout=out, stderr=subprocess.STDOUT)
    under_way = Running(process, log, key, port, engine, name)
    try:
        wait_for(under_way.answers, 60)
        yield under_way
        if process.poll() is None:
            under_way.stop(60)
    finally:
        engine.remove(name, process)
