"""doitw and pipeline/bootstrap.py as a user meets them: run for real, in copies of the checkout.

Only what would come from the network is replaced: a `doit` of a few lines, in wheels made here.
"""

import ast
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from conftest import REPOSITORY
from disks import locks_that_do_not_work as locks_that_do_not_work

pytestmark = pytest.mark.skipif(os.name == "nt", reason="doitw.cmd is for Windows")

BASE_PYTHON = Path(os.path.realpath(sys.executable))
DOIT = """
import json, os, sys
from doit import VERSION

class DoitMain:
    def run(self, words):
        name, *args = sys.argv
        user = os.environ["LLAMA_PIPELINE_CWD"]
        answer = {"name": name, "args": args, "cwd": os.getcwd(), "pid": os.getpid(), "user": user}
        print(json.dumps({**answer, "version": VERSION, "words": words}))
        return None  # as for some of doit's own commands: all went well
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkout:
    root: Path
    env: dict[str, str]

    def doitw(
        self,
        *args: str,
        program: str = "",
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> "Result":
        done = subprocess.run(
            [program or str(self.root / "doitw"), *args],
            capture_output=True,
            check=False,
            cwd=cwd or self.root,
            env=env or self.env,
            text=True,
        )
        return Result(status=done.returncode, out=done.stdout, err=done.stderr)

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "doitw"],
            env=self.env,
            start_new_session=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def python(self, code: str) -> str:
        done = subprocess.run(
            [str(self.root / ".venv/bin/python"), "-c", code],
            check=False,
            cwd="/",
            env=self.env,
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def require(self, name: str, *lines: str) -> None:
        self.root.joinpath("requirements", f"{name}.txt").write_text("\n".join(lines) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def steps(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("+ ")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Wheels, and folders for PATH: one with the tools that doitw calls, one with a Python too."""

    home: Path
    wheels: str  # as an address, since pip splits PIP_FIND_LINKS at spaces
    tools: Path
    pythons: Path
    doit: str
    newer_doit: str
    extra: str

    def checkout(self, folder: Path) -> Checkout:
        folder.joinpath("pipeline").mkdir(parents=True)
        folder.joinpath("requirements").mkdir()
        shutil.copy(REPOSITORY / "doitw", folder)
        for name in NEEDED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
        # The real one: a wheel of it would have to come from the network.
        (folder / "msgspec").symlink_to(Path(msgspec.__file__).parent)
        env = {
            "HOME": str(self.home),
            "LC_ALL": "C.UTF-8",
            "PATH": f"{self.pythons}:{self.tools}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_FIND_LINKS": self.wheels,
            "PIP_NO_INDEX": "1",
        }
        checkout = Checkout(root=folder, env=env)
        checkout.require("run", self.doit)
        return checkout


CORE = ("__init__", "errors", "lazy", "log", "paths", "text", "variables")
COMMAND_LINE = ("command_line", "step", "table")
NAMED = (
    *("bins/compile/source", "bins/compile/web_ui", "commands/request", "commands/variables"),
    *("models/converter", "models/quants", "tasks/completion", "tasks/nodes"),
)
# What doitw reads before it hands over to doit, and what that names without reading it.
NEEDED = (
    *(f"pipeline/{name}.py" for name in ("bootstrap", "__main__", "__init__")),
    *(f"pipeline/{name}/__init__.py" for name in ("bins", "bins/compile", "commands", "models")),
    *(f"pipeline/{name}.py" for name in NAMED),
    *(f"pipeline/core/{name}.py" for name in CORE),
    *(f"pipeline/tasks/{name}.py" for name in ("__init__", "checks", *COMMAND_LINE)),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("home")
    tools, pythons, wheels = (home / name for name in ("tools", "pythons", "wheels"))
    for folder in (tools, pythons, wheels):
        folder.mkdir()
    for tool in ("cmp", "readlink"):
        found = shutil.which(tool)
        assert found, tool
        tools.joinpath(tool).symlink_to(found)
    pythons.joinpath("python3").symlink_to(BASE_PYTHON)
    return World(
        home=home,
        wheels=wheels.as_uri(),
        tools=tools,
        pythons=pythons,
        doit=make_wheel(wheels, "doit", "1.0"),
        newer_doit=make_wheel(wheels, "doit", "2.0"),
        extra=make_wheel(wheels, "extra", "1.0"),
    )


@pytest.fixture(scope="module")
def ready(world: World, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout after its first call. Tests that use it leave it ready."""
    checkout = world.checkout(tmp_path_factory.mktemp("ready") / "a b ü")
    first = checkout.doitw("serve")
    assert first.status == 0, first.err
    assert json.loads(first.out)["args"] == ["serve"]
    assert ["venv" in first.steps[0], "pip install" in first.steps[1]] == [True, True]
    return checkout


@pytest.fixture
def fresh(world: World, tmp_path: Path) -> Checkout:
    return world.checkout(tmp_path / "a b ü")


def make_wheel(folder: Path, name: str, version: str) -> str:
    """Writes a package of one module; its line in a requirements file."""
    info = f"{name}-{version}.dist-info"
    members = {
        f"{name}/__init__.py": f"VERSION = {version!r}\n",
        f"{name}/doit_cmd.py": DOIT,
        f"{name}/plugin.py": "class PluginDict: pass\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    members[f"{info}/RECORD"] = "".join(f"{member},,\n" for member in [*members, f"{info}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in members.items():
            wheel.writestr(member, text)
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# A checkout that is ready.


def test_a_second_call_starts_no_bootstrap(ready: Checkout, world: World) -> None:
    bootstrap = ready.root / "pipeline/bootstrap.py"
    away = bootstrap.rename(bootstrap.with_suffix(".away"))
    try:
        # No Python in PATH either: nothing but cmp can have run before doit.
        second = ready.doitw("list", env=ready.env | {"PATH": str(world.tools)})
    finally:
        away.rename(bootstrap)
    assert (second.status, second.err) == (0, "")
    assert json.loads(second.out)["args"] == ["list"]


def test_arguments_arrive_untouched(ready: Checkout) -> None:
    args = [
        "serve",
        "model=two words",
        "--",
        "",
        "*",
        "$HOME",
        "--flag=a 'b' \"c\"",
        "new\nline",
        "ü",
    ]
    told = json.loads(ready.doitw(*args).out)
    assert told["args"] == args
    assert told["words"] == [word or " " for word in args], "doit falls over an empty one"
    assert told["name"] == "doitw", "what it tells its user to type"
    wrong = ready.doitw("list", "", "--", "x")
    assert (wrong.status, wrong.out) == (3, "") and "empty" in wrong.err


@pytest.mark.parametrize("is_ready", [True, False])
def test_modules_of_another_program_hide_none_of_ours(
    ready: Checkout, fresh: Checkout, tmp_path: Path, is_ready: bool
) -> None:
    checkout = ready if is_ready else fresh
    for name in ("doit", "sitecustomize", "pip", "signal"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('somebody else's')")
    for name, value in (("PYTHONPATH", str(tmp_path)), ("PYTHONHOME", str(tmp_path))):
        done = checkout.doitw("list", env=checkout.env | {name: value})
        assert done.status == 0, done.err
        assert json.loads(done.out)["args"] == ["list"]


def test_signals_reach_doit(ready: Checkout) -> None:
    process = ready.start()
    out, _ = process.communicate(timeout=300)
    assert json.loads(out)["pid"] == process.pid


@pytest.mark.parametrize("relative", [False, True])
def test_call_through_links_from_another_folder(
    ready: Checkout, tmp_path: Path, relative: bool
) -> None:
    user = tmp_path / "where I am"
    user.mkdir()
    target = ready.root / "doitw"
    inner = user / "inner link"
    inner.symlink_to(os.path.relpath(target, user) if relative else target)
    outer = tmp_path / "outer"
    outer.symlink_to("where I am/inner link" if relative else inner)
    for program in (str(target), str(inner), str(outer), "../outer", "./inner link"):
        done = ready.doitw("serve", program=program, cwd=user)
        assert done.err == ""
        answer = json.loads(done.out)
        assert (answer["cwd"], answer["user"]) == (str(ready.root), str(user))


def test_pipeline_can_be_imported_from_anywhere(ready: Checkout) -> None:
    found = ready.python("import pipeline.bootstrap; print(pipeline.bootstrap.__file__)")
    assert found == str(ready.root / "pipeline/bootstrap.py")


def test_other_requirements_update_what_is_there(ready: Checkout, world: World) -> None:
    made = ready.root.joinpath(".venv/pyvenv.cfg").stat().st_mtime_ns
    for wanted, version in ((world.newer_doit, "2.0"), (world.doit, "1.0")):
        ready.require("run", wanted)
        done = ready.doitw()
        assert done.status == 0, done.err
        assert len(done.steps) == 1
        assert json.loads(done.out)["version"] == version
        assert ready.doitw().err == ""
    assert ready.root.joinpath(".venv/pyvenv.cfg").stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("doit==2.0 --hash=sha256:" + 64 * "0", "DO NOT MATCH THE HASHES"),
        ("doit==2.0", "Hashes are required"),
    ],
)
def test_wrong_or_missing_hash(ready: Checkout, world: World, wanted: str, said: str) -> None:
    ready.require("run", wanted)
    done = ready.doitw()
    assert (done.status, done.out) == (1, "")
    assert said in done.err
    assert "git diff requirements" in done.err
    assert "Traceback" not in done.err
    # Nothing was changed, so the checkout before this one still runs without a network.
    ready.require("run", world.doit)
    assert ready.doitw().err == ""


def test_package_that_cannot_be_fetched(ready: Checkout, world: World) -> None:
    ready.require("run", "absent==1.0 --hash=sha256:" + 64 * "0")
    done = ready.doitw()
    assert (done.status, done.out) == (1, "")
    assert "Is there a network" in done.err and "Set here" not in done.err
    assert "Traceback" not in done.err
    behind = ready.env | {"ALL_PROXY": "socks5://127.0.0.1:1", "REQUESTS_CA_BUNDLE": "/gone"}
    assert "Set here: ALL_PROXY, REQUESTS_CA_BUNDLE." in ready.doitw(env=behind).err
    ready.require("run", world.doit)
    assert ready.doitw().err == ""


def test_install_from_inside(ready: Checkout, world: World) -> None:
    ready.require("test", world.doit, world.extra)
    install = "from pipeline import bootstrap; bootstrap.install('test')"
    assert ready.python(install).startswith("+ ")
    assert ready.python("import extra; print(extra.VERSION)") == "1.0"
    assert ready.python(install) == ""
    assert ready.doitw().err == ""
    # New "run" requirements ask for nothing else; "test" is looked at when it is asked for.
    ready.require("run", world.newer_doit)
    ready.require("test", world.newer_doit, world.extra)
    assert len(ready.doitw().steps) == 1
    assert ready.python(install).startswith("+ ")
    ready.require("run", world.doit)
    assert ready.doitw().status == 0


@pytest.mark.usefixtures("locks_that_do_not_work")
def test_a_disk_without_locks(ready: Checkout, world: World) -> None:
    ready.require("run", world.newer_doit)
    done = ready.doitw(env=ready.env | {"LD_PRELOAD": os.environ["LD_PRELOAD"]})
    assert done.status == 0, done.err
    assert "Traceback" not in done.err
    ready.require("run", world.doit)
    assert ready.doitw().status == 0


def test_waits_for_another_set_up(ready: Checkout, world: World) -> None:
    ready.require("run", world.newer_doit)
    with ready.root.joinpath(".venv.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = ready.start()
        assert process.stderr
        assert "waiting for another doitw" in process.stderr.readline()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["version"] == "2.0"
    ready.require("run", world.doit)
    assert ready.doitw().status == 0


def test_kill_during_update(ready: Checkout, world: World) -> None:
    ready.require("run", world.newer_doit)
    process = ready.start()
    receipt = ready.root / ".venv/run.txt"
    wait_until(lambda: not receipt.exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    # Packages may be half replaced by now, though the requirements are the old ones again.
    ready.require("run", world.doit)
    again = ready.doitw()
    assert again.status == 0, again.err
    assert "its set-up was not finished" in again.err


# A checkout that has no .venv yet, or a broken one.


@pytest.mark.slow
def test_two_at_once(fresh: Checkout) -> None:
    processes = [fresh.start() for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert "".join(err for _, err in answers).count("pip install") == 1
    assert all(json.loads(out)["cwd"] == str(fresh.root) for out, _ in answers)


@pytest.mark.slow
@pytest.mark.parametrize("everything", [True, False])
def test_kill_during_set_up(fresh: Checkout, everything: bool) -> None:
    """The whole process group, or bootstrap.py alone, whose `python -m venv` then goes on."""
    process = fresh.start()
    wait_until(fresh.root.joinpath(".venv/bin/python").exists)
    if everything:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=300)
            pytest.skip("no list of child processes on this system")
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0
    again = fresh.doitw()
    assert again.status == 0, again.err
    assert "its set-up was not finished" in again.err
    assert ("waiting for another doitw" in again.err) is not everything
    assert fresh.doitw().err == ""


@pytest.mark.slow
def test_moved_checkout_and_removed_python(ready: Checkout, tmp_path: Path) -> None:
    moved = dataclasses.replace(ready, root=tmp_path / "moved ü")
    shutil.copytree(ready.root, moved.root, symlinks=True)
    done = moved.doitw()
    assert done.status == 0, done.err
    assert f"it was made in {ready.root}" in done.err
    found = moved.python("import pipeline.bootstrap; print(pipeline.bootstrap.__file__)")
    assert found == str(moved.root / "pipeline/bootstrap.py")

    link = moved.root / ".venv/bin" / f"python3.{sys.version_info.minor}"
    link.unlink()
    link.symlink_to("/nowhere/python3")
    done = moved.doitw()
    assert done.status == 0, done.err
    assert "its Python is gone" in done.err


def test_a_link_to_the_environment_of_another_checkout(
    ready: Checkout, world: World, tmp_path: Path
) -> None:
    other = world.checkout(tmp_path / "other")
    other.root.joinpath(".venv").symlink_to(ready.root / ".venv")
    done = other.doitw("list")
    assert done.status == 0 and "it was made in" in done.err, done.err
    assert not other.root.joinpath(".venv").is_symlink()
    assert ready.doitw("list").steps == [], "that of the other one is as it was"


def test_no_python(fresh: Checkout, world: World) -> None:
    done = fresh.doitw(env=fresh.env | {"PATH": str(world.tools)})
    assert (done.status, done.out) == (1, "")
    for text in ("apt install python3 python3-venv", "dnf", "brew", "winget"):
        assert text in done.err


def test_old_python(fresh: Checkout, world: World, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    # Says no to the question for its version; is caught if it is used for anything else.
    old.joinpath("python3").write_text('#!/bin/sh\n[ "$1" = -c ] || echo USED >&2\nexit 1\n')
    old.joinpath("python3").chmod(0o755)
    path = f"{old}:{world.tools}"
    alone = fresh.doitw(env=fresh.env | {"PATH": path})
    assert (alone.status, alone.out) == (1, "")
    assert "found no Python 3.11 or later" in alone.err
    named = fresh.doitw(env=fresh.env | {"PYTHON": str(old / "python3")})
    assert (named.status, named.out) == (1, "")
    assert "is not Python 3.11 or later" in named.err
    assert "USED" not in alone.err + named.err


def test_bootstrap_tells_an_old_python_its_version(fresh: Checkout) -> None:
    source = fresh.root.joinpath("pipeline/bootstrap.py")
    ast.parse(source.read_text(encoding="utf-8"), feature_version=(3, 6))
    code = (
        "import runpy, sys; sys.version_info = (3, 6, 15, 'final', 0);"
        f"runpy.run_path({str(source)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [BASE_PYTHON, "-I", "-c", code], capture_output=True, check=False, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "doitw: this is Python 3.6, and 3.11 or later is needed.\n"
    assert not fresh.root.joinpath(".venv").exists()


def test_python_without_venv(fresh: Checkout, tmp_path: Path) -> None:
    """As on Debian without python3-venv: a whole Python, but for the package ensurepip."""
    version = f"python3.{sys.version_info.minor}"
    library = tmp_path / "usr/lib" / version
    library.mkdir(parents=True)
    for path in Path(os.__file__).parent.iterdir():
        if path.name != "ensurepip":
            library.joinpath(path.name).symlink_to(path)
    python = tmp_path / "usr/bin" / version
    python.parent.mkdir()
    shutil.copy(BASE_PYTHON, python)
    done = fresh.doitw(env=fresh.env | {"PYTHON": str(python)})
    assert (done.status, done.out) == (1, "")
    assert f"apt install {version}-venv" in done.err
    assert "Traceback" not in done.err
    assert not fresh.root.joinpath(".venv").exists()


def test_missing_requirements(fresh: Checkout) -> None:
    fresh.root.joinpath("requirements/run.txt").unlink()
    done = fresh.doitw()
    assert (done.status, done.out) == (1, "")
    assert "git checkout requirements" in done.err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_read_only_checkout(fresh: Checkout) -> None:
    fresh.root.chmod(0o555)
    try:
        done = fresh.doitw()
    finally:
        fresh.root.chmod(0o755)
    assert (done.status, done.out) == (1, "")
    assert "cannot be written to" in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
@pytest.mark.parametrize("python_in_path", [True, False])
def test_uv(fresh: Checkout, world: World, tmp_path: Path, python_in_path: bool) -> None:
    uv = shutil.which("uv")
    assert uv
    programs = tmp_path / "programs"
    programs.mkdir()
    programs.joinpath("uv").symlink_to(uv)
    config = tmp_path / "uv.toml"
    config.write_text(f'[pip]\nno-index = true\nfind-links = ["{world.wheels}"]\n')
    env = fresh.env | {
        "PATH": f"{programs}:{world.pythons if python_in_path else ''}:{world.tools}",
        "UV_CACHE_DIR": str(tmp_path / "cache"),
        "UV_CONFIG_FILE": str(config),
        "UV_PYTHON_DOWNLOADS": "never",
        # A Python that uv knows of, and nobody else: the one of this test, by the name uv gives it.
        "UV_PYTHON_INSTALL_DIR": str(tmp_path / "uv pythons"),
    }
    listed = subprocess.run(
        [uv, "python", "list", "--only-installed", "--output-format=json", BASE_PYTHON],
        check=True,
        env=env,
        stdout=subprocess.PIPE,
    )
    home = tmp_path / "uv pythons" / json.loads(listed.stdout)[0]["key"]
    home.mkdir(parents=True)  # no link itself, which uv would pass over
    for part in Path(sys.base_prefix).iterdir():
        home.joinpath(part.name).symlink_to(part)

    done = fresh.doitw("serve", env=env)
    assert done.status == 0, done.err
    assert json.loads(done.out)["args"] == ["serve"]
    assert ["uv venv" in done.steps[0], "uv pip install" in done.steps[1]] == [True, True]
    assert fresh.doitw(env=env).err == ""

    fresh.require("run", "doit==2.0 --hash=sha256:" + 64 * "0")
    done = fresh.doitw(env=env)
    assert (done.status, done.out) == (1, "")
    assert "git diff requirements" in done.err
    # uv is gone, and its environment has no pip.
    fresh.require("run", world.newer_doit)
    done = fresh.doitw()
    assert done.status == 0, done.err
    assert json.loads(done.out)["version"] == "2.0"
