"""What is tried, with which options, and what is kept of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from report import bench_stand_in as stand_in

from pipeline.core import capacity
from pipeline.report import bandwidth, host, tuned, tuning_bench
from pipeline.report.figures import Estimate
from pipeline.report.tuned import Conditions, Runs, TuneResult
from pipeline.report.tuning_axes import DECODE, PROMPT, Scope, axes, bench_words, server_options
from pipeline.serve.config.configuration import InstanceSpec
from pipeline.serve.config.options import ResolvedOptions
from pipeline.serve.flags import parse_help
from pipeline.serve.server import Control

needs_shell = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")

FLAGS = parse_help("""\
-m,    --model FNAME                    model path
-t,    --threads N                      number of CPU threads
-tb,   --threads-batch N                number of threads for prompts
-b,    --batch-size N                   logical maximum batch size
-ub,   --ubatch-size N                  physical maximum batch size
-fa,   --flash-attn [on|off|auto]       use of Flash Attention
-ctk,  --cache-type-k TYPE              data type of the cache
-ctv,  --cache-type-v TYPE              data type of the cache
-ngl,  --gpu-layers N                   layers to store in VRAM
-ncmoe, --n-cpu-moe N                   layers whose experts stay in the CPU
-lm,   --load-mode MODE                 model loading mode (default: auto)
                                        - auto: mmap, unless a device does not support it
                                        - none: no special loading mode
                                        - mmap: memory-map model
""")


def given(**server: str) -> ResolvedOptions:
    table = {name.replace("_", "-"): value for name, value in server.items()}
    return ResolvedOptions(
        InstanceSpec(name="x", control=Control(), server=table, place="x"), FLAGS
    )


def values(scope: Scope, **server: str) -> dict[str, tuple[str, ...]]:
    return {axis.name: axis.values for axis in axes(scope, given(**server))}


def test_the_axes_of_a_processor() -> None:
    tried = values(Scope(processors=8, threads=4))
    assert tried["threads"] == tried["threads-batch"] == ("4", "2", "6", "7", "8")
    assert tried["ubatch-size"] == ("512", "256", "128")
    assert not {"placement", "cache-type"} & tried.keys()
    assert values(Scope(processors=2, threads=2))["threads"] == ("2", "1")
    assert "cache-type" in values(Scope(processors=8, threads=4, lossy=True))


def test_a_card_adds_where_the_layers_lie() -> None:
    tried = values(Scope(processors=8, threads=4, cards=1, experts=48))
    assert tried["placement"] == ("fit", "all", "experts 24", "experts 48")
    assert "2048" in tried["ubatch-size"] and "batch-size" in tried
    assert "placement" not in values(Scope(processors=8, threads=4, cards=1), gpu_layers="7")


def test_what_the_user_gives_is_not_tried() -> None:
    tried = values(Scope(processors=8, threads=4), threads="3", ubatch_size="64")
    assert not {"threads", "threads-batch", "ubatch-size"} & tried.keys()
    assert "threads" in values(Scope(processors=8, threads=4), threads_batch="3")


def test_a_model_that_pools_keeps_its_batches() -> None:
    tried = values(Scope(processors=8, threads=4, pools=True, lossy=True))
    assert not {"ubatch-size", "batch-size", "cache-type"} & tried.keys()


def test_one_changed_number_of_threads_leaves_the_other() -> None:
    assert server_options({"threads": "3"}, 8) == {"threads": "3", "threads-batch": "8"}
    assert server_options({"threads-batch": "3"}, 8) == {"threads": "8", "threads-batch": "3"}
    assert server_options({"cache-type": "q8_0"}, 8) == {
        "cache-type-k": "q8_0",
        "cache-type-v": "q8_0",
    }
    assert server_options({"placement": "experts 24"}, 8) == {
        "gpu-layers": "all",
        "n-cpu-moe": "24",
    }


def test_llama_bench_gets_the_threads_of_the_phase() -> None:
    setting = {"threads": "3", "threads-batch": "5", "flash-attn": "off"}
    assert bench_words(setting, PROMPT, {}) == ["-t", "5", "-fa", "off"]
    assert bench_words(setting, DECODE, {}) == ["-t", "3", "-fa", "off"]
    assert bench_words({}, PROMPT, {"threads": "2", "port": "1"}) == ["-t", "2"]
    assert bench_words({"threads": "3"}, PROMPT, {}) == []


def test_llama_bench_places_layers_as_the_server_does() -> None:
    fit = ["-fitt", "1024", "-fitc", "4096"]
    assert bench_words({}, DECODE, {}, cards=1, ctx_size=4096) == fit
    assert bench_words({"placement": "all"}, DECODE, {}, cards=1) == ["-ngl", "999"]
    assert bench_words({}, DECODE, {"gpu-layers": "7"}, cards=1) == ["-ngl", "7"]
    assert bench_words({}, DECODE, {"gpu-layers": "auto"}, cards=1, ctx_size=4096) == fit


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"device": "CUDA0,CUDA1"}, ["-dev", "CUDA0/CUDA1"]),
        ({"tensor-split": "3,1"}, ["-ts", "3/1"]),
        ({"override-tensor": "up=CPU,down=CPU"}, ["-ot", "up=CPU;down=CPU"]),
        ({"gpu-layers": "-1"}, []),
        ({"gpu-layers": "-2"}, ["-ngl", "999"]),
        *(({"threads": each}, ["-t", str(os.cpu_count())]) for each in ("0", "-1")),
    ],
)
def test_llama_bench_gets_what_llama_server_would_do(
    given: dict[str, str], expected: list[str]
) -> None:
    """A comma is between two runs for it, and it crashes without a thread."""
    assert bench_words({}, DECODE, given) == expected


@needs_shell
def test_the_search_leaves_out_what_fails_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    cases = {
        "-fa off": "kill -SEGV $$",
        "-ub 128": "echo nonsense",
        "-ub 256": "echo out of memory >&2; exit 1",
        "-t 1": stand_in.speeds(150, 20),
    }
    program = stand_in.write(tmp_path / "x-cpu", cases)
    model, kept = stand_in.model(tmp_path / "m.gguf"), tmp_path / "tuned" / "x.runs"
    tried = axes(Scope(processors=2, threads=2), given(load_mode="none"))

    def search() -> tuning_bench.SearchResult:
        bench = tuning_bench.Bench(program, model, Runs(kept), given={})
        assert bench.first.threads == 2
        return tuning_bench.search(bench, tried, lambda share: True)

    found = search()
    assert found.setting == {"threads": "1", "threads-batch": "1"}
    assert found.ratio.value == pytest.approx((5.12 + 12.8) / (512 / 150 + 6.4), rel=0.01)
    assert found.left_out["flash-attn off"].endswith("was killed by signal 11")
    assert found.left_out["ubatch-size 128"].endswith("printed no speeds")
    assert found.left_out["ubatch-size 256"].endswith("ended with status 1: out of memory")
    program.write_text("#!/bin/sh\nexit 9\n")  # all that is needed was kept, but for what failed
    assert search().setting == found.setting


@needs_shell
def test_a_default_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    program = stand_in.write(tmp_path / "x-cpu", {}, "echo no such device >&2; exit 1")
    with pytest.raises(tuning_bench.bench.PipelineError, match="no such device"):
        tuning_bench.Bench(
            program, stand_in.model(tmp_path / "m.gguf"), Runs(tmp_path / "r"), given={}
        )


def result(run: Path) -> TuneResult:
    key = Conditions(program="1", model="2", host=host.describe())
    made = TuneResult(key=key, options={"threads": "1"}, ratio=Estimate(1.5, 0.1))
    tuned.save(key.place(run), made)
    return made


def test_a_result_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    made = result(tmp_path)
    assert tuned.load(made.key.place(tmp_path)) == made
    other = Conditions(program="1", model="2", host=host.describe(), ctx_size=4096)
    assert tuned.load(other.place(tmp_path)) is None


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 0, "tuned": {}}', '{"schema": 1}'])
def test_what_is_no_result_counts_as_none(tmp_path: Path, text: str) -> None:
    place = result(tmp_path).key.place(tmp_path)
    place.write_text(text)
    assert tuned.load(place) is None


def test_runs_that_cannot_be_read_are_made_again(tmp_path: Path) -> None:
    file = tmp_path / "x.runs"
    runs = Runs(file)
    runs.add({"threads": "1"}, DECODE, [1.0, 2.0])
    runs.add({"threads": "1"}, DECODE, [3.0])
    again = Runs(file)
    assert again.are_resumed
    assert [again.take({"threads": "1"}, DECODE) for _ in range(3)] == [(1.0, 2.0), (3.0,), None]
    assert not Runs(file, {"threads": "2"}).are_resumed, "other options were given"
    file.write_text(json.dumps([["x"]]))
    assert not Runs(file).are_resumed


def test_the_machine_has_no_name() -> None:
    machine = host.describe()
    assert machine.processor and machine.processors == capacity.processors()
    assert 0 < machine.memory < 100_000


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in")
def test_on_windows_a_driver_of_nvidia_is_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "*driver_version*) echo 'NVIDIA H100, 9.0, 580.95.05, Disabled, 81559' ;;\n"
        "*) echo 'NVIDIA H100, 81559, 81079' ;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "win32")
    assert host._cards() == (("NVIDIA H100",), "580.95.05")


def test_the_memory_is_faster_than_nothing_and_slower_than_light() -> None:
    assert 1e8 < bandwidth.measured(4 * 1024**2) < 1e13


@pytest.mark.build
def test_writing_reads_no_more_than_the_weights(gguf: Path) -> None:
    read = bandwidth.read_per_token(gguf)
    assert 0.5 * gguf.stat().st_size < read < gguf.stat().st_size
