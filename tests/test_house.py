"""The rules of the house: types, style, who imports whom, and that the pins fit together."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

from pipeline.core.paths import Home, cache
from pipeline.core.store.locks import only_one

# A checkout that is fresh has no caches; each tool looks whether what it kept is still true.
KEPT = cache(Home(REPOSITORY)) / "tests" / "static"


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", f"--cache-dir={KEPT / 'ruff'}"],
        ["ruff", "format", "--check", f"--cache-dir={KEPT / 'ruff'}"],
        ["mypy", f"--cache-dir={KEPT / 'mypy'}"],
        ["lint-imports", f"--cache-dir={KEPT / 'imports'}"],
    ],
    ids=lambda command: " ".join(command[:-1]),
)
def test_tools_find_nothing(command: list[str]) -> None:
    words = [sys.executable, "-m", *command]
    if command[0] == "lint-imports":
        code = "import sys; from importlinter.cli import lint_imports_command as c; c(sys.argv[1:])"
        words = [sys.executable, "-c", code, *command[1:]]
    with only_one(KEPT / command[0]):
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def pinned(name: str) -> dict[str, str]:
    text = (REPOSITORY / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    assert "://" not in text, "a lock file names no host"
    found = dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.M))
    hashed = len(re.findall(r"^[\w.-]+==.*\\\n\s+--hash=sha256:", text, re.M))
    assert hashed == len(re.findall(r"^[\w.-]+==", text, re.M)), "each one with its hashes"
    return found


def test_the_locked_requirements_fit_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    run, test = pinned("run"), pinned("test")
    for wanted, locked in (
        (project["dependencies"], run),
        (project["dependencies"] + project["optional-dependencies"]["test"], test),
    ):
        for text in wanted:
            requirement = Requirement(text)
            assert requirement.specifier.contains(locked[requirement.name])
    assert run.items() <= test.items(), "the tests run what users run"


def test_the_submodule_is_the_pinned_commit() -> None:
    from pipeline.core.pins import pins

    listed = subprocess.run(
        ["git", "ls-files", "-s", "vendor/llama.cpp"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    assert listed.stdout.split()[:2] == ["160000", pins().llama_cpp_commit]
    modules = (REPOSITORY / ".gitmodules").read_text(encoding="utf-8")
    assert "path = vendor/llama.cpp" in modules


def test_no_two_test_files_have_the_same_name() -> None:
    """pytest takes them for one."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("*.py")]
    assert sorted(names) == sorted(set(names))


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank ones, comments, docstrings or imports."""
    text = path.read_text(encoding="utf-8")
    without: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            without |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate((line.strip() for line in text.splitlines()), start=1)
    return sum(bool(x) and not x.startswith("#") and n not in without for n, x in lines)


def test_the_supervisor_stays_small() -> None:
    """Else one of the ready-made ones would be the better choice."""
    folder = REPOSITORY / "pipeline" / "serve" / "supervisor"
    names = ("supervisor", "runner", "policy", "child", "marker", "reaper")
    counts = {name: code_lines(folder / f"{name}.py") for name in names}
    assert min(counts.values()) > 5, "the count counts"
    assert sum(counts.values()) < 400, counts


def test_a_class_name_stands_once() -> None:
    """Two classes of one name are one idea in two places, or two ideas that readers mix up."""
    places: dict[str, list[str]] = {}
    for file in sorted((REPOSITORY / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(file.relative_to(REPOSITORY)))
    assert len(places) > 50
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_every_client_of_a_server_is_known_to_have_bounds() -> None:
    """`tests/test_hostile_servers.py` attacks each of them."""
    client = re.compile(
        r"httpx2\.(Async)?Client\(|httpx2\.get\(|urlopen\(|HTTPS?Connection\(|HttpResponseParser\("
    )
    files = {
        file.relative_to(REPOSITORY / "pipeline").as_posix()
        for file in (REPOSITORY / "pipeline").rglob("*.py")
        if client.search(file.read_text(encoding="utf-8"))
    }
    assert files == {
        *("bins/release/github.py", "chat/completions.py", "deploy/claude.py"),
        *("deploy/ray/cluster.py", "serve/health.py", "serve/gateway/upstream.py"),
        "deploy/ray/peers.py",  # reads through core/download, as what fetches from the hub
    }


def test_what_draws_is_known_to_filter() -> None:
    """All else is filtered by the streams of `core/log.py`, which these go past."""
    past = re.compile(r"\bConsole\((?!.*\blog\.unfiltered)|\blog\.unfiltered")
    drawing = {
        file.relative_to(REPOSITORY / "pipeline").as_posix()
        for file in (REPOSITORY / "pipeline").rglob("*.py")
        if past.search(file.read_text(encoding="utf-8"))
    }
    assert drawing == {"chat/terminal.py", "core/progress.py"}
