"""How environments of Python are published, for the test of power cuts: see lost_store.py."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY, SHEBANG
from lost_store import AGAIN, NEW, OLD, Sequence, content

from pipeline.core import python_environment
from pipeline.core.paths import Home
from pipeline.models import converter

# The converter's environment: pip is real, what it installs is a package of one module

WHEEL = "extra-1.0-py3-none-any.whl"
INFO = "extra-1.0.dist-info"
TEXT = content("extra", NEW).hex()


@contextmanager
def small_converter(top: Path) -> Iterator[Home]:
    """The pipeline's converter, with one package in the place of its own, while the block runs."""
    arguments = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", str(top / WHEEL)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            converter, "pip_arguments", lambda python: [["--python", str(python), *arguments]]
        )
        patch.setattr(converter, "required", lambda: {"extra"})
        patch.setattr(converter, "_require_cpu_torch", lambda python: None)
        patch.setenv("LLAMA_PIPELINE_CACHE", str(top / "cache"))
        yield Home(top / "home")


def before_converter(top: Path) -> None:
    members = {
        "extra/__init__.py": f"TEXT = '{TEXT}'\n",
        f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n",
        f"{INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    members[f"{INFO}/RECORD"] = "".join(f"{name},,\n" for name in [*members, f"{INFO}/RECORD"])
    with zipfile.ZipFile(top / WHEEL, "w") as wheel:
        for name, text in members.items():
            wheel.writestr(name, text)
    (top / "home" / "logs").mkdir(parents=True)


def make_converter(top: Path) -> None:
    with small_converter(top) as home:
        converter.make(home)


def after_converter(top: Path) -> str:
    python_environment._whole.clear()
    with small_converter(top) as home:
        if not converter.installed(home).is_current():
            return AGAIN
        modules = converter.installed(home).folder.glob("lib/*/site-packages/extra/__init__.py")
        assert any(TEXT.encode() in module.read_bytes() for module in modules), "torn, and passes"
        return NEW


CONVERTER = Sequence(before=before_converter, act=make_converter, after=after_converter)


# The project's own environment: `uv` is a stand-in that, like uv and pip, flushes nothing and takes
# a package for installed where the folder that names its version is there

UV = """
import pathlib, shutil, sys, venv
if sys.argv[1] == "venv":
    venv.create(sys.argv[-1], with_pip=False)
    sys.exit()
python, file = (pathlib.Path(sys.argv[sys.argv.index(word) + 1]) for word in ("--python", "-r"))
(site,) = python.parent.parent.glob("lib/*/site-packages")
version = file.read_text().strip()
if not (site / f"extra-{version}.dist-info").is_dir():
    for path in site.glob("extra*"):
        shutil.rmtree(path)
    (site / "extra").mkdir()
    shutil.copyfile(pathlib.Path(__file__).with_name(version), site / "extra" / "__init__.py")
    (site / f"extra-{version}.dist-info").mkdir()
"""


def bootstrap(top: Path) -> ModuleType:
    """bootstrap.py as it lies in the checkout."""
    spec = importlib.util.spec_from_file_location("own_bootstrap", top / "pipeline/bootstrap.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode = True  # as for a script, which doitw runs it as
    spec.loader.exec_module(module)
    module.say = lambda text: None
    if os.fsync.__name__ == "<lambda>":
        module.flush_all = lambda folder: None
    os.environ["PATH"] = str(top / "tools")
    return module


def before_environment(top: Path) -> None:
    for name in ("pipeline", "tools", "requirements"):
        (top / name).mkdir()
    shutil.copy(REPOSITORY / "pipeline" / "bootstrap.py", top / "pipeline")
    (top / "tools" / "uv").write_text(f"{SHEBANG}\n{UV}")
    (top / "tools" / "uv").chmod(0o755)
    for version in (OLD, NEW):
        (top / "tools" / version).write_bytes(content("extra", version))
    (top / "requirements" / "run.txt").write_text(OLD)
    with kept_path():
        bootstrap(top).ensure("run")
    (top / "requirements" / "run.txt").write_text(NEW)


def after_environment(top: Path) -> str:
    """The next `doitw` in the new checkout, or once again in the old one."""
    with kept_path():
        for version in (NEW, OLD):
            (top / "requirements" / "run.txt").write_text(version)
            if bootstrap(top).is_current("run", trust=False):
                assert installed(top) == content("extra", version), "torn, and passes for set up"
                return version
        (top / "requirements" / "run.txt").write_text(NEW)
        bootstrap(top).ensure("run")
    assert installed(top) == content("extra", NEW), "torn, and was built on"
    return AGAIN


@contextmanager
def kept_path() -> Iterator[None]:
    path, bytecode = os.environ["PATH"], sys.dont_write_bytecode
    try:
        yield
    finally:
        os.environ["PATH"], sys.dont_write_bytecode = path, bytecode


def installed(top: Path) -> bytes:
    modules = (top / ".venv").glob("lib/*/site-packages/extra/__init__.py")
    return b"".join(module.read_bytes() for module in modules)


ENVIRONMENT = Sequence(
    before=before_environment,
    act=lambda top: bootstrap(top).ensure("run"),
    after=after_environment,
)
