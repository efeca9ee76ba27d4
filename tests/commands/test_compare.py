"""`compare`, with real parts: what is measured, kept, written, and refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import pytest
from conftest import Doit
from fakes import hub

from pipeline.commands import compare_speed
from pipeline.commands.compare import typed
from pipeline.commands.model import Model
from pipeline.report.comparison import MARK, NAMES, PAGE


def rows(document: Any) -> dict[str, Any]:
    return {row["quant"]: row for row in document["report"]["candidates"]}


@pytest.mark.build
@pytest.mark.slow
@pytest.mark.parametrize(
    "quants", [["Q4_0"], pytest.param(["Q8_0", "Q4_0"], marks=pytest.mark.long)], ids=len
)
def test_a_model_is_compared_and_the_second_run_measures_nothing(
    doit: Doit, trained: Path, tmp_path: Path, quants: list[str]
) -> None:
    model, out = tmp_path / "my <b>modél.f16.gguf", tmp_path / "neü" / "page"
    model.symlink_to(trained)
    words = (f"model={model}", f"quants={','.join(quants).lower()}", "chunks=8", f"out={out}")
    document = doit("compare", *words, "format=json").json()
    shown = rows(document)
    assert [*shown] == sorted(quants), "smallest first"
    for row in shown.values():
        assert row["quality"]["kld"]["value"] > 0 and row["quality"]["kld"]["error"] > 0
        assert row["speed"]["prompt"]["value"] > 0 and row["speed"]["decode"]["value"] > 0
        assert row["memory"]["fits"]
    losses = [row["quality"]["kld"]["value"] for row in shown.values()]
    assert losses == sorted(losses, reverse=True)
    assert document["files"] == [str(out / name) for name in NAMES]
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files.keys() == {*NAMES}
    for name in NAMES[:-1]:
        ElementTree.fromstring(files[name])
    page = files[PAGE].decode()
    assert str(doit.home) not in page and "$LLAMA_PIPELINE_HOME" in page
    assert "my &lt;b&gt;modél" in page and "<b>" not in page

    log = doit.home / "logs"
    before = {path: path.stat().st_mtime_ns for path in log.iterdir()}
    again = doit("compare", *words)
    for what in ("quality", "speed"):
        assert f"kept from an earlier run: the {what} of {', '.join(quants)}" in again.err
    assert {path: path.stat().st_mtime_ns for path in log.iterdir()} == before
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert str(out / PAGE) in again.out and "Q4_0" in again.out

    only = doit("compare", *words, "measure=quality", "ctx_size=256")
    assert "The speed is not measured" in only.out and "memory at 256" in only.out
    assert "measure=quality ctx_size=256" in (out / PAGE).read_text("utf-8")
    assert not (out / "speed.svg").exists(), "a picture without figures does not stay"


@pytest.mark.build
def test_a_quantized_file_is_shown_without_quality(doit: Doit, gguf: Path) -> None:
    document = doit("compare", f"model={gguf}", "measure=quality", "format=json").json()
    (row,) = rows(document).values()
    assert row["quant"] == "Q8_0" and row["quality"] is None and row["speed"] is None
    assert "there is no unquantized model" in document["report"]["notes"][0]
    page = Path(document["files"][-1])
    assert page.parent.parent == doit.home / "reports" and page.name == PAGE
    assert "quants=: " in doit("compare", f"model={gguf}", "quants=q4_0", status=3).err


@pytest.mark.build
def test_a_repository_without_an_unquantized_file_has_all_but_the_quality(
    doit: Doit, gguf: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hub" / "org" / "only-GGUF"
    folder.mkdir(parents=True)
    shutil.copyfile(gguf, folder / "tiny.Q8_0.gguf")
    with hub.start(tmp_path / "hub") as server:
        doit.env |= {"HF_ENDPOINT": server.endpoint, "NO_PROXY": "127.0.0.1,localhost"}
        doit.env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        words = ("model=org/only-GGUF", "quants=q8_0", "measure=quality")
        refused = doit("compare", words[0], "quants=q8_0,q5_k_m", status=3)
        assert "has no GGUF with the quant Q5_K_M" in refused.err and "quants=…" in refused.err
        assert not [*(doit.home / "models").rglob("*.gguf")], "before anything is downloaded"
        for offline in (0, 1):  # the four that are measured by default
            usual = doit("compare", words[0], words[2], f"offline={offline}")
            assert "not there, and left out: Q4_K_M, Q5_K_M, Q6_K; quants=" in usual.err
        document = doit("compare", *words, "format=json").json()
    (row,) = rows(document).values()
    assert row["quality"] is None and row["memory"]
    assert (
        document["report"]["notes"][0]
        == "The quality is not measured: only: its repository has no unquantized GGUF."
    )
    assert any(word.startswith("revision=") for word in document["report"]["commands"][0].split())


@pytest.mark.build
def test_files_of_others_are_not_replaced(doit: Doit, gguf: Path, tmp_path: Path) -> None:
    mine = tmp_path / "speed.svg"
    mine.write_text("<svg/>", "utf-8")
    words = (f"model={gguf}", "measure=quality")
    run = doit("compare", *words, f"out={tmp_path}", status=3)
    assert f"{mine}: was not written by compare" in run.err and mine.read_text("utf-8") == "<svg/>"
    assert "is a file" in doit("compare", *words, f"out={mine}", status=3).err
    assert f"{mine} is a file" in doit("compare", *words, f"out={mine / 'x'}", status=3).err
    mine.write_text(MARK, "utf-8")
    (page := tmp_path / PAGE).mkdir()
    assert f"{page}: was not written" in doit("compare", *words, f"out={tmp_path}", status=3).err
    page.rmdir()
    doit("compare", *words, f"out={tmp_path}")


@pytest.mark.build
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(
    doit: Doit, gguf: Path, tmp_path: Path
) -> None:
    (link := tmp_path / "link").symlink_to("nowhere")
    for out, said in (("/proc/x", "/proc: cannot be written to"), (link, "is a link to nowhere")):
        run = doit("compare", f"model={gguf}", f"out={out}", status=1)
        assert said in run.err and not (doit.home / "run" / "speeds.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("measure=size",), "measure=size: must be one of quality, speed"),
        (("measure=",), "measure=: must be"),
        (("quants=what",), "quants=what: must be"),
        (("port=1",), "port=1: not a variable of compare"),
    ],
)
def test_wrong_words_are_answered(bare: Doit, words: tuple[str, ...], said: str) -> None:
    assert said in bare("compare", "model=demo", *words, status=3).err


def test_commands_are_typed_as_a_shell_reads_them() -> None:
    def hide(word: str) -> str:
        return word.replace("/srv/my home", "$LLAMA_PIPELINE_HOME").replace("/home/me", "~")

    words = ["/srv/my home/bins/llama-bench", "-m", "/srv/my home/modél.gguf", "/home/me/a b.gguf"]
    line = typed(words, hide)
    script = f"printf '%s\n' {line}"
    env = {"LLAMA_PIPELINE_HOME": "/srv/my home", "HOME": "/home/me", "PATH": os.defpath}
    run = subprocess.run(["sh", "-c", script], env=env, stdout=subprocess.PIPE, check=True)
    assert run.stdout.decode().splitlines() == words


def test_llama_bench_gets_what_llama_server_would_do() -> None:
    """A comma is between two runs for it, and it crashes without a thread."""
    request = SimpleNamespace(threads=-1, device="CUDA0,CUDA1", gpu_layers="all")
    words = compare_speed.options(cast(Model, SimpleNamespace(request=request)))
    assert words == ["-t", str(os.cpu_count()), "-dev", "CUDA0/CUDA1"]


def test_a_model_is_needed(bare: Doit) -> None:
    assert "compare: no model given" in bare("compare", status=3).err
