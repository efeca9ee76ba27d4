"""Completion, by real shells."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import debian
import pytest
from conftest import REPOSITORY

from pipeline.core.store import receipts
from pipeline.tasks import completion
from pipeline.tasks.completion import candidates

BASH = """
{script}
COMP_LINE={line!r}
COMP_POINT=${{#COMP_LINE}}
_doitw 2>&1
printf '%s|' "${{COMPREPLY[@]}}"
"""
TOML = """
[instance.server]
ctx_size = 512
[instance.chat.model]
ref = "demo"
[instance.embed.model]
ref = "demo-embed"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, with a file of servers, and a home that knows a model and an option."""
    home = tmp_path / "home"
    (home / "models" / "resolved").mkdir(parents=True)
    answer = {"source": {"type": "hf", "ref": "org/model-GGUF"}}
    (home / "models" / "resolved" / "a.json").write_text(json.dumps(answer))
    (home / "models" / "resolved" / "b.json").write_text("{cut")
    adapter = {"source": {"type": "hf", "ref": "org/lora", "use": "adapter"}}
    (home / "models" / "resolved" / "c.json").write_text(json.dumps(adapter))
    (home / "run" / "flags").mkdir(parents=True)
    (home / "run" / "flags" / "0.json").write_text('{"flash-attn": {}, "fit": {}, "---": {}}')
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "my servers.toml").write_text(TOML)
    (folder / "m.gguf").touch()
    (folder / "more").mkdir()
    monkeypatch.setenv("LLAMA_PIPELINE_HOME", str(home))
    monkeypatch.setenv("LLAMA_PIPELINE_CWD", str(folder))
    return folder


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ser", ["serve"]),
        ("build", ["build_ui", "build_bins"]),
        ("help inst", ["install_package"]),
        ("clean quantize mo", ["model="]),
        ("compl", ["completion"]),
        ("serve por", ["portable=", "port="]),
        ("serve port=1 backend=c", ["backend=cuda", "backend=cpu"]),
        ("port=1 serve model=demo bac", ["backend="]),
        ("serve server", ["server."]),
        ("serve server.f", ["server.flash_attn=", "server.fit="]),
        ("serve quant=q4_k", ["quant=q4_k_s", "quant=q4_k_m"]),
        ("serve model=", ["model=demo", "model=demo-embed", "model=org/model-GGUF"]),
        ("serve gguf_path=m", ["gguf_path=m.gguf", "gguf_path=more/", "gguf_path=my servers.toml"]),
        ("serve lora=x.gguf:0.5,m", ["lora=x.gguf:0.5,m.gguf", "lora=x.gguf:0.5,more/"]),
        ("logs fol", ["follow="]),
        ("ps fol", []),
        ("up dry_run=", ["dry_run=1", "dry_run=0"]),
        ("up config=my", ["config=my servers.toml"]),
        ("logs name=", []),
        ("test m", []),
        ("serve nosuch", []),
        ("serve nosuch=", []),
        ("serve config=/no/such/", []),
    ],
)
def test_what_is_offered(line: str, offered: list[str], here: Path) -> None:
    *before, word = line.split(" ")
    found = candidates(word, before)
    if word == "model=":  # files of this folder too
        assert found[len(offered) :] == ["model=m.gguf", "model=more/"]
        found = found[: len(offered)]
    assert found == offered


def test_the_instances_of_a_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = ["logs", "config=my servers.toml"]
    assert candidates("name=", named) == ["name=chat", "name=embed"]
    assert candidates("name=chat,e", named) == ["name=chat,embed"]
    monkeypatch.setenv("AUTO_INFER_LLAMA_CPP_CONFIG", "my servers.toml")
    assert candidates("name=e", ["up"]) == ["name=embed"]
    assert candidates("name=e", ["up", "config=m.gguf"]) == []


def test_the_models_on_disk_to_remove(here: Path) -> None:
    folder = here.parent / "home" / "models" / "gguf" / "org__other__0123456789ab"
    folder.mkdir(parents=True)
    file = folder / "other.Q8_0.gguf"
    file.write_bytes(b"GGUF")
    source = {"type": "hf", "ref": "org/other", "revision": "0" * 40}
    entry = receipts.stamp(file, {"step": "fetch"}, seconds=1, source=source)
    receipts.change(file, entry)
    assert candidates("model=", ["remove"]) == ["model=org/other"]
    assert candidates("model=d", ["remove"]) == [], "the demo is not here"


def bash(line: str, folder: Path, breaks: str = "") -> list[str]:
    """What bash offers for a line; `breaks` are its COMP_WORDBREAKS."""
    script = completion.script("bash")
    code = f"COMP_WORDBREAKS={breaks!r}\n" + BASH.format(script=script, line=line)
    done = subprocess.run(
        ["bash", "--norc", "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [word for word in done.stdout.split("|") if word]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doitw = REPOSITORY / "doitw"
    assert bash(f"{doitw} serve backend=c", here, " =:") == ["cuda ", "cpu "]
    assert bash(f"{doitw} serve backend=c", here) == ["backend=cuda ", "backend=cpu "]
    assert bash(f"{doitw} up config=my", here, " =:") == ["my\\ servers.toml "]
    assert bash(f"{doitw} serve gguf_path=mo", here, " =:") == ["more/"]
    assert bash(f"{doitw} serve ", here, " =:")[0] == "model="
    monkeypatch.setenv("PATH", f"{REPOSITORY}{os.pathsep}{os.environ['PATH']}")
    assert bash("doitw ser", here) == ["serve "]


SHELLS = {
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "--interactive"],
}
# The prompt is put together by the shell, so that the line typed here does not show it.
START = {
    "zsh": "autoload -Uz compinit; compinit -u; . ./script; PS1='REA''DY '",
    "fish": "source script; function fish_prompt; echo -n 'REA''DY '; end",
}
OFFERED = {
    "doitw serve port=1 backend=vul": "backend=vulkan",
    "doitw up config=my": "my\\ servers.toml",
    "doitw serve gguf_path=mo": "gguf_path=more/",
}


@pytest.mark.parametrize("shell", SHELLS)
def test_other_shells(shell: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    debian.require(shell)
    (here / "script").write_text(completion.script(shell), encoding="utf-8")
    monkeypatch.setenv("PATH", f"{REPOSITORY}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("TERM", "dumb")
    child, terminal = pty.fork()
    if not child:
        os.chdir(here)
        os.execvp(SHELLS[shell][0], SHELLS[shell])
    try:
        os.write(terminal, f"{START[shell]}\r".encode())
        until(terminal, "READY")
        for line, offered in OFFERED.items():
            os.write(terminal, f"{line}\t".encode())
            until(terminal, offered)
            os.write(terminal, b"\x15")  # Ctrl-U: forget the line
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def until(terminal: int, text: str) -> None:
    """Read what the shell shows until the text is there."""
    screen, end = "", time.monotonic() + 60
    while text not in screen:
        assert time.monotonic() < end, screen
        if select.select([terminal], [], [], 1)[0]:
            screen += os.read(terminal, 65536).decode("utf-8", "replace")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_command_prints_it(shell: str) -> None:
    done = subprocess.run(
        ["./doitw", "completion", shell], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert f"made by `doitw completion {shell}`" in done.stdout
    assert "@program@" not in done.stdout


def test_the_shells_own_call_without_a_word_is_wrong_usage() -> None:
    done = subprocess.run(
        ["./doitw", "completion", "words"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert "must be one of bash" in done.stderr and "Traceback" not in done.stderr
