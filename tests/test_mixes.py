"""quant= as a size, as users type it: the file, the second run, the lock file, what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import REPOSITORY, Doit, Run, post, wait_for, with_programs
from fakes import hub
from fakes.tiny_llama import TEXT
from kills import kill_all
from quality_tools import rewrite
from twins import Twin

from pipeline.bins.compile import source
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.models import divergence, texts

pytestmark = pytest.mark.build


@pytest.fixture(scope="module")
def original(
    tiny: Path, twin: Callable[[Path, str], Twin], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An unquantized GGUF of the user's own, and beside it a text of some thousand tokens."""
    folder = tmp_path_factory.mktemp("own") / "mödel s"
    folder.mkdir()
    shutil.copyfile(twin(tiny, "F16").real, folder / "tiny.gguf")
    (folder / "text.txt").write_text(TEXT * 3, "utf-8")
    return folder / "tiny.gguf"


def without_perplexity(built: Path, folder: Path) -> Path:
    if not folder.exists():
        programs = next(path.parent for path in built.glob("*/llama-quantize*"))
        every = shutil.ignore_patterns("llama-perplexity*", ".*")
        shutil.copytree(programs, folder, copy_function=os.link, ignore=every)
    return folder


def run(doit: Doit, task: str, model: Path, quant: str, *words: str, status: int = 0) -> Run:
    text = model.with_name("text.txt")
    words = (f"model={model}", f"quant={quant}", f"imatrix={text}", *words)
    return doit(task, *words, status=status)


@pytest.mark.parametrize("measures", [False, pytest.param(True, marks=pytest.mark.long)])
def test_made_once_and_the_same_again_from_the_lock_file(
    built: Path, original: Path, tmp_path: Path, measures: bool
) -> None:
    """Without llama-perplexity, which would run some twenty times, all tensors count the same."""
    doit, other = (with_programs(built, tmp_path / name) for name in ("hôme", "öther"))
    for each in (doit, other):
        each.env["LLAMA_PIPELINE_CWD"] = str(tmp_path)
        if not measures:
            each.env["LLAMA_SERVER_BINS_DIR"] = str(without_perplexity(built, tmp_path / "bins"))
    planned = run(doit, "plan", original, "4.8bpw", "format=json").json()
    made = Path(planned["file"])
    assert made.name == "model.4.8bpw.gguf"
    output = run(doit, "prepare", original, "4.80BPW").err
    assert "4.80 bits per weight" in output or "4.79 bits per weight" in output
    reader = gguf.GGUFReader(made)
    bits = sum(t.n_bytes for t in reader.tensors) * 8 / sum(t.n_elements for t in reader.tensors)
    assert 4.7 < bits <= 4.8
    assert 0 <= planned["file_bytes"] - made.stat().st_size < planned["file_bytes"] / 50
    chosen = json.loads(made.with_name("mix.4.8bpw.json").read_text("utf-8"))
    types = {
        t.name: t.tensor_type.name.lower() for t in reader.tensors if t.name in chosen["types"]
    }
    assert types == chosen["types"]
    assert len(set(chosen["types"].values())) > 1
    if measures:
        assert chosen["divergence"] <= chosen["plain_divergence"]
    else:
        assert "an error counts the same in every tensor" in output
        assert chosen["divergence"] is None
    assert run(doit, "prepare", original, "4.8bpw").steps == []
    entries = doit("models", "format=json").json()
    assert {(each["kind"], each["quant"]) for each in entries["models"]} >= {
        ("model", "4.8BPW"),
        ("mix", "4.8BPW"),
    }

    run(doit, "lock", original, "4.8bpw")
    frozen = run(other, "prepare", original, "4.8bpw", "frozen=1")
    assert "llama-perplexity" not in frozen.err, "the types are pinned"
    again = other.home / made.relative_to(doit.home)
    assert again.read_bytes() == made.read_bytes()
    assert run(other, "prepare", original, "4.8bpw", "frozen=1").steps == []
    assert run(other, "prepare", original, "4.8bpw").steps == []

    (tmp_path / "pipeline.lock").unlink()  # which uses it
    run(other, "remove", original, "4.8bpw", "yes=1")
    assert not again.exists()
    assert not again.with_name("mix.4.8bpw.json").exists()

    results = [*(doit.home / "run" / "mix").glob("*.json")]
    assert len(results) == 1
    run(doit, "clean", original, "4.8bpw", "quantize")
    assert not any(map(Path.exists, (made, made.with_name("mix.4.8bpw.json"), *results)))


@pytest.mark.long
def test_a_mix_that_the_lock_file_pins_is_made_in_one_pass(
    built: Path, tiny: Path, original: Path, tmp_path: Path
) -> None:
    """From safetensors, with a matrix of the user's own; by programs of a package, which says that
    they are of the pinned llama.cpp."""
    doit, other = (with_programs(built, tmp_path / name) for name in ("hôme", "öther"))
    manifest = {"commit": pins().llama_cpp_commit, "backend": "cpu"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    for each in (doit, other):
        each.env["LLAMA_PIPELINE_CWD"] = str(tmp_path)
        each.env["LLAMA_SERVER_BINS_DIR"] = str(without_perplexity(built, tmp_path / "bins"))
    text = original.with_name("text.txt")
    doit("prepare", f"model={tiny}", "quant=4.8bpw", f"imatrix={text}")
    (matrix,) = (doit.home / "models").rglob("imatrix-*.gguf")
    matrix = matrix.rename(tmp_path / "matrix.gguf")
    words = (f"model={tiny}", "quant=4.8bpw", f"imatrix={matrix}")
    chosen = doit("prepare", *words)
    assert "a mix is chosen with the unquantized GGUF" in chosen.err
    doit("lock", *words)
    planned = other("plan", *words, "frozen=1", "format=json").json()
    assert {step["what"] for step in planned["steps"] if step["name"] == "convert"} == {
        "in one pass with quantize"
    }
    assert "converting and quantizing" in other("prepare", *words, "frozen=1").err
    for name in ("model.4.8bpw.gguf", "mix.4.8bpw.json"):
        (here,), (there,) = ([*(x.home / "models").rglob(name)] for x in (doit, other))
        assert here.name.endswith(".json") or here.read_bytes() == there.read_bytes()
    assert other("prepare", *words, "frozen=1").steps == []
    assert other("prepare", *words).steps == []


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ("1bpw", r"quant=1bpw: a mix of this model has from "),
        ("17bpw", r"quant=17bpw: a mix of this model has from "),
        ("0.1MiB", r"quant=0.1MiB: a mix of this model has from "),
        ("4,8bpw", r"did you mean 4.8bpw?"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(
    built: Path, original: Path, tmp_path: Path, quant: str, message: str
) -> None:
    doit = with_programs(built, tmp_path / "home")
    refused = run(doit, "prepare", original, quant, status=3)
    assert message in refused.err
    assert not [*doit.home.rglob("*.gguf")]


@pytest.mark.parametrize(
    ("task", "reference", "words"),
    [
        ("prepare", "org/tiny", "quant=2.1bpw"),
        ("quality", "folder", "quants=q8_0,2.1bpw"),
    ],
)
def test_what_the_header_rules_out_is_refused_before_weights_are_fetched_or_converted(
    doit: Doit, tiny: Path, tmp_path: Path, task: str, reference: str, words: str
) -> None:
    if reference == "folder":
        reference = str(tiny)
    shutil.copytree(tiny, tmp_path / "hub" / "org" / "tiny")
    with hub.start(tmp_path / "hub") as running:
        doit.env |= {"HF_ENDPOINT": running.endpoint, "HF_HOME": str(tmp_path / "hf")}
        refused = doit(task, f"model={reference}", *words.split(), status=3)
    assert "=2.1bpw: a mix of this model has from" in refused.err
    suffixes = (".gguf", ".safetensors")
    assert not [path for path in (doit.home / "models").rglob("*") if path.suffix in suffixes]


@pytest.mark.long
def test_a_killed_choice_leaves_nothing(built: Path, original: Path, tmp_path: Path) -> None:
    doit = with_programs(built, tmp_path / "home")
    doit.env["LLAMA_SERVER_BINS_DIR"] = str(without_perplexity(built, tmp_path / "bins"))
    text = original.with_name("text.txt")
    words = ("prepare", f"model={original}", "quant=4.8bpw", f"imatrix={text}")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with doit.start(*words, **quiet) as process:
        (folder,) = wait_for(lambda: [*(doit.home / "models").rglob("*.part.work")])
        kill_all(process)
    assert folder.exists()
    again = doit(*words)
    assert "importance matrix" not in again.err, "that was finished"
    assert not [*(doit.home / "models").rglob(".*.part*")]
    made = {folder.with_name("model.4.8bpw.gguf"), folder.with_name("mix.4.8bpw.json")}
    assert made <= {*folder.parent.iterdir()}


def test_no_mix_of_a_file_that_is_quantized(built: Path, gguf: Path, tmp_path: Path) -> None:
    doit = with_programs(built, tmp_path / "home")
    for quant in ("4.8bpw", "fit"):
        refused = doit("prepare", f"model={gguf}", f"quant={quant}", status=3)
        assert f"quantizing it again (quant={quant}) would cost quality" in refused.err


def test_fit_is_the_largest_mix_that_the_memory_holds(
    built: Path, original: Path, tmp_path: Path
) -> None:
    doit = with_programs(built, tmp_path / "home")
    resolved = run(doit, "resolve", original, "fit")
    assert "quant 8.5bpw, the largest mix that fits the memory" in resolved.err
    assert (
        run(doit, "plan", original, "fit", "format=json")
        .json()["file"]
        .endswith("model.8.5bpw.gguf")
    )


@pytest.mark.long
def test_a_mix_loses_at_most_seven_tenths_of_what_the_plain_quant_loses(
    built: Path, trained: Path, program: Callable[[str], Path], tmp_path: Path
) -> None:
    """A Llama that was trained, at no more bytes than Q4_K_M, on another text than the mix was
    chosen with."""
    doit = with_programs(built, tmp_path / "home")
    model = shutil.copyfile(trained, tmp_path / "llama.gguf")

    def prepared(quant: str) -> Path:
        doit("prepare", f"model={model}", f"quant={quant}")
        return Path(doit("plan", f"model={model}", f"quant={quant}", "format=json").json()["file"])

    plain = prepared("q4_k_m")
    mixed = prepared(no_larger_than(plain))
    assert mixed.stat().st_size <= plain.stat().st_size
    tool = divergence.Perplexity(program=program("llama-perplexity"), logs=tmp_path)
    group = divergence.ChunkGroup(base=tmp_path / "answers", text=tmp_path / "text.txt")
    tree = source.find(Home(REPOSITORY)).folder
    text = texts.save(tree, "test", Home(doit.home)).read_text("utf-8")
    divergence.write_base(tool, model, group, text, 24)
    lost = [divergence.mean(tool, quant, group) for quant in (plain, mixed)]
    assert 0 < lost[1] <= 0.7 * lost[0]


def no_larger_than(file: Path) -> str:
    """The size of a mix that has no more bytes."""
    return f"{math.floor(file.stat().st_size * 1000 / (1 << 20)) / 1000:.3f}MiB"


@pytest.mark.long
def test_embeddings_of_a_mix_turn_less_than_those_of_the_plain_quant(
    demo: Doit, built: Path, tmp_path: Path
) -> None:
    """all-MiniLM-L6-v2, which nobody quantized before, at no more bytes than Q4_K_M."""
    doit = with_programs(built, tmp_path / "home")
    (doit.home / "models").mkdir()
    shutil.copytree(demo.home / "models", doit.home / "models", dirs_exist_ok=True)
    asked = [line for line in TEXT.splitlines() if line]
    files, embedded = {}, {}
    for quant in ("f32", "q4_k_m", ""):
        quant = quant or no_larger_than(files["q4_k_m"])
        words = ("model=demo-embed", f"quant={quant}")
        files[quant] = Path(doit("plan", *words, "format=json").json()["file"])
        with doit.serving(*words) as url:
            answer = post(f"{url}/v1/embeddings", {"input": asked})
        embedded[quant] = [each["embedding"] for each in answer["data"]]
    exact, plain, mixed = embedded.values()
    assert [*files.values()][2].stat().st_size <= files["q4_k_m"].stat().st_size
    assert mean_cosine(exact, plain) < 0.995
    assert mean_cosine(exact, mixed) >= 0.997


def mean_cosine(some: list[list[float]], others: list[list[float]]) -> float:
    a, b = np.array(some), np.array(others)
    products = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(products.mean())


@pytest.mark.build
def test_models_that_end_texts_with_a_token_read_texts(
    doit: Doit, trained: Path, short_minilm: Path, prose: str, tmp_path: Path
) -> None:
    """llama-perplexity and llama-imatrix refuse them, by an assertion."""
    (text := tmp_path / "text").write_text(prose[:20_000], "utf-8")
    own = {"tokenizer.ggml.add_eos_token": True}
    rewrite(trained, model := tmp_path / "ends.f16.gguf", own, lambda name: True)
    for each in (model, short_minilm):
        doit("prepare", f"model={each}", "quant=q4_0", f"imatrix={text}")
    doit("quality", f"model={model}", "quants=q8_0", "chunks=8", f"text={text}")
