"""Install a package: an archive with `README*` at its root and `bin/llama-server`, whoever made it.

It is unpacked beside the present one, tried out there, and takes its place in one step.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from pipeline.bins import platform
from pipeline.bins.binaries import ProgramSource
from pipeline.core import log
from pipeline.core.archives import unpack
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.paths import CHOSEN_BY, Home
from pipeline.core.process import LAST_LINES, outcome
from pipeline.core.store import artifacts, receipts, stat_cache
from pipeline.core.store.hashing import sha256
from pipeline.core.store.publish import is_cut
from pipeline.core.store.receipts import Recipe

from . import manifest

PATIENCE = 20.0  # seconds that its llama-server may take to print its version
STEP = "install_package"
SERVERS = ("llama-server", "llama-server.exe")
# For which processor a program was made, by its first bytes.
ELF_MACHINES = {
    0x03: "x86",
    0x28: "arm",
    0x3E: "x64",
    0xB7: "arm64",
    0xF3: "riscv64",
    0x15: "ppc64",
}
PE_MACHINES = {0x014C: "x86", 0x8664: "x64", 0xAA64: "arm64"}
MACH_O_MACHINES = {0x01000007: "x64", 0x0100000C: "arm64"}


class Installed(Struct, frozen=True, kw_only=True):
    """What is installed. `version` is what its llama-server prints; `commit` may be empty."""

    folder: Path
    version: str
    commit: str

    @property
    def bin(self) -> Path:
        return self.folder / "bin"


def default_target(home: Home) -> Path:
    """Where a package goes unless another place is named."""
    return home.bins / "package"


def recipe(archive: Path, home: Home) -> Recipe:
    """What an installed package depends on. Raises UsageError where there is no archive."""
    if not archive.is_file():
        raise UsageError(f"{archive}: there is no such file", "name the archive of a package")
    digest = stat_cache.identity(home.run / "packages.json", archive)
    return {"step": STEP, "archive": f"sha256:{digest}"}


def is_current(target: Path, recipe: Recipe | None = None) -> bool:
    """Whether a package is there as it was installed, from the archive of `recipe`."""
    is_whole = _has_all_receipts(target) and not is_cut(target)
    return is_whole and receipts.folder_is_current(target / "bin", recipe)


def revalidate(target: Path, recipe: Recipe | None = None) -> bool:
    """As `is_current`, but files that were copied or restored are hashed."""
    return _has_all_receipts(target) and receipts.revalidate_folder(target / "bin", recipe)


def installed(target: Path) -> Installed | None:
    """What an installation recorded there, whether or not its files have changed since."""
    for entry in receipts.load(target / "bin").values():
        if entry.recipe.get("step") == STEP and entry.source:
            return Installed(
                folder=target, version=entry.source["version"], commit=entry.source["commit"]
            )
    return None


def install(
    archive: Path,
    target: Path,
    *,
    home: Home,
    force: bool = False,
    chosen_by: str = CHOSEN_BY,
) -> Installed:
    """Install the package in `target`, whose place the variable `chosen_by` sets. Raises
    PipelineError; the previous one then stays."""
    with artifacts.locked_folder(target, chosen_by):
        expected = recipe(archive, home)
        present = installed(target)
        if present and not force and revalidate(target, expected):
            return present
        _require_replaceable(target)
        with artifacts.new_folder(target) as made:
            new = _make(archive, made, expected, chosen_by)
            if recipe(archive, home) != expected:
                raise PipelineError(f"{archive}: changed while it was installed", "run it again")
    log.info(f"installed llama.cpp {new.version.removeprefix('version: ')} in {target}")
    return replace(new, folder=target)


def _has_all_receipts(target: Path) -> bool:
    """Whether each file that was installed in `bin` has its receipt; others may lie beside them."""
    entries = receipts.load(target / "bin")
    counts = {entry.source.get("files") if entry.source else None for entry in entries.values()}
    return counts == {len(entries)}


def _is_ours(target: Path) -> bool:
    return (target / "bin" / receipts.FILE).exists()


def _require_replaceable(target: Path) -> None:
    """Raise PipelineError where the folder holds anything but a package."""
    if _is_ours(target) or not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    what = "holds something that was not installed by this task"
    raise PipelineError(
        f"{target}: {what if target.is_dir() else 'is not a folder'}",
        "name another folder, or remove this one by hand",
    )


def _make(archive: Path, made: Path, recipe: Recipe, chosen_by: str) -> Installed:
    """Unpack, check, try out, record."""
    start = time.monotonic()
    log.info(f"unpacking {archive.name}")
    files = unpack(archive, made, chosen_by)
    server = _require_form(archive, made, files)
    digests = {file: sha256(file) for file in files}
    commit = manifest.check(archive, made, digests)
    new = Installed(folder=made, version=_try_out(archive, server), commit=commit)
    source = {
        "type": "package",
        "file": archive.name,
        "files": len(receipts.files_in(new.bin)),
        "version": new.version,
        "commit": commit,
    }
    seconds = time.monotonic() - start
    receipts.record_folder(new.bin, recipe, seconds=seconds, source=source, digests=digests)
    return new


def _require_form(archive: Path, made: Path, files: Iterable[Path]) -> Path:
    """The llama-server of a package, which has a README beside its `bin`."""
    roots = [file.name.lower() for file in files if file.parent == made]
    servers = (made / "bin" / name for name in SERVERS)
    server = next((path for path in servers if path.exists()), None)
    if not server or not any(name.startswith("readme") for name in roots):
        missing = "README* at its root" if server else "bin/llama-server"
        raise PipelineError(
            f"{archive.name}: is not a package: there is no {missing}",
            "a package holds README* and bin/llama-server with its libraries beside it, not in "
            f"a folder above; make one: {doitw('package')}",
        )
    return server


def _try_out(archive: Path, server: Path) -> str:
    """What `llama-server --version` prints. Raises PipelineError where it does not start."""
    status, out, err = outcome([server, "--version"], timeout=PATIENCE)
    lines = [
        "".join(c if c.isprintable() else "?" for c in line) for line in (out + err).splitlines()
    ]
    if status == 0 and lines:
        return next((line for line in lines if line.startswith("version")), lines[0])[:200]
    here, made_for = platform.platform_tag(), platform_of(server)
    hint = f"take a package for {here}; made with portable=1 it runs on any processor of its kind"
    if made_for and not here.startswith(made_for):
        why = f"is a program for {made_for}, this is {here}"
    elif not os.access(server, os.X_OK):
        why = "may not be run"
        hint = (
            f"{server.parents[2]} may forbid programs (noexec): install elsewhere, into=…; or the "
            "archive does not mark it as a program"
        )
    else:
        why = (
            f"does not run ({server.name} --version: status {status})" if status else "says nothing"
        )
    shown = "".join(f"\n  | {line[:200]}" for line in lines[-LAST_LINES:])
    raise PipelineError(f"{archive.name}: its llama-server {why}{shown}", hint)


class Packaged(ProgramSource, frozen=True):
    """An installed package. It is made by nothing but its archive."""

    target: Path
    tag = "package"

    @property
    def programs(self) -> Path:
        return self.target / "bin"

    @property
    def commit(self) -> str:
        """The commit that its manifest names, else the version of its llama-server, as one word."""
        package = installed(self.target)
        version = package.version.removeprefix("version: ") if package else ""
        word = re.sub(r"[^A-Za-z0-9.]+", "-", version)[:64].strip("-.")
        return (package.commit if package else "") or word or "package"

    def recipe(self) -> Recipe:
        return {"step": "package", "commit": self.commit}

    def is_current(self) -> bool:
        return is_current(self.target)

    def make(self, *, force: bool = False, offline: bool = False, refresh: bool = False) -> None:
        """Hash once what was copied or restored. Raises PipelineError where that is not enough."""
        if not revalidate(self.target):
            raise PipelineError(
                f"bins=package: there is no package in {self.target}, or it was changed",
                f"install one: {doitw('install_package pkg=PATH')}",
            )

    def clean(self) -> None:
        """Remove what was installed there; nothing that somebody else put there."""
        if _is_ours(self.target):
            super().clean()


def platform_of(program: Path) -> str:
    """The platform that a program is for, such as `windows-x64`; empty where that is not known."""
    with program.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"\x7fELF"):
        machine = int.from_bytes(head[18:20], "big" if head[5:6] == b"\x02" else "little")
        return f"linux-{ELF_MACHINES.get(machine, hex(machine))}"
    if head.startswith(b"MZ"):
        start = int.from_bytes(head[0x3C:0x40], "little")
        machine = int.from_bytes(head[start + 4 : start + 6], "little")
        return f"windows-{PE_MACHINES.get(machine, hex(machine))}"
    if head.startswith(b"\xcf\xfa\xed\xfe"):
        machine = int.from_bytes(head[4:8], "little")
        return f"macos-{MACH_O_MACHINES.get(machine, hex(machine))}"
    if head.startswith(b"\xca\xfe\xba\xbe"):
        return "macos"
    return ""
