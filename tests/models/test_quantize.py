"""How big quants become: told before a weight is there, and right to the last bytes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import kept
import pytest
from conftest import Doit
from fakes.large_llama import Size
from test_gguf import write
from twins import GROUPED, Twin

from pipeline.models import gguf, quantize, quants

SOME = ("Q4_K_M", "Q8_0", "F16", "Q2_K", "IQ4_XS", "Q5_0", "TQ2_0", "IQ3_M")

DRY_RUN = """\
[   1/   3] output.weight      - [  4096,  32000,      1,      1], type =   bf16, size =   250.00 MiB ->   102.54 MiB (q6_K)
[   2/   3] output_norm.weight - [  4096,      1,      1,      1], type =    f32, size =    0.016 MiB
[   3/   3] blk.0.x (odd).weight - [    10,      3,      2,      1], type =    f16, size =    0.000 MiB
llama_model_quantize_impl: quant size  =   102.55 MiB (6.56 BPW)
"""  # noqa: E501


def test_a_dry_run_is_read_tensor_by_tensor() -> None:
    q6_k, f32, f16 = 4096 // 256 * 210 * 32000, 4 * 4096, 128  # the last padded from 120
    assert quantize.tensor_bytes(DRY_RUN) == q6_k + f32 + f16


@pytest.mark.parametrize("text", ["", "error", DRY_RUN.replace("q6_K", "q9_Z")])
def test_what_is_not_understood_is_not_known(text: str) -> None:
    assert quantize.tensor_bytes(text) is None


@pytest.mark.build
def test_as_large_as_really_made(
    program: Callable[[str], Path], large: Callable[[Size], Twin], tmp_path: Path
) -> None:
    made = large(GROUPED)
    sizes = quantize.quant_sizes(program("llama-quantize"), made.skeleton, SOME)
    assert list(sizes) == list(SOME)
    for quant in SOME:
        real = _bytes(program("llama-quantize"), made.real, tmp_path / "q.gguf", quant)
        assert abs(sizes[quant] - real) <= 64, quant


@pytest.mark.build
def test_an_embedding_model_too(
    program: Callable[[str], Path], demo: Doit, twin: Callable[[Path, str], Twin], tmp_path: Path
) -> None:
    (folder,) = (demo.home / "models" / "source").iterdir()
    made = twin(folder, "F16")
    sizes = quantize.quant_sizes(program("llama-quantize"), made.skeleton, SOME)
    for quant in sizes:
        real = _bytes(program("llama-quantize"), made.real, tmp_path / "q.gguf", quant)
        assert abs(sizes[quant] - real) <= 64, quant
    direct = twin(folder, "Q8_0").real.stat().st_size
    assert abs(sizes["Q8_0"] - direct) <= 64, "the converter writes it as large"


@pytest.mark.build
def test_every_type_with_and_without_a_matrix(
    program: Callable[[str], Path], large: Callable[[Size], Twin]
) -> None:
    skeleton = large(GROUPED).skeleton
    plain = quantize.quant_sizes(program("llama-quantize"), skeleton, quants.TYPES)
    matrix = Path("a matrix")  # of which only matters that there is one
    weighed = quantize.quant_sizes(program("llama-quantize"), skeleton, quants.TYPES, matrix)
    assert list(plain) == list(weighed) == list(quants.TYPES)
    assert {quant: plain[quant] for quant in quants.NEED_IMATRIX} == {
        quant: weighed[quant] for quant in quants.NEED_IMATRIX
    }
    assert plain["Q2_K"] < plain["Q4_K_M"] < plain["Q6_K"] < plain["F16"] < plain["F32"]


@pytest.mark.build
def test_with_a_matrix_as_large_as_really_made(
    program: Callable[[str], Path], tiny: Path, twin: Callable[[Path, str], Twin], tmp_path: Path
) -> None:
    """With a real matrix, whose figures do not matter for sizes."""
    made = twin(tiny, "F16")
    (tmp_path / "text").write_text("The morning train to the coast was late. " * 200)
    matrix = tmp_path / "imatrix.gguf"
    command = [program("llama-imatrix"), "-m", made.real, "-f", tmp_path / "text", "-o", matrix]
    subprocess.run([*command, "-c", "64"], check=True, capture_output=True, timeout=300)
    sizes = quantize.quant_sizes(
        program("llama-quantize"), made.skeleton, ["IQ2_XXS", "Q4_K_M", "IQ4_NL"], matrix
    )
    for quant in sizes:
        real = _quantize(
            program("llama-quantize"), made.real, tmp_path / "q.gguf", quant, "--imatrix", matrix
        )
        # What the matrix was made from is noted in the header: file names, and some numbers.
        assert 0 <= real - sizes[quant] - len(str(tmp_path)) * 2 < 512, quant


@pytest.mark.build
def test_a_model_that_llama_quantize_refuses_has_no_sizes(
    program: Callable[[str], Path], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.gguf", lambda writer: None)  # of no use: it says next to nothing
    assert quantize.quant_sizes(program("llama-quantize"), path, SOME) == {}


def _bytes(program: Path, model: Path, made: Path, quant: str) -> int:
    return kept.quantized_bytes(
        program, model, quant, lambda: _quantize(program, model, made, quant)
    )


def _quantize(program: Path, model: Path, made: Path, quant: str, *options: str | Path) -> int:
    subprocess.run(
        [program, *options, model, made, quant], check=True, capture_output=True, timeout=300
    )
    assert gguf.read(made).quant == quant
    return made.stat().st_size
