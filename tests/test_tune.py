"""`tune` from the command line, and what `serve`, `plan` and files make of its result. llama-bench
is a stand-in, for a machine that runs tests has no speed; llama-server is the real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Doit, free_port, wait_for
from report import bench_stand_in as stand_in

from pipeline.core.store.locks import alone_with, lock_of

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script"),
]

FAST = {"-t 1": stand_in.speeds(300, 30), "-t 2": stand_in.speeds(100, 10)}
USUAL = stand_in.speeds(100, 10)  # without -t: two threads
NOT_TRIED = ("server.load_mode=none", "server.ubatch_size=512", "batch_size=2048")
FOUND = {"threads": "1", "threads-batch": "2"}


def programs(built: Path, folder: Path, cases: Mapping[str, str], usual: str = USUAL) -> Path:
    """The real programs, and a llama-bench that does what `cases` say."""
    own = folder / "own-cpu"
    shutil.copytree(next(built.glob("*-cpu")), own, copy_function=os.link)
    (own / "llama-bench").unlink()
    stand_in.write(own, cases, usual)
    return own


def tuned(doit: Doit) -> Path:
    """The file of the only result."""
    (file,) = (doit.home / "run" / "tuned").glob("*.json")
    return file


def rewritten(doit: Doit, options: Mapping[str, str], **given: str) -> None:
    """Have the result say something else."""
    data = json.loads(tuned(doit).read_text())
    data["tuned"] |= {"options": options, "given": given}
    tuned(doit).write_text(json.dumps(data))


def option(cmd: list[str], name: str) -> str | None:
    return cmd[cmd.index(f"--{name}") + 1] if f"--{name}" in cmd else None


def test_what_is_found_is_kept_and_served_with(built: Path, bare: Doit, gguf: Path) -> None:
    cases = {"-fa off": "kill -SEGV $$", **FAST}
    bare.env["LLAMA_SERVER_BINS_DIR"] = str(programs(built, bare.home, cases))
    words = (f"model={gguf}", "ctx_size=512")
    run = bare("tune", *words, *NOT_TRIED, "format=json")
    made: Any = run.json()
    assert any(why.endswith("was killed by signal 11") for why in made["left_out"].values())
    assert made["bandwidth"] > 0 and 0 < made["bandwidth_share"] <= 1
    if made["options"]:
        assert made["options"] == {"threads": "1", "threads-batch": "1"}
        assert made["ratio"]["value"] == pytest.approx(3, rel=0.05) and made["served"] >= 0.98
    else:  # on this machine llama-server is no faster with one thread
        assert "llama-server" in made["notes"][-1] and made["served"] is None

    again = bare("tune", *words, *NOT_TRIED)
    assert "force=1 measures again" in again.err and "tokens/s  threads" not in again.err
    left, made_at = tuned(bare).with_suffix(".runs"), tuned(bare).stat().st_mtime
    for later, stays in ((-1, False), (1, True)):  # than the result: of the search that was stopped
        left.write_text("{}")
        os.utime(left, (made_at + later,) * 2)
        bare("tune", *words, *NOT_TRIED)
        assert left.exists() == stays
    rewritten(bare, FOUND)
    planned = bare("plan", *words, "format=json").json()["cmd"]
    assert [option(planned, name) for name in FOUND] == ["1", "2"]
    for word, expected in (("tuned=no", [None, None]), ("threads=2", ["2", None])):
        planned = bare("plan", *words, word, "format=json").json()["cmd"]
        assert [option(planned, name) for name in FOUND] == expected
    planned = bare("plan", words[0], "format=json").json()
    assert option(planned["cmd"], "threads") is None, "it was measured for another context"
    (warning,) = (each for each in planned["warnings"] if "tuned" in each)
    assert "they were measured with ctx_size=512;" in warning
    rewritten(bare, FOUND, **{"flash-attn": "off"})
    planned = bare("plan", *words, "format=json").json()
    assert option(planned["cmd"], "threads-batch") is None
    assert any("measured with flash-attn=off;" in each for each in planned["warnings"])
    planned = bare("plan", *words, "server.flash_attn=off", "format=json").json()
    assert option(planned["cmd"], "threads-batch") == "2" and not planned["warnings"]
    rewritten(bare, FOUND)
    with bare.serving(*words):
        assert bare.summary["threads"] == "1 (tuned)"
        assert bare.summary["tuned"] == "threads-batch 2"

    config = bare.home / "servers.toml"
    config.write_text(
        f"[master]\nllama_cpp_path = '{bare.env['LLAMA_SERVER_BINS_DIR']}/llama-server'\n"
        f"[instance.a.model]\nref = '{gguf}'\n"
        f"[instance.a.server]\nport = {free_port()}\nctx_size = 512\n"
    )
    for words, expected in (((), "1"), (("tuned=no",), None)):
        (server,) = bare("plan", f"config={config}", *words, "format=json").json()
        assert option(server["cmd"], "threads") == expected
        assert server["tuned"] == ([*FOUND] if expected else [])


def test_the_result_is_tried_in_a_context_that_no_prompt_fits(
    built: Path, bare: Doit, gguf: Path
) -> None:
    bare.env["LLAMA_SERVER_BINS_DIR"] = str(programs(built, bare.home, FAST))
    words = (f"model={gguf}", "ctx_size=2048", "parallel=8", "server.flash_attn=off")
    run = bare("tune", *words, *NOT_TRIED)
    assert "trying the result with llama-server" in run.err
    assert not [*(bare.home / "logs").glob("tune-*")], "logs are of use where something went wrong"


def test_what_was_measured_survives_an_interruption(built: Path, bare: Doit, gguf: Path) -> None:
    program = programs(built, bare.home, {"-fa off": "exec sleep 60"})
    bare.env["LLAMA_SERVER_BINS_DIR"] = str(program)
    words = ("tune", f"model={gguf}", "ctx_size=512", *NOT_TRIED)
    log = bare.home / "err"

    def is_under_way() -> bool:
        assert process.poll() is None, log.read_text()
        return log.read_text().count("tokens/s") > 2

    with log.open("w") as err, bare.start(*words, stderr=err) as process:
        try:
            wait_for(is_under_way)
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130, log.read_text()
    (program / "llama-bench").unlink()
    stand_in.write(program, {})
    run = bare(*words)
    assert "going on with what an earlier run has measured" in run.err
    assert "nothing to gain" in run.out and not [*(bare.home / "run" / "tuned").glob("*.runs")]
    again = bare(*words, "force=1")
    assert "force=1" not in again.err and "tokens/s  threads 1" in again.err


def test_one_tune_waits_for_another(built: Path, bare: Doit, gguf: Path) -> None:
    bare.env["LLAMA_SERVER_BINS_DIR"] = str(programs(built, bare.home, {}))
    held, log = bare.home / "run" / "tuned" / "tune", bare.home / "err"
    held.parent.mkdir(parents=True)
    words = ("tune", f"model={gguf}", "ctx_size=512")
    with log.open("w") as err, alone_with(lock_of(held)), bare.start(*words, stderr=err) as process:
        try:
            wait_for(lambda: "another tune is measuring" in log.read_text())
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130, log.read_text()
    assert "tokens/s" not in log.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("budget=5",), "budget=5: must be seconds from 30 to 86400, or minutes: 90, 5m"),
        (("lossy=maybe",), "lossy=maybe: must be 1 or 0"),
        (("port=8080",), "port"),
    ],
)
def test_wrong_words_are_answered_before_any_work(
    bare: Doit, words: tuple[str, ...], message: str
) -> None:
    run = bare("tune", "model=demo", *words, status=3)
    assert message in run.err


def test_a_default_that_does_not_run_is_an_error(built: Path, bare: Doit, gguf: Path) -> None:
    script = "echo out of memory >&2; exit 1"
    bare.env["LLAMA_SERVER_BINS_DIR"] = str(programs(built, bare.home, {}, script))
    run = bare("tune", f"model={gguf}", "ctx_size=512", status=1)
    assert "llama-bench ended with status 1: out of memory" in run.err
