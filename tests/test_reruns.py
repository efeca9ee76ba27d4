"""What is made again, and what is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Doit, with_programs

pytestmark = pytest.mark.build


DIRECT = ("f16", "f32", "q8_0", "bf16")  # what the converter itself writes


class Kept:
    """A home and a model of the user's own, which is known by its path: each test has them at the
    same places, as they were kept aside."""

    def __init__(self, built: Path, tiny: Path, top: Path) -> None:
        self.built, self.top = built, top
        self.home, self.model = top / "mein häus", top / "tiny ü"
        shutil.copytree(tiny, self.model)
        shutil.copytree(tiny, top / "kept" / "model")

    def keep(self, name: str) -> None:
        """Keep what is made by now."""
        for part in ("models", "run"):
            shutil.copytree(self.home / part, self.top / "kept" / name / part)

    def restored(self, name: str) -> Doit:
        """doit on a home with what was kept under this name."""
        shutil.rmtree(self.home, ignore_errors=True)
        doit = with_programs(self.built, self.home)
        for part in ("models", "run"):
            kept = self.top / "kept" / name / part
            shutil.copytree(kept, self.home / part, dirs_exist_ok=True)
        return doit

    def restored_model(self) -> Path:
        shutil.rmtree(self.model)
        return Path(shutil.copytree(self.top / "kept" / "model", self.model))


@pytest.fixture(scope="module")
def kept(
    built: Path, tiny: Path, converter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Kept:
    """The tiny model, prepared as q4_k_m."""
    made = Kept(built, tiny, tmp_path_factory.mktemp("kept ü"))
    doit = with_programs(built, made.home)
    assert doit("prepare", f"model={made.model}").steps == ["resolve", "convert", "quantize"]
    made.keep("q4_k_m")
    return made


@pytest.fixture(scope="module")
def direct(kept: Kept) -> dict[str, list[str]]:
    """The same, as all that the converter itself writes too: which steps that took."""
    kept.restored_model()
    doit = kept.restored("q4_k_m")
    steps = {q: doit("prepare", f"model={kept.model}", f"quant={q}").steps for q in DIRECT}
    kept.keep("direct")
    return steps


@pytest.fixture
def own_tiny(kept: Kept) -> Path:
    return kept.restored_model()


@pytest.fixture
def made(kept: Kept, own_tiny: Path) -> Doit:
    """The tiny model, prepared as q4_k_m."""
    return kept.restored("q4_k_m")


@pytest.fixture
def all_made(kept: Kept, direct: dict[str, list[str]], own_tiny: Path) -> Doit:
    """The tiny model, prepared as q4_k_m and as all that the converter itself writes."""
    return kept.restored("direct")


def ggufs(doit: Doit) -> list[str]:
    return sorted(path.name for path in doit.home.rglob("*.gguf"))


def test_the_second_run_makes_nothing(made: Doit, own_tiny: Path) -> None:
    assert ggufs(made) == ["model.q4_k_m.gguf"], "the step on the way is removed"
    assert made("prepare", f"model={own_tiny}").steps == []
    status = made("list", "--status", f"model={own_tiny}").out
    for step in ("source", "build_bins", "resolve", "fetch", "convert", "quantize"):
        assert f"U {step} " in status
    assert "R serve " in status


def test_a_deleted_result_is_made_again_with_what_it_needs(made: Doit, own_tiny: Path) -> None:
    next(made.home.rglob("*.q4_k_m.gguf")).unlink()
    assert made("prepare", f"model={own_tiny}").steps == ["convert", "quantize"]


def test_a_kept_intermediate_is_used_for_another_quant(made: Doit, own_tiny: Path) -> None:
    kept = made("prepare", f"model={own_tiny}", "quant=q5_k_m", "keep_f16=1")
    assert kept.steps == ["convert", "quantize"]
    assert "model.bf16.gguf" in ggufs(made), "bf16 is the model's own precision"
    assert made("prepare", f"model={own_tiny}", "quant=q6_k").steps == ["quantize"]
    next(made.home.rglob("*.q6_k.gguf")).unlink()
    assert made("prepare", f"model={own_tiny}", "quant=q6_k").steps == ["quantize"]
    assert "model.bf16.gguf" in ggufs(made), "what was once kept stays"
    again = made("prepare", f"model={own_tiny}", "quant=q6_k", "force=1")
    assert again.steps == ["convert", "quantize"]
    assert "model.bf16.gguf" in ggufs(made)


def test_what_somebody_asked_for_is_no_intermediate(all_made: Doit, own_tiny: Path) -> None:
    before = ggufs(all_made)
    assert "model.bf16.gguf" in before
    assert all_made("prepare", f"model={own_tiny}", "quant=q2_k").steps == ["quantize"]
    assert ggufs(all_made) == sorted([*before, "model.q2_k.gguf"])


def test_direct_types_write_no_intermediate(
    direct: dict[str, list[str]], all_made: Doit, own_tiny: Path
) -> None:
    assert direct == {quant: ["convert"] for quant in DIRECT}
    assert ggufs(all_made) == sorted(f"model.{quant}.gguf" for quant in ("q4_k_m", *DIRECT))


def test_an_edited_byte_makes_it_all_again(made: Doit, own_tiny: Path) -> None:
    weights = own_tiny / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert made("prepare", f"model={own_tiny}").steps == ["resolve", "convert", "quantize"]


def test_an_edited_config_makes_it_all_again(made: Doit, own_tiny: Path) -> None:
    config = own_tiny / "config.json"
    config.write_text(config.read_text().replace("16384", "8192"))
    assert made("prepare", f"model={own_tiny}").steps == ["resolve", "convert", "quantize"]


def test_a_touched_source_is_hashed_and_nothing_is_made(made: Doit, own_tiny: Path) -> None:
    os.utime(own_tiny / "model.safetensors")
    assert made("prepare", f"model={own_tiny}").steps == ["resolve"]
    assert made("prepare", f"model={own_tiny}").steps == []


def test_models_copied_away_and_back_are_hashed_once(
    all_made: Doit, own_tiny: Path, tmp_path: Path
) -> None:
    models = all_made.home / "models"
    shutil.copytree(models, tmp_path / "away", copy_function=shutil.copyfile)
    shutil.rmtree(models)
    shutil.copytree(tmp_path / "away", models, copy_function=shutil.copyfile)
    before = {p: p.stat().st_mtime_ns for p in models.rglob("*.gguf")}
    for quant in ("q4_k_m", "q8_0"):
        again = all_made("prepare", f"model={own_tiny}", f"quant={quant}")
        assert again.err.count("rehashing to verify") == 1
        assert "+ " not in again.err, "no program was run"
        assert all_made("prepare", f"model={own_tiny}", f"quant={quant}").steps == []
    assert {p: p.stat().st_mtime_ns for p in models.rglob("*.gguf")} == before


def test_a_damaged_copy_is_made_again(made: Doit, own_tiny: Path) -> None:
    result = next(made.home.rglob("*.q4_k_m.gguf"))
    data = bytearray(result.read_bytes())
    data[-1] ^= 1
    result.write_bytes(data)
    wrong = made("verify", f"model={own_tiny}", status=1)
    assert str(result) in wrong.err and "sha256" in wrong.err
    assert made("prepare", f"model={own_tiny}").steps == ["convert", "quantize"]
    assert "as their receipts say" in made("verify", f"model={own_tiny}").err


def test_forget_clean_and_force(made: Doit, own_tiny: Path) -> None:
    model = f"model={own_tiny}"
    assert "forgot quantize" in made("forget", "quantize", model).out
    assert ggufs(made) == ["model.q4_k_m.gguf"], "to forget removes nothing"
    assert made("prepare", model).steps == ["convert", "quantize"]
    made("clean", "convert", model)
    assert made("prepare", model).steps == [], "what was made from it stays up to date"
    made("forget", "resolve", model)
    assert made("prepare", model).steps == ["resolve"]
    assert made("clean", "quantize", model).out == "cleaned quantize\n"
    assert ggufs(made) == []
    assert "no model given" in made("clean", "quantize", status=3).err
    assert "nothing to clean; name a task" in made("clean", model).out
    assert made("prepare", model).steps == ["convert", "quantize"]
    assert made("prepare", model, "force=1").steps == ["convert", "quantize"]
    assert made("prepare", model).steps == []


def test_garbage_receipts_are_reported_and_treated_as_absent(made: Doit, own_tiny: Path) -> None:
    receipts = next((made.home / "models" / "gguf").rglob(".state.json"))
    receipts.write_text('{"schema": 1, "artifacts"')
    again = made("prepare", f"model={own_tiny}")
    assert "treated as absent" in again.err
    assert again.steps == ["convert", "quantize"]
    assert made("prepare", f"model={own_tiny}").steps == []


def test_a_gguf_can_be_quantized_once(all_made: Doit, tmp_path: Path) -> None:
    made = all_made
    own = shutil.copy(next(made.home.rglob("*.f16.gguf")), tmp_path / "mine.gguf")
    assert made("prepare", f"model={own}", "quant=q5_k_m").steps == ["quantize"]
    assert made("prepare", f"model={own}", "quant=q5_k_m").steps == []
    assert made("prepare", f"model={own}", "quant=f16").steps == []
    result = next(made.home.rglob("*.q5_k_m.gguf"))
    refused = made("prepare", f"model={result}", "quant=q2_k", status=3)
    assert "would cost quality" in refused.err


def test_all_parts_of_a_split_gguf_are_its_input(all_made: Doit, tmp_path: Path) -> None:
    made = all_made
    program = next((made.home / "bins").glob("*-cpu")) / "llama-gguf-split"
    whole = next(made.home.rglob("*.bf16.gguf"))
    parts = ["--split", "--split-max-tensors", "8", whole, tmp_path / "tiny"]
    subprocess.run([program, *parts], check=True, capture_output=True)
    first, second, *_ = sorted(tmp_path.glob("tiny-0*.gguf"))
    assert made("prepare", f"model={first}", "quant=q4_0").steps == ["quantize"]
    assert made("prepare", f"model={first}", "quant=q4_0").steps == []
    data = bytearray(second.read_bytes())
    data[-8] ^= 1
    second.write_bytes(data)
    assert made("prepare", f"model={first}", "quant=q4_0").steps == ["quantize"]


def test_force_fetches_what_it_needs_again(embedder: Doit) -> None:
    words = ("model=demo-embed", "quant=q8_0")
    shutil.rmtree(embedder.home / "models" / "source")
    assert embedder("prepare", *words).steps == [], "the GGUF is all there"
    assert embedder("prepare", *words, "force=1").steps == ["fetch", "convert"]


def damage(path: Path) -> None:
    """Change a file so that its stamp says nothing of it."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_force_mends_what_no_stamp_tells(embedder: Doit) -> None:
    words = ("model=demo-embed", "quant=q8_0")
    source = next((embedder.home / "models" / "source").rglob("model.safetensors"))
    whole = source.read_bytes()
    damage(source)
    assert embedder("prepare", *words).steps == []
    assert embedder("prepare", *words, "force=1").steps == ["fetch", "convert"]
    assert source.read_bytes() == whole
    embedder("verify", *words)


def test_force_hashes_a_folder_of_the_users_own_again(made: Doit, own_tiny: Path) -> None:
    damage(own_tiny / "model.safetensors")
    assert made("prepare", f"model={own_tiny}").steps == []
    assert made("prepare", f"model={own_tiny}", "force=1").steps == ["convert", "quantize"]
    assert made("prepare", f"model={own_tiny}").steps == []


def test_frozen_refuses_a_changed_folder_before_any_work(
    made: Doit, own_tiny: Path, tmp_path: Path
) -> None:
    made.env["LLAMA_PIPELINE_CWD"] = str(tmp_path)  # where pipeline.lock is written
    words = [f"model={own_tiny}", "quant=q4_k_m"]
    made("lock", *words)
    assert made("prepare", *words, "frozen=1").steps == []
    for name, data in (("tokenizer_config.json", b"{}"), ("added.txt", b"one more")):
        file = own_tiny / name
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(data)
        for task in ("prepare", "plan"):
            wrong = made(task, *words, "frozen=1", status=3)
            assert wrong.steps in ([], ["plan"]), "nothing of the model was touched"
            assert "frozen=1" in wrong.err and name in wrong.err
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)
    assert made("prepare", *words, "frozen=1").steps == []
    damage(own_tiny / "model.safetensors")
    wrong = made("prepare", *words, "frozen=1", "force=1", status=3)
    assert wrong.steps == [] and "model.safetensors" in wrong.err


def test_a_restored_model_needs_no_converter(made: Doit, own_tiny: Path, tmp_path: Path) -> None:
    os.utime(next(made.home.rglob("*.q4_k_m.gguf")))
    made.env |= {"LLAMA_PIPELINE_CACHE": str(tmp_path / "empty"), "PIP_NO_INDEX": "1"}
    again = made("prepare", f"model={own_tiny}", "offline=1")
    assert again.err.count("rehashing to verify") == 1 and again.steps == []


def test_offline_uses_no_network(doit: Doit, tmp_path: Path) -> None:
    doit.env["LLAMA_PIPELINE_CACHE"] = str(tmp_path / "empty")
    for task in ("fetch", "converter"):
        wrong = doit(task, "model=demo-embed", "offline=1", status=1)
        assert "offline=1" in wrong.err and "+ " not in wrong.err


def test_the_users_own_files_are_never_written_to(
    made: Doit, own_tiny: Path, tmp_path: Path
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in own_tiny.iterdir()}
    made("run", "-a", "prepare", f"model={own_tiny}")
    assert {path.name: path.stat().st_mtime_ns for path in own_tiny.iterdir()} == before


def test_a_leftover_that_is_wanted_now_is_kept(all_made: Doit, own_tiny: Path) -> None:
    """A killed run leaves the step on the way; who asks for it then owns it."""
    made = all_made
    receipts = next((made.home / "models" / "gguf").rglob(".state.json"))
    data = json.loads(receipts.read_text(encoding="utf-8"))
    data["artifacts"]["model.bf16.gguf"]["keep"] = False  # as such a run leaves it
    receipts.write_text(json.dumps(data), encoding="utf-8")
    assert made("prepare", f"model={own_tiny}", "quant=bf16").steps == []
    assert made("prepare", f"model={own_tiny}", "quant=q6_k").steps == ["quantize"]
    assert "model.bf16.gguf" in ggufs(made)


def test_a_restored_intermediate_needs_no_converter(
    all_made: Doit, own_tiny: Path, tmp_path: Path
) -> None:
    made = all_made
    os.utime(next(made.home.rglob("*.bf16.gguf")))
    made.env |= {"LLAMA_PIPELINE_CACHE": str(tmp_path / "empty"), "PIP_NO_INDEX": "1"}
    again = made("prepare", f"model={own_tiny}", "quant=q5_0", "offline=1")
    assert again.err.count("rehashing to verify") == 1 and again.steps == ["quantize"]


def test_an_importance_matrix_from_a_text(made: Doit, own_tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "some text ü.txt"
    text.write_text("A kettle sings, a window rattles, and rain writes on the roof. " * 100)
    words = (f"model={own_tiny}", "quant=iq2_xxs", f"imatrix={text}", "keep_f16=1")
    first = made("prepare", *words)
    assert first.steps == ["convert", "quantize"] and "llama-imatrix" in first.err
    matrices = list(made.home.rglob("imatrix-*.gguf"))
    assert len(matrices) == 1
    for path in made.home.rglob("*.gguf"):
        assert os.fsencode(tmp_path) not in path.read_bytes(), "its paths are nobody's concern"
    assert made("prepare", *words).steps == []
    again = made("prepare", f"model={own_tiny}", "quant=q2_k_s", f"imatrix={text}")
    assert "llama-imatrix" not in again.err, "the matrix serves another quant"
    given = made("prepare", f"model={own_tiny}", "quant=q3_k_s", f"imatrix={matrices[0]}")
    assert given.steps == ["quantize"] and "llama-imatrix" not in given.err
    text.write_text("too short")
    wrong = made("prepare", *words, status=3)
    assert f"imatrix={text}: has 9 bytes" in wrong.err and not wrong.steps
