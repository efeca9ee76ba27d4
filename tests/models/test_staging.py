"""What the converter gets to read, and what is refused before it runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import PipelineError
from pipeline.models import contents, staging

GIB = 1024**3


def config(**values: Any) -> bytes:
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        ({"num_hidden_layers": 2, "vocab_size": 512, "hidden_size": 256}, 2_800_000),
        # Llama 3.1 8B in BF16, and in 4 bits; Qwen3 0.6B; DeepSeek V3 in FP8
        ({"num_hidden_layers": 32, "vocab_size": 128256, "hidden_size": 4096}, 16 * GIB),
        ({"num_hidden_layers": 32, "vocab_size": 128256, "hidden_size": 4096}, 5 * GIB),
        ({"num_hidden_layers": 28, "vocab_size": 151936, "hidden_size": 1024}, 1.5 * GIB),
        ({"n_routed_experts": 256, "vocab_size": 129280, "hidden_size": 7168}, 688 * GIB),
        ({"text_config": {"vocab_size": 262208, "hidden_size": 2560}}, 8 * GIB),
        ({"vocab_size": -1, "num_hidden_layers": None, "n_layer": "9" * 99, "n_head": []}, 1),
        ({"vocab_size": True, "hidden_size": -1}, 1),
        ({"vocab_size": float("inf"), "n_layer": float("nan")}, 1),
        ({"max_position_embeddings": 10**9}, 1),
    ],
)
def test_usual_models_are_plausible(values: dict[str, Any], weights: float) -> None:
    staging.require_plausible(config(**values), int(weights), "config.json")


@pytest.mark.parametrize("name", staging.COUNTS)
@pytest.mark.parametrize("count", [10**9, 1e9, 10**30, 2_000_000_000])
def test_a_count_that_no_weights_can_hold(name: str, count: float) -> None:
    for values in (
        {name: count},
        {"text_config": {name: count}},
        {"a": [{"b": {name: count}}]},
        {"hidden_size": 0, name: count},
        {"hidden_size": -5, name: count},
    ):
        with pytest.raises(PipelineError, match=f"config.json: {name} is {int(count)}, and"):
            staging.require_plausible(config(**values), 10_000_000, "config.json")


def test_wider_vectors_leave_room_for_fewer() -> None:
    fits = {"vocab_size": 1000, "hidden_size": 160}
    staging.require_plausible(config(**fits), 10_000, "config.json")
    for more in ({"vocab_size": 1001}, {"hidden_size": 161}):
        with pytest.raises(PipelineError, match="cannot hold more than"):
            staging.require_plausible(config(**fits | more), 10_000, "config.json")


@pytest.mark.parametrize("depth", [300, 500, 900, 990, 100_000])
@pytest.mark.parametrize("data", [b"[", b"", b"\xff\xff", b"{'a': 1}", b'{"a": 1}}', None])
def test_what_is_no_json_is_an_error(data: bytes | None, depth: int) -> None:
    nested = b'{"a":' * depth + b"1" + b"}" * depth if data is None else data
    try:
        staging.require_plausible(nested, 1, "config.json")
    except PipelineError as error:
        assert str(error).startswith("config.json: cannot be read as JSON: ")
    else:
        assert data is None and depth < 100_000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "möd el"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"w" * 100_000)
    (folder / "config.json").write_bytes(
        config(num_hidden_layers=2, auto_map={"AutoConfig": "a.B"})
    )
    (folder / "1_Pooling" / "config.json").write_bytes(config(trust_remote_code=True, a=1))
    (folder / "vocab.json").write_bytes(config(auto_map=7))
    (folder / "generation_config.json").write_text('{ "eos_token_id":2 }')
    (folder / "merges.txt").write_text("auto_map")
    for name in ("modeling.py", "sitecustomize.py", "pytorch_model.bin", "evil.pth"):
        (folder / name).touch()
    return folder


CHOSEN = (
    *("model.safetensors", "config.json", "1_Pooling/config.json", "vocab.json"),
    *("generation_config.json", "merges.txt"),
)


def test_what_is_laid_out(model: Path, tmp_path: Path) -> None:
    into = tmp_path / "in"
    staging.stage({name: model / name for name in CHOSEN}, into)
    laid = {path.relative_to(into).as_posix() for path in into.rglob("*") if path.is_file()}
    assert laid == {*CHOSEN}
    assert json.loads((into / "config.json").read_bytes()) == {"num_hidden_layers": 2}
    assert json.loads((into / "1_Pooling" / "config.json").read_bytes()) == {"a": 1}
    for name in ("model.safetensors", "vocab.json", "generation_config.json", "merges.txt"):
        assert (into / name).read_bytes() == (model / name).read_bytes()
        assert os.name == "nt" or (into / name).is_symlink(), "weights are not copied"
    assert not (into / "config.json").is_symlink()
    assert b"auto_map" in (model / "config.json").read_bytes(), "the user's own stays as it is"


OLD, NEW = "{{ old }}", "{{ messages }} é"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_template_in_a_file_is_laid_out_as_utf8_and_the_only_one(
    encoding: str, model: Path, tmp_path: Path
) -> None:
    names = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")
    (model / "additional_chat_templates").mkdir()
    for name in names:
        (model / name).write_bytes(NEW.encode(encoding))
    settings = model / "tokenizer_config.json"
    settings.write_bytes(config(chat_template=OLD, eos_token="</s>"))
    files = {name: model / name for name in (*CHOSEN, *names, settings.name)}
    staging.stage(files, tmp_path / "in")
    for name in names:
        assert (tmp_path / "in" / name).read_bytes() == NEW.encode()
    assert json.loads((tmp_path / "in" / settings.name).read_bytes()) == {"eos_token": "</s>"}
    assert json.loads(settings.read_bytes())["chat_template"] == OLD, "the user's own stays"


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_template_in_a_file_replaces_none(text: str, model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text(text)
    (model / "tokenizer_config.json").write_bytes(config(chat_template=OLD))
    names = (*CHOSEN, "chat_template.jinja", "tokenizer_config.json")
    staging.stage({name: model / name for name in names}, tmp_path / "in")
    laid = json.loads((tmp_path / "in" / "tokenizer_config.json").read_bytes())
    assert laid["chat_template"] == OLD


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_file_in_another_encoding_is_named(name: str, model: Path, tmp_path: Path) -> None:
    (model / name).write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(PipelineError, match=rf"{name}: cannot be read as utf-8") as caught:
        staging.stage({each: model / each for each in (*CHOSEN, name)}, tmp_path / "in")
    assert "save it as UTF-8" in caught.value.hint


def test_a_config_that_lies_is_not_laid_out(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_bytes(config(vocab_size=10**10))
    with pytest.raises(PipelineError, match="vocab_size is 10000000000"):
        staging.stage({name: model / name for name in CHOSEN}, tmp_path / "in")


def test_a_file_beside_the_weights_is_small(model: Path, tmp_path: Path) -> None:
    os.truncate(model / "vocab.json", contents.MAX_SIDE_FILE + 1)
    with pytest.raises(PipelineError, match=r"vocab.json: has .*, which is too large"):
        staging.stage({name: model / name for name in CHOSEN}, tmp_path / "in")


def test_where_no_links_can_be_made_files_are_copied(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object) -> None:
        raise OSError

    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(os, "link", refuse)
    staging.stage({"merges.txt": model / "merges.txt"}, tmp_path / "in")
    assert (tmp_path / "in" / "merges.txt").read_text() == "auto_map"


@pytest.mark.parametrize("name", staging.COUNTS)
def test_more_than_any_model_has_is_refused_whatever_the_weights(name: str) -> None:
    most = staging.MOST_WORDS if "vocab" in name else staging.MOST
    staging.require_plausible(config(**{name: most}), 10**12, "config.json")
    with pytest.raises(PipelineError, match=f"{name} is {most + 1}; no model has more"):
        staging.require_plausible(config(**{name: most + 1}), 10**12, "config.json")
