"""Completion, by a real shell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline.tasks import reference

BASH = """
{script}
COMP_LINE={line!r}
COMP_POINT=${{#COMP_LINE}}
spec=$(complete -p doitw) || exit 9
$(sed 's/.*-F \\([^ ]*\\) .*/\\1/' <<< "$spec") 2>&1
printf '%s|' "${{COMPREPLY[@]}}"
"""


def script(shell: str) -> str:
    return reference.completion(shell)


def bash(line: str, folder: Path, breaks: str = "") -> list[str]:
    """What bash offers for a line; `breaks` are its COMP_WORDBREAKS."""
    code = f"COMP_WORDBREAKS={breaks!r}\n" + BASH.format(script=script("bash"), line=line)
    done = subprocess.run(
        ["bash", "--norc", "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.replace("\n", "")) == (0, ""), done.stderr
    return [word for word in done.stdout.split("|") if word]


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@needs_bash
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("./doitw ser", ["serve "]),
        ("doitw build", ["build_ui ", "build_bins "]),
        ("doitw help inst", ["install_package "]),
        ("doitw comp", ["completion "]),
        ("doitw serve por", ["portable=", "port="]),
        ("doitw serve port=1 backend=c", ["cuda ", "cpu "]),
        ("doitw port=1 serve model=demo bac", ["backend="]),
        ("doitw serve server", ["server."]),
        ("doitw logs fol", ["follow="]),
        ("doitw ps fol", []),
        ("doitw up dry_run=", ["1 ", "0 "]),
        ("doitw up config=my", ["my servers.toml"]),
        ("doitw test m", []),
        ("doitw serve nosuch", []),
    ],
)
def test_bash(line: str, offered: list[str], tmp_path: Path) -> None:
    (tmp_path / "my servers.toml").touch()
    assert bash(line, tmp_path, breaks=" =:") == offered


@needs_bash
def test_bash_that_does_not_split_at_equal_signs(tmp_path: Path) -> None:
    (tmp_path / "my.toml").touch()
    assert bash("doitw serve backend=c", tmp_path) == ["backend=cuda ", "backend=cpu "]
    assert bash("doitw up config=m", tmp_path) == ["config=my.toml"]


@needs_bash
def test_the_command_prints_it() -> None:
    done = subprocess.run(
        ["bash", "-c", "source <(./doitw completion bash) && complete -p doitw"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "complete -o nospace -F _doitw doitw", done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_theirs(shell: str, tmp_path: Path) -> None:
    text = script(shell)
    assert "backend" in text and "cuda" in text and "@" not in text, "all is filled in"
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    file = tmp_path / "script"
    file.write_text(text, encoding="utf-8")
    subprocess.run([program, "-n", file], check=True)
