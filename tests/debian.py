"""Programs that tests need and that no Python package has, from apt where this machine has it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SUITE = "trixie"  # Debian 13: for what the system has in no version that is new enough
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def require(*packages: str) -> None:
    """Have the packages installed; the test is skipped, with the reason, where that cannot be."""
    for program in ("apt-get", "dpkg"):
        if not shutil.which(program):
            pytest.skip(f"needs {', '.join(packages)} as Debian names them, and has no {program}")
    absent = missing(packages)
    if absent and os.geteuid():
        pytest.skip(f"as root: apt-get install {' '.join(absent)}")
    if absent:
        call("apt-get", "update", check=False)  # a source of someone else's may be out of order
        call("apt-get", "install", "--yes", "--no-install-recommends", *absent)


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those that dpkg does not know as installed."""
    status = ("dpkg-query", "-W", "-f=${db:Status-Status}")
    return [name for name in packages if asked(*status, name) != "installed"]


def asked(*words: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    if not shutil.which(words[0]):
        return ""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return done.stdout if done.returncode == 0 else ""


def call(*words: str, folder: Path | None = None, check: bool = True) -> None:
    """Run it; the tests are skipped where it fails, as without a network."""
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    if check and done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg"))]
        pytest.skip(f"{words[0]} failed with {done.returncode}: {' '.join(said[:1])}")


def fetch(packages: tuple[str, ...], into: Path) -> None:
    """Unpack packages of SUITE in a folder, beside the system's. apt holds them against its
    keyring; the test is skipped where they cannot be had."""
    state = into / "apt"
    got = state / "packages"
    for folder in ("state/lists/partial", "cache/archives/partial", "packages"):
        (state / folder).mkdir(parents=True)
    (state / "status").touch()
    (state / "debian.sources").write_text(
        f"Types: deb\nURIs: {mirror()}\nSuites: {SUITE}\nComponents: main\nSigned-By: {KEYRING}\n"
    )
    apt = ["apt-get", *(word for option in options(state) for word in ("-o", option))]
    call(*apt, "update")
    call(*apt, "download", *packages, folder=got)
    for package in got.glob("*.deb"):
        call("dpkg", "-x", str(package), str(into))
    shutil.rmtree(state)


def mirror() -> str:
    """Where this machine gets Debian's own packages from."""
    form = "$(ORIGIN) $(LABEL) $(REPO_URI)"
    told = asked("apt-get", "indextargets", "--format", form, "Created-By: Packages")
    for line in told.splitlines():
        if line.startswith("Debian Debian "):
            return line.split()[2]
    pytest.skip(f"needs packages of Debian {SUITE}, and apt has no source of Debian's here")


def options(state: Path) -> list[str]:
    """apt's settings for a suite that is none of this machine's, away from its own records."""
    return [
        f"Dir::State={state / 'state'}",
        f"Dir::State::status={state / 'status'}",
        f"Dir::Cache={state / 'cache'}",
        f"Dir::Etc::SourceList={state / 'debian.sources'}",
        "Dir::Etc::SourceParts=-",
        "Acquire::Languages=none",
        "APT::Update::Error-Mode=any",  # else a mirror that does not answer is a warning
        "APT::Sandbox::User=root",  # the folder is the user's own, and hidden from apt's
    ]
