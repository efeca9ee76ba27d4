"""What llama.cpp's converter would drop or get wrong of an adapter is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny_llama, tiny_lora
from msgspec.structs import replace

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.models import adapter, kinds, staging
from pipeline.models.gguf import Header

MODEL = {name: list(values.shape) for name, values in tiny_llama.weights(0)}
SHAPES = {name: list(values.shape) for name, values in tiny_lora.weights().items()}
NAME = "model.layers.0.self_attn.q_proj"


def refusal(folder: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        adapter.check_folder(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "LOHA"}, 'peft_type = "LOHA": only LORA'),
        ({"use_dora": True}, "use_dora = true: the adapter is a DoRA"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save = ["lm_head"]: the adapter replaces'),
        ({"trainable_token_indices": [1]}, "trainable_token_indices = [1]"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern = "),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = true"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "a model with changed weights alone"),
        ({"r": 0}, "r = 0: must be a number above 0"),
        ({"lora_alpha": None}, "lora_alpha = null: must be a number above 0"),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 8}}, "one scale for all ranks"),
    ],
    ids=str,
)
def test_what_the_converter_cannot_do(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    said = refusal(tiny_lora.make(tmp_path / "style", **config))
    assert says in said and str(tmp_path) in said


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}},
        {"modules_to_save": [], "trainable_token_indices": None, "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_what_it_can_do(tmp_path: Path, config: dict[str, Any]) -> None:
    names, _, _ = adapter.check_folder(tiny_lora.make(tmp_path / "style", **config))
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


def test_tensors_that_are_no_lora(tmp_path: Path) -> None:
    weights = tiny_lora.weights()
    first = next(iter(weights))
    for extra in ("lora_magnitude_vector", "lora_A.default.weight", "bias"):
        bad = f"base_model.model.{NAME}.{extra}"
        said = refusal(tiny_lora.save(tmp_path / extra, {**weights, bad: weights[first]}))
        assert f"holds {bad}, which is not part of a LoRA" in said
    half = {name: values for name, values in weights.items() if name != first}
    assert f"only one of the two tensors for {NAME}.weight" in refusal(
        tiny_lora.save(tmp_path / "half", half)
    )
    other = {**weights, first: tiny_lora.weights(rank=8)[first]}
    assert f"{NAME}.weight: its two tensors have the shapes [8, 256] and [256, 4]" in refusal(
        tiny_lora.save(tmp_path / "other", other)
    )
    assert "holds no tensors" in refusal(tiny_lora.save(tmp_path / "none", {}))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["adapter_config.json", "adapter_model.bin"], "only as adapter_model.bin: loading that"),
        (["adapter_model.safetensors"], "no adapter_config.json"),
        (["adapter_config.json"], "no adapter_model.safetensors"),
        (["config.json", "model.safetensors"], "a model is passed as model="),
        (["README.md"], "holds no LoRA adapter"),
    ],
    ids=str,
)
def test_files_that_are_no_adapter(names: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        adapter.peft_files(names, "org/x")
    assert says in str(caught.value)
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    assert says in refusal(tmp_path)


def test_a_folder_with_a_gguf_names_it(tmp_path: Path) -> None:
    (tmp_path / "style.gguf").touch()
    assert f"lora={tmp_path / 'style.gguf'}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ""),
        ({f"base_model.model.{NAME}.lora_B.weight": [128, 4]}, f"makes {NAME}.weight 128 × 256"),
        (
            {
                f"base_model.model.model.embed_tokens.lora_embedding_{part}": shape
                for part, shape in (("A", [4, 512]), ("B", [256, 4]))
            },
            "",
        ),
    ],
    ids=["fits", "other", "words"],
)
def test_shapes_of_a_model_in_safetensors(change: dict[str, list[int]], says: str) -> None:
    found = adapter.peft_misfit({**SHAPES, **change}, MODEL)
    assert says in found and bool(says) == bool(found)


def test_another_architecture_has_other_names() -> None:
    others = {name.replace("self_attn", "attn").replace("mlp", "ffn"): [1, 1] for name in MODEL}
    assert "model.layers.0.self_attn.q_proj.weight, which the model has not" in adapter.peft_misfit(
        SHAPES, others
    )
    of_encoder = {name.replace("model.", "language_model.model."): s for name, s in MODEL.items()}
    assert adapter.peft_misfit(SHAPES, of_encoder) == "", "the same names behind another prefix"


def test_the_config_of_another_model() -> None:
    header = Header(
        tensors=1,
        size=1,
        data=1,
        values={
            "general.architecture": "llama",
            "llama.embedding_length": 256,
            "llama.block_count": 2,
        },
    )
    config = {"hidden_size": 256, "num_hidden_layers": 2}
    assert adapter.base_misfit(config, header) == ""
    drafting = replace(header, values={**header.values, "llama.nextn_predict_layers": 1})
    assert adapter.base_misfit({**config, "num_hidden_layers": 1}, drafting) == ""
    assert adapter.base_misfit({}, header) == ""
    assert "hidden_size 512, the model has 256" in adapter.base_misfit({"hidden_size": 512}, header)
    nested = {"text_config": {"num_hidden_layers": 3}}
    assert "num_hidden_layers 3, the model has 2" in adapter.base_misfit(nested, header)


def test_the_alpha_of_an_rslora(tmp_path: Path) -> None:
    folder = tiny_lora.make(tmp_path / "style", use_rslora=True, lora_alpha=3, r=16)
    link = tmp_path / "link.json"
    link.symlink_to(folder / adapter.CONFIG)
    adapter.scale_by_root(link)
    assert json.loads(link.read_text())["lora_alpha"] == 3 * 4
    assert json.loads((folder / adapter.CONFIG).read_text())["lora_alpha"] == 3, "stays as it is"


def test_only_a_config_that_names_an_architecture_is_one(tmp_path: Path) -> None:
    folder = tiny_lora.make(tmp_path / "style")
    for text in ("{}", '{"model_type": "llama"}'):
        (folder / "config.json").write_text(text)
        assert adapter.config_of(adapter.folder(folder, Home(tmp_path))) is None
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    found = adapter.config_of(adapter.folder(folder, Home(tmp_path)))
    assert found and [file.name for file in found.files] == ["config.json"]


def test_the_config_of_its_model_is_staged_without_code(tmp_path: Path) -> None:
    config = {"hidden_size": 8, "auto_map": {"AutoConfig": "evil.C"}, "quantization_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").write_bytes(b"words")
    files = {path.name: path for path in tmp_path.iterdir()}
    staging.stage_config(files, tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text()) == {"hidden_size": 8}
    assert (tmp_path / "base" / "tokenizer.model").read_bytes() == b"words"
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 1000000000}')
    with pytest.raises(PipelineError, match="no model has more than"):
        staging.stage_config(files, tmp_path / "again")


def test_a_model_is_no_adapter() -> None:
    model = Header(tensors=1, size=1, data=1, values={"general.architecture": "llama"})
    with pytest.raises(PipelineError, match="is a model, not a LoRA adapter"):
        kinds.require_adapter(model, "x.gguf")
    assert kinds.KINDS["adapter"][1].endswith("lora=PATH")
