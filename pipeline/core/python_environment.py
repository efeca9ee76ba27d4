"""Python environments of their own, for what does not fit into the pipeline's: large, pinned by
hashes, shared by all checkouts."""

from __future__ import annotations

import base64
import csv
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct

from . import network, paths
from .errors import PipelineError
from .log import info
from .packages import LONGEST, cache_folder, pip_environment
from .paths import Home
from .process import WINDOWS, last_lines, run
from .store import artifacts, hashing, receipts
from .store.publish import require_disk
from .store.receipts import Recipe
from .text import size

PYTHON = Path("Scripts/python.exe" if WINDOWS else "bin/python")
INTO = ("install", "--quiet", "--no-deps")  # pip's words, behind the Python that it installs for
WITH_HASHES = ("--require-hashes", "--requirement")

_whole: set[Path] = set()  # the environments in which this process found no damage


def recipe(step: str, requirements: str) -> Recipe:
    """What an environment depends on; `requirements` is the hash of what is installed."""
    return {
        "step": step,
        "requirements": requirements,
        "python": sys.version.split()[0],  # platform.python_version(), which takes a millisecond
        "platform": f"{sys.platform}-{platform.machine()}",
    }


def required(requirements: Path, *more: str) -> set[str]:
    """The names of the packages that this platform needs: of a file of requirements, and `more`."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = re.findall(r"^(\w.*?) *\\?$", requirements.read_text(encoding="utf-8"), re.M)
    packages = [Requirement(line) for line in (*lines, *more)]
    needed = [package for package in packages if not package.marker or package.marker.evaluate()]
    return {canonicalize_name(package.name) for package in needed}


class PythonEnvironment(Struct, frozen=True, kw_only=True):
    """The environment of `title`, such as `the converter`. Sizes in bytes.

    `packages` names what has to be in it, `pip_calls` are the words of the pip calls that fill it,
    for its Python, and `check` raises PipelineError where what they made cannot be used.
    """

    home: Home
    name: str  # of its folder and its log
    title: str
    recipe: Recipe
    packages: Callable[[], set[str]]
    pip_calls: Callable[[Path], Sequence[Sequence[str]]]
    check: Callable[[Path], None] = lambda python: None
    download_bytes: int
    installed_bytes: int

    @property
    def folder(self) -> Path:
        """Its folder, which may not exist yet."""
        return cache_folder(self.home, self.recipe, self.name)

    @property
    def python(self) -> Path:
        return self.folder / PYTHON

    def is_current(self) -> bool:
        """Whether it is complete, and as it was installed."""
        return self.has_receipt() and not self.damage()

    def has_receipt(self) -> bool:
        """Whether it was finished, by the recipe of today."""
        entry = receipts.load(self.folder).get("environment")
        return entry is not None and entry.recipe == self.recipe and self.python.exists()

    def damage(self, *, hashes: bool = False) -> str:
        """What differs from the packages that were installed; empty for nothing. Compares the sizes
        of their files, once a process since it takes half a second, or their hashes."""
        from packaging.utils import canonicalize_name

        top = self.folder
        if top in _whole and not hashes:
            return ""
        try:
            (site,) = top.glob("Lib/site-packages" if WINDOWS else "lib/*/site-packages")
            infos = list(site.glob("*.dist-info"))
            names = {canonicalize_name(info.name.partition("-")[0]) for info in infos}
            if missing := ", ".join(sorted(self.packages() - names)):
                return f"{missing} is not there"
            for path in (top / "pyvenv.cfg", *(info / "RECORD" for info in infos)):
                if not path.stat().st_size:
                    return f"{path} is empty"
            for info in infos:
                lines = (info / "RECORD").read_text(encoding="utf-8").splitlines()
                for name, digest, size in csv.reader(lines):
                    path = site / name
                    if size and path.stat().st_size != int(size):
                        return f"{path} has {path.stat().st_size} bytes instead of {size}"
                    if hashes and digest and _digest(path) != digest:
                        return f"{path} is not what was installed"
        except (OSError, ValueError) as error:
            return str(error)
        _whole.add(top)
        return ""

    def make(self, *, why: str, force: bool = False, offline: bool = False) -> None:
        """Make it unless it is current; its receipt comes last. `why` is said before a download.
        Raises PipelineError."""
        target = self.folder
        paths.require_writable(target.parent)
        with artifacts.locked_folder(target):
            has_receipt = self.has_receipt()
            damage = self.damage() if has_receipt else "it is not there"
            if not damage and not force:
                return
            if offline:
                raise PipelineError(
                    f"{self.title}'s environment is to be made ({damage or 'force=1'}), and "
                    "offline=1 forbids downloading it",
                    "run once without offline=1",
                )
            if has_receipt and damage:
                info(f"{self.title}'s environment is damaged, and is made again: {damage}")
            _whole.discard(target)
            info(
                f"making {self.title}'s environment, {why}: {size(self.download_bytes)} to "
                f"download, {size(self.installed_bytes)} on disk"
            )
            with artifacts.new_folder(target, need=self.installed_bytes) as made:
                self._fill(made, self.home.logs / f"{self.name}.log")

    def _fill(self, made: Path, log: Path) -> None:
        """Fill a new folder, which can be renamed: only its Python is started, by its path."""
        import venv  # slow to load

        venv.create(made, with_pip=False, symlinks=not WINDOWS)
        for arguments in self.pip_calls(made / PYTHON):
            command = [sys.executable, "-m", "pip", *arguments]
            if run(command, log=log, env=pip_environment(), timeout=LONGEST):
                require_disk(made, last_lines(log))
                raise PipelineError(
                    f"{self.title}'s environment could not be made:\n{last_lines(log, 5)}",
                    f"check the network and pip's settings{network.settings()}; the log is {log}",
                )
        self.check(made / PYTHON)
        stamp = made / "environment"
        stamp.write_text(f"{self.recipe['requirements']}\n", encoding="utf-8")
        receipts.save(made, {stamp.name: receipts.stamp(stamp, self.recipe, seconds=0)})

    def forget(self) -> None:
        """Drop its receipt."""
        receipts.invalidate(self.folder / "environment")


def _digest(path: Path) -> str:
    """A file's hash as the RECORD of a package has it."""
    digest = base64.urlsafe_b64encode(bytes.fromhex(hashing.sha256(path)))
    return f"sha256={digest.decode().rstrip('=')}"
