"""The promise of `plan`: what is told from headers alone is what llama-server holds once loaded.

Two witnesses: the buffers that the server says it has allocated, which is what the estimate is
about, and the memory that is really its own, with the weights loaded instead of mapped. The
latter has the program's own 10 MB or so on top, and lacks what was never touched of cache and
compute buffers, so the server first reads a long text.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Doit, free_port, get, post, wait_for
from fakes.large_llama import Size
from twins import DENSE, GROUPED, Twin

from pipeline.models import formula, gguf, memory, quantize
from pipeline.models.memory import Memory
from pipeline.serve.config.llama import batch_options, endpoint_options

pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").exists(), reason="reads what Linux tells of a process"),
]
BUFFER = re.compile(r"(?:load_tensors|llama_kv_cache|sched_reserve): .*buffer size = +([\d.]+) MiB")
OWN = 16 * memory.MIB  # code, threads and tables of the server itself


@dataclass(frozen=True)
class Held:
    """What a server holds, in bytes: by its own log, and by the kernel."""

    buffers: int
    private: int


@contextmanager
def _loaded(program: Path, model: Path, ctx_size: int, log: Path) -> Iterator[tuple[int, str]]:
    header = gguf.read(model)
    port = free_port()
    words = ["--model", str(model), "--port", str(port), "--ctx-size", str(ctx_size)]
    words += [*endpoint_options(header.pooling), *batch_options(header.pooling, ctx_size, None)]
    # As it is served, but for the weights: mapped ones are the file's, and nobody's own memory.
    words += ["--load-mode", "none", "--log-verbosity", "5"]
    with (
        log.open("w") as out,
        subprocess.Popen([program, *words], stdout=out, stderr=subprocess.STDOUT) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: process.poll() is not None or _answers(f"{url}/health"), 120)
            assert process.poll() is None, log.read_text()[-2000:]
            yield process.pid, url
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return bool(get(url))
    except OSError:
        return False


def held(program: Path, model: Path, ctx_size: int, log: Path) -> Held:
    with _loaded(program, model, ctx_size, log) as (pid, url):
        text = "the rain and the train " * (min(ctx_size, 4096) // 30)
        if gguf.read(model).pooling == "none":
            post(f"{url}/completion", {"prompt": text, "n_predict": 1})
        else:
            post(f"{url}/v1/embeddings", {"input": text[:600]})
        file = Path(f"/proc/{pid}/smaps_rollup")
        private = re.search(r"^Anonymous: +(\d+) kB", file.read_text(), re.M)
        assert private
    # The server tries the fit first, with buffers that it does not allocate; the load is last.
    real = log.read_text().rpartition("load_tensors: loading model tensors")[2]
    buffers = [float(number) for number in BUFFER.findall(real)]
    assert buffers, log.read_text()[-3000:]
    return Held(int(sum(buffers) * memory.MIB), int(private[1]) * 1024)


def estimated(program: Path, skeleton: Path, ctx_size: int, book: Path) -> Memory:
    """What is told of it beforehand, as `serve` asks it."""
    header = gguf.read(skeleton)
    options = batch_options(header.pooling, ctx_size, None)
    estimate = memory.measure(program, "build", skeleton, options, ctx_size, book)
    assert estimate
    if header.pooling == "none":
        estimate = formula.served(estimate, formula.of_header(header), ctx_size)
    return estimate


def _near(estimate: int, real: int) -> None:
    assert abs(estimate - real) <= 0.1 * real, f"{estimate / real:.3f} of {real} bytes"


@pytest.mark.parametrize(
    ("size", "ctx_size"),
    [(DENSE, 4096), (DENSE, 1024), (GROUPED, 4096), (GROUPED, 16384)],
    ids=["dense 4096", "dense 1024", "grouped 4096", "grouped 16384"],
)
def test_what_is_told_is_what_is_held(
    program: Callable[[str], Path],
    large: Callable[[Size], Twin],
    tmp_path: Path,
    size: Size,
    ctx_size: int,
) -> None:
    made = large(size)
    estimate = estimated(program("llama-fit-params"), made.skeleton, ctx_size, tmp_path / "book")
    real_use = held(program("llama-server"), made.real, ctx_size, tmp_path / "log")
    print(f"estimated {estimate.total}, buffers {real_use.buffers}, private {real_use.private}")
    _near(estimate.total, real_use.buffers)
    _near(estimate.total + OWN, real_use.private)


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q8_0"])
def test_of_a_quant_too(
    program: Callable[[str], Path], large: Callable[[Size], Twin], tmp_path: Path, quant: str
) -> None:
    made, ctx_size = large(GROUPED), 4096
    header = gguf.read(made.skeleton)
    size = quantize.quant_sizes(program("llama-quantize"), made.skeleton, [quant])[quant]
    estimate = estimated(program("llama-fit-params"), made.skeleton, ctx_size, tmp_path / "book")
    estimate = memory.resized(estimate, header.size - header.data, size - header.data)
    real = tmp_path / "q.gguf"
    subprocess.run(
        [program("llama-quantize"), made.real, real, quant],
        check=True,
        capture_output=True,
        timeout=300,
    )
    real_use = held(program("llama-server"), real, ctx_size, tmp_path / "log")
    print(f"estimated {estimate.total}, buffers {real_use.buffers}, private {real_use.private}")
    _near(estimate.total, real_use.buffers)
    _near(estimate.total + OWN, real_use.private)
    # What the tool says of the finished file.
    after = memory.measure(program("llama-fit-params"), "b", real, [], ctx_size, tmp_path / "b")
    assert after
    assert abs(after.weights - estimate.weights) <= memory.MIB
    assert after.context == estimate.context


def test_of_an_embedding_model_too(
    program: Callable[[str], Path],
    demo: Doit,
    twin: Callable[[Path, str], Twin],
    tmp_path: Path,
) -> None:
    (folder,) = (demo.home / "models" / "source").iterdir()
    made = twin(folder, "F32")
    estimate = estimated(program("llama-fit-params"), made.skeleton, 512, tmp_path / "book")
    real_use = held(program("llama-server"), made.real, 512, tmp_path / "log")
    print(f"estimated {estimate.total}, buffers {real_use.buffers}, private {real_use.private}")
    _near(estimate.total, real_use.buffers)
    _near(estimate.total + OWN, real_use.private)
