"""The quality of quants, measured with the real programs on models that were trained."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Doit, wait_for
from fakes import hub, tiny_reranker
from kills import kill_all
from quality_tools import Quantize, rewrite, spoiled, varied

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.store.hashing import sha256
from pipeline.models import divergence
from pipeline.models.divergence import Perplexity
from pipeline.models.gguf import Header
from pipeline.report import quality
from pipeline.report.quality import Limit, Measured, Setup
from pipeline.report.quality_statistics import Verdict

pytestmark = pytest.mark.build
LIMIT = Limit("max_kld", 0.001, "kld")  # this model's Q6_K loses a fourth of it
SPOILS = ("noise", "scale", "swap", "Q2_K")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "hôme ü")


@pytest.fixture
def setup(home: Home, program: Callable[[str], Path], prose: str) -> Setup:
    file = program("llama-perplexity")
    return Setup(
        home=home,
        kind="language",
        program_digest=sha256(file),
        text=lambda: prose,
        text_digest="prose",
        text_name="the text of the tests",
        perplexity=Perplexity(
            program=file, logs=home.logs, ctx_size=256, options=("--threads", "1")
        ),
    )


def measured(path: Path) -> Measured:
    return Measured(path=path, digest=sha256(path))


def verdict(setup: Setup, base: Path, quant: Path) -> Verdict:
    """Of one quant, with as many chunks as it takes."""
    wants = quality.verdict_wants(LIMIT, 32)
    samples = quality.measure(setup, measured(base), {"it": measured(quant)}, wants)
    return LIMIT.verdict(samples["it"])


def test_a_larger_quant_loses_less_and_nothing_is_measured_twice(
    setup: Setup, trained: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    quants = {quant: measured(quantize(trained, quant, quant)) for quant in ("Q8_0", "Q2_K")}
    base = measured(trained)
    folder = setup.home.run / "quality"
    folder.mkdir(parents=True)
    (folder / "base-0123.logits").write_bytes(b"of a run that was killed")
    samples = quality.measure(setup, base, quants, quality.report_wants(8))
    small, large = (samples[quant].figure("kld") for quant in ("Q2_K", "Q8_0"))
    assert small and large
    assert 0 < large.value < 0.001 < small.value
    assert 0 < large.error < large.value and 0 < small.error < small.value
    same = [samples[quant].figure("same_top") for quant in ("Q2_K", "Q8_0")]
    assert same[0] and same[1] and same[0].value < same[1].value <= 1
    row = quality.quality(setup, samples["Q8_0"], "Q8_0", 1, 8.5)
    assert row.ppl_ratio and abs(row.ppl_ratio.value - 1) < 0.01
    assert row.samples == 127 * samples["Q8_0"].count, "tokens"
    assert not [*folder.glob("*.logits"), *folder.glob("*.txt")], "the large files are removed"

    logs = {path: path.stat().st_mtime_ns for path in setup.home.logs.iterdir()}
    again = quality.measure(setup, base, quants, quality.report_wants(8))
    assert again == samples
    assert logs == {path: path.stat().st_mtime_ns for path in setup.home.logs.iterdir()}

    more = quality.measure(setup, base, quants, quality.report_wants(16))["Q8_0"]
    assert more.count > samples["Q8_0"].count, "a larger sample goes on where that one ended"
    assert more.pieces[: samples["Q8_0"].count] == samples["Q8_0"].pieces


def test_answers_that_the_disk_cannot_hold_are_refused_before_any_quant_is_made(
    setup: Setup,
) -> None:
    """Two chunks at least, with a probability for each word."""
    wants = quality.report_wants(8)
    quality.require_room(setup, Header(tensors=1, size=1, data=1, vocabulary=1000), wants)
    with pytest.raises(PipelineError, match=r"[\d.]+ TB are needed there"):
        quality.require_room(setup, Header(tensors=1, size=1, data=1, vocabulary=1 << 50), wants)


def test_a_text_that_is_too_short_is_refused(
    setup: Setup, trained: Path, quantize: Quantize
) -> None:
    from msgspec.structs import replace

    short = replace(setup, text=lambda: "A few words of prose. " * 10)
    quants = {"Q8_0": measured(quantize(trained, "Q8_0", "q"))}
    with pytest.raises(UsageError, match=r"has (\d+|too few) tokens, and 512 are needed") as error:
        quality.measure(short, measured(trained), quants, quality.report_wants(8))
    assert "the text of the tests" in error.value.message and "text=PATH" in error.value.hint


def test_a_text_that_is_too_short_is_known_where_nothing_was_printed(
    setup: Setup, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine llama-perplexity may end before it has."""
    run = divergence._run
    monkeypatch.setattr(divergence, "_run", lambda *args, **more: run(*args, **more) and "")
    setup.home.run.mkdir(parents=True)
    group = divergence.ChunkGroup(setup.home.run / "base", setup.home.run / "text")
    with pytest.raises(UsageError, match="has too few tokens, and 512 are needed"):
        divergence.write_base(setup.perplexity, trained, group, "A few words.", 8)
    divergence.write_base(setup.perplexity, trained, group, "A few words. " * 400, 8)
    assert group.chunks > 1


def pairs(
    trained: Path, quantize: Quantize, folder: Path, seed: int
) -> Iterator[tuple[Path, Path, bool]]:
    """Unquantized models, each with a quant of it, and whether that is good."""
    own = varied(trained, folder / f"own-{seed}.gguf", seed)
    for quant in ("Q8_0", "Q6_K"):
        yield own, quantize(own, quant, f"good-{seed}-{quant}"), True
    for number in range(2):
        way = SPOILS[(2 * seed + number) % len(SPOILS)]
        bad, quant = own, way
        if way in SPOILS[:3]:
            bad, quant = spoiled(own, folder / f"spoiled-{seed}.gguf", way, seed), "Q8_0"
        yield own, quantize(bad, quant, f"bad-{seed}-{way}"), False


@pytest.mark.parametrize(
    "seeds", [range(1), pytest.param(range(10), marks=pytest.mark.long)], ids=["2+2", "20+20"]
)
def test_good_quants_pass_and_bad_ones_fail(
    setup: Setup, trained: Path, quantize: Quantize, tmp_path: Path, seeds: range
) -> None:
    (tmp_path / "models").mkdir()
    results = []
    for seed in seeds:
        for base, quant, is_good in pairs(trained, quantize, tmp_path / "models", seed):
            results.append((quant.stem, is_good, verdict(setup, base, quant)))
            quant.unlink()
    print(*results, sep="\n")
    wrong = [row for row in results if row[2] is (Verdict.FAILED if row[1] else Verdict.PASSED)]
    assert wrong == []
    decided = [row for row in results if row[2] is not Verdict.UNDECIDED]
    assert len(decided) >= 0.9 * len(results) == 0.9 * 4 * len(seeds)


# The command


def ran(err: str) -> set[str]:
    """The programs that were started, each once: what a busy machine lost of one is run again."""
    return {line for line in err.splitlines() if line.startswith("+ ")}


def test_the_second_run_prints_at_once(doit: Doit, trained: Path) -> None:
    words = ("quality", f"model={trained}", "quants=q8_0,q4_k_m", "chunks=8", "ctx_size=256")
    first = doit(*words, "format=json")
    document = first.json()
    rows = {row["quant"]: row for row in document["quants"]}
    assert list(rows) == ["Q8_0", "Q4_K_M"]
    assert rows["Q8_0"]["kld"]["value"] < rows["Q4_K_M"]["kld"]["value"]
    assert 8 < rows["Q8_0"]["bits_per_weight"] < 9
    assert document["reference"] == trained.name and "llama.cpp" in document["text"]
    assert len(ran(first.err)) == 2 + 3, "two quants are made, three models run"
    again = doit(*words)
    assert not ran(again.err)
    assert "KL divergence" in again.out and "Q4_K_M" in again.out
    assert not (doit.home / "run" / "quality").joinpath("base.logits").exists()
    (command,) = document["commands"]
    assert f"model={trained}" in command.replace("'", "") and "ctx_size=256" in command


@pytest.mark.slow
def test_what_a_killed_run_left_is_gone_with_the_next_one(doit: Doit, trained: Path) -> None:
    words = ("quality", f"model={trained}", "quants=q8_0", "chunks=8", "ctx_size=256")
    folder = doit.home / "run" / "quality"
    with doit.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        (large,) = wait_for(lambda: [*folder.glob("base-*.logits")])
        kill_all(process)
    assert large.exists()
    doit("prepare", f"model={trained}", "quant=q8_0")
    left = [path.name for path in folder.iterdir() if path.suffix != ".lock"]
    assert left == [], "it may be of 2 GiB, and the next run may be of another model"
    again = doit(*words)
    assert len(ran(again.err)) == 2, "the quant is there, and two models run"
    assert not [*folder.glob("base-*.*")]


def test_a_quant_that_lost_too_much_is_not_published(doit: Doit, trained: Path) -> None:
    words = ("prepare", f"model={trained}", "max_kld=0.003", "chunks=8")
    refused = doit(*words, "quant=q2_k", status=1)
    assert "as Q2_K: kld 0." in refused.err and "allowed is at most 0.003 (max_kld)" in refused.err
    assert "such as quant=q3_k_m" in refused.err
    left = [path.name for path in (doit.home / "models").rglob("*q2_k*")]
    assert left == [".model.q2_k.gguf.lock"], "nor what is unfinished"
    doit(*words, "quant=q8_0")
    (made,) = (doit.home / "models").rglob("model.q8_0.gguf")
    assert doit(*words, "quant=q8_0").steps == [], "its verdict is known"
    stricter = doit("prepare", f"model={trained}", "quant=q8_0", "max_kld=1e-6", status=1)
    assert "allowed is at most 1e-06" in stricter.err
    assert made.exists(), "it was published when no limit forbade it"


WRONG = {
    "quants=q9_z": ["quants=q9_z: llama-quantize has no such type"],
    "quants=auto": ["quants=auto: is not a quant"],
    "quants=q8_0,fit": ["quants=fit: is not a quant"],
    "text={short}": ["has 11 bytes, and 1024 tokens are needed at least", "longer text=PATH"],
    "quant=q8_0 quants=q4_0": ["contradict each other"],
    "quants=q8_0,q4_9": ["quants=q4_9", "did you mean Q4_1?"],
    "chunks=1": ["chunks=1", "from 8 to"],
    "ctx_size=2": ["ctx_size=2: a chunk has so few tokens", "3 at least"],
    "text={late}": ["late: line 2: is not UTF-8; save it as UTF-8"],
    "text={blank}": ["blank: is empty"],
    "text=nowhere.txt": ["nowhere.txt is not a file"],
    "max_kld=0.1": ["max_kld=0.1: not a variable of quality"],
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words_are_answered(doit: Doit, trained: Path, tmp_path: Path, words: str) -> None:
    (tmp_path / "short").write_text("Some words.", encoding="utf-8")
    (tmp_path / "blank").write_text(" \n" * 3000, encoding="utf-8")
    (tmp_path / "late").write_bytes(b"Some words. " * 1000 + "\nGrüße".encode("latin-1"))
    texts = {name: tmp_path / name for name in ("short", "blank", "late")}
    given = words.format(**texts).split()
    run = doit("quality", f"model={trained}", *given, status=3)
    for text in WRONG[words]:
        assert text in run.err
    assert not ran(run.err), "before any work"


WRONG_LIMITS = {
    "max_kld=-1": ["max_kld=-1: must be a number above 0"],
    "max_kld=nan": ["max_kld=nan: must be a number"],
    "min_cosine=1.5": ["min_cosine=1.5: must be a number above 0, at most 1"],
    "max_kld=0.1 min_cosine=0.9": ["contradict each other"],
    "max_kld=0.1 quant=f16": ["nothing is quantized"],
    "min_cosine=0.9 quant=q8_0": ["is a language model (llama)", "pass max_kld="],
    "max_kld=0.1 quant=q8_0 text={prose}": ["has 11 bytes, and 1024 tokens are needed at least"],
    "max_kld=0.1 quant=q8_0 text={binary}": ["is not text"],
    "imatrix={prose} quant=q4_0": ["has 11 bytes, and 1024 tokens", "pass a longer imatrix=PATH"],
    "quant=q8_0 text={prose}": ["text=: not used without max_kld="],
}


@pytest.mark.parametrize("words", WRONG_LIMITS)
def test_wrong_limits_are_answered(doit: Doit, trained: Path, tmp_path: Path, words: str) -> None:
    (tmp_path / "binary").write_bytes(bytes(100))
    (tmp_path / "prose").write_text("Some words.", encoding="utf-8")
    texts = {name: tmp_path / name for name in ("binary", "prose")}
    run = doit("prepare", f"model={trained}", *words.format(**texts).split(), status=3)
    for text in WRONG_LIMITS[words]:
        assert text in run.err
    assert not ran(run.err), "before any work"


TOO_FEW = [
    "quality quants=q8_0 text={}",
    "prepare quant=q4_k_m max_kld=0.1 text={}",
    "prepare quant=q4_k_m imatrix={}",
    "prepare quant=4.8bpw imatrix={}",
]


@pytest.mark.parametrize("words", TOO_FEW)
def test_a_text_of_too_few_tokens_is_refused_before_any_work(
    doit: Doit, trained: Path, tmp_path: Path, words: str
) -> None:
    """Its bytes would do; its tokens are counted with the tokenizer in the header of a model whose
    weights need not be here."""
    text = tmp_path / "kürz.txt"
    text.write_text("Some words about nothing, in short. " * 40, encoding="utf-8")
    shutil.copytree(trained.with_name("hf"), tmp_path / "hub" / "org" / "trained")
    task, *given = words.format(text).split()
    with hub.start(tmp_path / "hub") as server:
        doit.env |= {
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        for model in ("org/trained", trained, trained.with_name("hf")):
            refused = doit(task, f"model={model}", *given, status=3)
            variable = given[-1].partition("=")[0]
            complaint = (
                rf"{variable}={text}: has (\d+|too few) tokens, and 1024 are needed at least"
            )
            assert re.search(complaint, refused.err), refused.err
            assert f"pass a longer {variable}=PATH" in refused.err
            assert "llama-quantize" not in refused.err
    left = [path for path in (doit.home / "models").rglob("*") if path.suffix == ".safetensors"]
    assert not left and not [*(doit.home / "models").rglob("*.gguf")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("quality quants=q8_0", "the model has no tokenizer, so its quality cannot be measured"),
        ("prepare quant=q8_0 max_kld=0.1", "the model has no tokenizer"),
        ("prepare quant=q4_0 imatrix={}", "has no tokenizer, so no importance matrix"),
    ],
)
def test_a_model_without_a_tokenizer_reads_no_text(
    doit: Doit, trained: Path, prose: str, tmp_path: Path, words: str, said: str
) -> None:
    parts = {"tokens": None, "scores": None, "token_type": None, "model": "no_vocab"}
    own = {f"tokenizer.ggml.{name}": value for name, value in parts.items()}
    rewrite(trained, model := tmp_path / "mute.f16.gguf", own, lambda name: True)
    (text := tmp_path / "text").write_text(prose[:50_000], "utf-8")
    refused = doit(*words.format(text).split(), f"model={model}", status=3)
    assert said in refused.err and not ran(refused.err), "before any work"


def test_a_model_that_is_quantized_already_cannot_be_measured(doit: Doit) -> None:
    run = doit("quality", "model=demo", status=3)
    assert "is Q4_1" in run.err and "F16, BF16 or F32" in run.err


def test_a_repository_is_measured_against_its_own_unquantized_file(
    doit: Doit, trained: Path, quantize: Quantize, tmp_path: Path
) -> None:
    files = {quant: quantize(trained, quant, quant) for quant in ("Q8_0", "Q2_K")}
    files["F16"] = trained
    for repo, names in {"all-GGUF": files, "few-GGUF": ("Q8_0", "Q2_K")}.items():
        folder = tmp_path / "hub" / "org" / repo
        folder.mkdir(parents=True)
        for name in names:
            shutil.copyfile(files[name], folder / f"trained-{name}.gguf")
    words = ("quants=q8_0,q2_k", "chunks=8", "ctx_size=256", "format=json")
    with hub.start(tmp_path / "hub") as server:
        doit.env |= {
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        first = doit("quality", "model=org/all-GGUF", *words)
        again = doit("quality", "model=org/all-GGUF", *words)
        refused = doit("quality", "model=org/few-GGUF", *words, status=1)
    large, small = (row["kld"]["value"] for row in first.json()["quants"])
    assert large < 0.001 < small
    assert first.json()["reference"] == "trained-F16.gguf"
    assert not ran(again.err) and again.json() == first.json()
    assert "its repository has no unquantized GGUF" in refused.err
    assert "safetensors" in refused.err


# Embedding models and rerankers


def test_embeddings_are_compared_by_their_cosine(
    doit: Doit, short_minilm: Path, tmp_path: Path
) -> None:
    words = ("quality", f"model={short_minilm}", "quants=q8_0,q4_0", "chunks=16", "format=json")
    small, large = (row["cosine"] for row in reversed(doit(*words).json()["quants"]))
    assert 0.98 < small["value"] < large["value"] - 3 * large["error"] < 1
    assert not ran(doit(*words).err)
    words = ("prepare", f"model={short_minilm}")
    wrong = doit(*words, "quant=q8_0", "max_kld=0.1", status=3)
    assert "is an embedding model (bert)" in wrong.err and "min_cosine=" in wrong.err
    refused = doit(*words, "quant=q4_0", "min_cosine=0.9999", status=1)
    assert "as Q4_0: cosine 0.99" in refused.err
    (code := tmp_path / "code.txt").write_text(
        "def f(x):\n\treturn x + 1\n" * 2000, encoding="utf-8"
    )
    for task in (("quality", words[1], "quants=q5_0"), (*words, "quant=q5_0", "min_cosine=0.9")):
        unfit = doit(*task, f"text={code}", status=3)
        assert f"text={code}: has 0 paragraphs of prose, 1 needed at least" in unfit.err
        assert "llama-quantize" not in unfit.err
    doit(*words, "quant=q8_0", "min_cosine=0.999")


def test_rerankers_are_compared_by_the_order_of_their_answers(doit: Doit, tmp_path: Path) -> None:
    """The official converter writes a pooling type for the rerankers of one architecture alone: of
    all others the classifier says what they are."""
    model = tmp_path / "reränker"
    tiny_reranker.make(model)
    words = ("quality", f"model={model}", "quants=q8_0,q4_0", "chunks=8", "format=json")
    large, small = (row["rank"] for row in doit(*words).json()["quants"])
    assert 0 < small["value"] < large["value"] <= 1
    assert large["value"] > 0.9
    wrong = doit("prepare", f"model={model}", "quant=q5_0", "min_cosine=0.9", status=3)
    assert "is a reranker (bert)" in wrong.err
    assert not [*(doit.home / "models").rglob("model.f32.gguf")], "refused before it is converted"
