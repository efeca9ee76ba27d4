"""LoRA adapters: prepared by the same steps as their model, checked, served with their scales."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Doit, free_port, get, post
from fakes import hub, tiny_llama, tiny_lora
from models.test_adapter import make as make_gguf
from test_servers import Servers
from test_servers import servers as servers

pytestmark = [pytest.mark.build, pytest.mark.slow]

STEP = "convert:lora0"
LITTLE = 0.002  # a scale at which that adapter is about as strong as the model's own weights


def scores(url: str, **more: Any) -> list[float]:
    """The log probability of each token to be the next one."""
    more |= {"n_probs": tiny_llama.VOCAB, "n_predict": 1, "temperature": 0}
    (first,) = post(f"{url}/completion", {"prompt": "hello there", **more})[
        "completion_probabilities"
    ]
    known = {token["id"]: token["logprob"] for token in first["top_logprobs"]}
    return [known[number] for number in range(tiny_llama.VOCAB)]


def distance(one: list[float], other: list[float]) -> float:
    """The largest difference of a token."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def folder_of(top: Path, weights: dict[str, tiny_llama.F32]) -> Path:
    """A tiny Llama with these weights."""
    tiny_llama.make(top, dtype="f32")
    content = {name: tiny_llama.stored(values, "f32") for name, values in weights.items()}
    tiny_llama.write_safetensors(top / "model.safetensors", content, "f32")
    return top


def steps(plan: Any) -> dict[str, str]:
    return {step["name"]: step["state"] for step in plan["steps"]}


def test_a_folder_of_peft_is_converted_and_does_what_merging_does(
    doit: Doit, converter: Path, tmp_path: Path
) -> None:
    weights = dict(tiny_llama.weights(0))
    base = folder_of(tmp_path / "base", weights)
    style = tiny_lora.make(tmp_path / "style ü", base_model_name_or_path="base")
    merged = folder_of(tmp_path / "merged", tiny_lora.merged(weights, tiny_lora.weights(), 0.5))
    asked = (f"model={base}", "quant=f32", "ctx_size=512")

    alone = doit("plan", *asked, "format=json").json()
    plan = doit("plan", *asked, f"lora={style}:0.5", "format=json").json()
    assert (alone["adapters"], steps(plan)[STEP]) == ([], "to do")
    (adapter,) = plan["adapters"]
    assert (adapter["name"], adapter["scale"]) == ("style-ü", 0.5)
    more = plan["memory"]["weights_bytes"] - alone["memory"]["weights_bytes"]
    assert more == adapter["file_bytes"] > 50_000
    assert plan["warnings"] == alone["warnings"], "it is the model that the adapter names"

    with doit.serving(*asked, f"lora={style}:0.5") as url:
        half, off = scores(url), scores(url, lora=[{"id": 0, "scale": 0}])
        whole = scores(url, lora=[{"id": 0, "scale": 1}])
        assert get(f"{url}/lora-adapters")[0]["scale"] == 0.5
        used = doit("remove", f"model={style}", "yes=1", status=1).err
        assert "is used by serve" in used and "nothing was removed" in used
    assert doit.summary["adapters"].startswith("style-ü-")
    assert doit.summary["adapters"].endswith(".f32.gguf (scale 0.5)")
    with doit.serving(f"model={merged}", "quant=f32", "ctx_size=512") as url:
        expected = scores(url)
    with doit.serving(*asked) as url:
        unchanged = scores(url)
    # rsLoRA is scaled by alpha / √rank, and `merged` by alpha / rank.
    root = tiny_lora.make(tmp_path / "root", use_rslora=True, base_model_name_or_path="base")
    with doit.serving(*asked, f"lora={root}:{0.5 / math.sqrt(tiny_lora.RANK)}") as url:
        assert distance(scores(url), expected) < 1e-3
    assert distance(half, expected) < 1e-3
    assert distance(off, unchanged) < 1e-3
    assert distance(half, off) > 0.1 and distance(half, whole) > 0.1

    words = (*asked[:2], f"lora={style}:0.25")  # another scale makes nothing again
    assert doit("prepare", *words).steps == []
    assert steps(doit("plan", *words, "format=json").json())[STEP] == "up to date"
    rows = doit("models", "format=json").json()["models"]
    (made,) = [row for row in rows if "style" in row["name"]]
    assert made["kind"] == "adapter" and made["reference"] == str(style)
    doit("verify")
    doit("forget", STEP, *words)
    assert doit("prepare", *words).steps == [STEP]
    doit("clean", STEP, *words)
    assert not Path(made["files"][0]).exists()
    doit("prepare", *words)
    tiny_lora.make(style, seed=1, base_model_name_or_path="base")  # trained on
    assert doit("prepare", *words).steps == ["resolve:lora0", STEP]
    assert doit("prune", "yes=1", "format=json").json()["items"] == []
    doit.env["AUTO_INFER_LLAMA_CPP_CONFIG"] = str(tmp_path / "möre.toml")
    (tmp_path / "möre.toml").write_text(
        f"[instance.chat.model]\nref = '{base}'\nquant = 'f32'\nlora = '{style}:2'\n"
    )
    assert "möre.toml: chat" in doit("remove", f"model={style}", "yes=1", status=1).err
    del doit.env["AUTO_INFER_LLAMA_CPP_CONFIG"]
    doit("remove", f"model={style}", "yes=1")
    assert not Path(made["files"][0]).exists()


@pytest.mark.parametrize("way", ["own", "hub"])
def test_a_gguf_takes_the_config_of_the_model_that_the_adapter_was_trained_for(
    doit: Doit, gguf: Path, tiny: Path, converter: Path, tmp_path: Path, way: str
) -> None:
    style = tiny_lora.make(tmp_path / "hub" / "org" / "style-lora", dtype="bf16")
    base = Path(shutil.copytree(tiny, tmp_path / "hub" / "org" / "tiny-llama"))
    words = [f"model={gguf}", "lora=org/style-lora:0"]
    if way == "own":
        shutil.copy(base / "config.json", style)
        shutil.rmtree(base)
    with hub.start(tmp_path / "hub") as server:
        connect(doit, server, tmp_path)
        plan = doit("plan", *words, "format=json").json()
        assert steps(plan)["fetch:lora0"] == steps(plan)[STEP] == "to do"
        assert any("was trained for org/tiny-llama, by its" in line for line in plan["warnings"])
        doit("prepare", *words)
        doit("lock", *words)
    got = sorted(path.name for path in (doit.home / "models/source").rglob("*.*") if path.is_file())
    assert "adapter_model.safetensors" in got and "config.json" in got
    assert not any(name.startswith("model.") for name in got), "config files alone"
    text = (tmp_path / "user" / "pipeline.lock").read_text()
    assert 'lora = "org/style-lora"' in text and "model.base" in text

    assert doit("prepare", *words, "offline=1", "frozen=1").steps == []
    (made,) = (doit.home / "models/gguf").rglob("style-lora-*.gguf")
    made.unlink()
    doit("prepare", *words, "offline=1", "frozen=1")
    assert made.is_file(), "made again, from what is pinned"
    with doit.serving(*words, "ctx_size=512") as url:
        assert distance(scores(url), scores(url, lora=[{"id": 0, "scale": 1}])) > 0.1


def connect(doit: Doit, server: hub.Running, tmp_path: Path) -> None:
    (tmp_path / "user").mkdir()
    doit.env |= {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "LLAMA_PIPELINE_CWD": str(tmp_path / "user"),
    }


def test_repositories(doit: Doit, gguf: Path, tiny: Path, tmp_path: Path) -> None:
    """One with both is used as GGUF, and what is not an adapter is refused before any download."""
    top = tmp_path / "hub" / "org"
    both = tiny_lora.make(top / "both")
    make_gguf(both / "style-f32.gguf")
    shutil.copy(gguf, tiny_lora.make(top / "merged") / "merged-Q8_0.gguf")
    shutil.copytree(tiny, top / "model")
    (top / "model-GGUF").mkdir()
    shutil.copy(gguf, top / "model-GGUF" / "model-Q8_0.gguf")
    make_gguf(top / "model-GGUF" / "zz.gguf", "qwen2")
    (top / "pickled").mkdir()
    (top / "pickled" / "adapter_model.bin").write_bytes(b"PK")
    (top / "pickled" / "adapter_config.json").write_text(json.dumps(tiny_lora.CONFIG))
    tiny_lora.make(top / "alone", base_model_name_or_path="/home/of/trainer")
    with hub.start(tmp_path / "hub") as server:
        connect(doit, server, tmp_path)
        plan = doit("plan", f"model={gguf}", "lora=org/both,org/both:2", "format=json").json()
        assert {Path(each["file"]).name for each in plan["adapters"]} == {"style-f32.gguf"}
        assert [each["scale"] for each in plan["adapters"]] == [1.0, 2.0]
        assert "fetch:lora1" in steps(plan) and STEP not in steps(plan)
        for name, says in (
            ("org/model", "a model is passed as model="),
            ("org/model-GGUF:Q8_0", "is a model, not a LoRA adapter"),
            ("org/pickled", "only as adapter_model.bin"),
            ("org/alone", "needs the config.json of the model that it was trained for (/home/of"),
            ("org/merged", "org/tiny-llama"),  # the base is not on this hub
            ("https://huggingface.co/org/model-GGUF/blob/main/zz.gguf", "an adapter for qwen2"),
        ):
            wrong = doit("prepare", f"model={gguf}", f"lora={name}", status=None)
            assert wrong.status in (1, 3) and says in wrong.err, (name, wrong.err)
            assert "Traceback" not in wrong.err
        assert "this as lora=" in doit("prepare", "model=org/both", status=None).err
    assert not [*(doit.home / "models").rglob("*.safetensors")]
    assert not [*(doit.home / "models").rglob("*.gguf")]


def test_one_that_does_not_fit_is_refused_before_any_work(
    doit: Doit, tiny: Path, gguf: Path, tmp_path: Path
) -> None:
    weights = tiny_lora.weights()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    wide = {**weights, name: np.zeros((768, tiny_lora.RANK), dtype=np.float32)}
    other = tiny_lora.save(tmp_path / "wide", wide)
    names = {key.replace("mlp", "ffn").replace("self_attn", "attn"): v for key, v in wide.items()}
    foreign = tiny_lora.save(tmp_path / "foreign", names)
    deep = tiny_lora.make(tmp_path / "deep")
    config = tiny_llama.configs("f32")["config.json"] | {"num_hidden_layers": 3}
    (deep / "config.json").write_text(json.dumps(config))
    for model, lora, says in (
        (tiny, other, "makes model.layers.0.mlp.up_proj.weight 768 × 256, the model's has 512"),
        (tiny, foreign, "model.layers.0.attn.q_proj.weight, which the model has not"),
        (gguf, deep, "num_hidden_layers 3, the model has 2"),
        (gguf, make_gguf(tmp_path / "qwen.gguf", "qwen2"), "an adapter for qwen2"),
    ):
        for task in ("plan", "prepare"):
            wrong = doit(task, f"model={model}", f"lora={lora}", status=None)
            assert wrong.status in (1, 3) and says in wrong.err, wrong.err
            assert "convert_" not in wrong.err, "nothing was converted"


def test_a_converted_one_that_does_not_fit_is_not_published(
    doit: Doit, gguf: Path, converter: Path, tmp_path: Path
) -> None:
    weights = tiny_lora.weights()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    weights[name] = np.zeros((768, tiny_lora.RANK), dtype=np.float32)
    style = tiny_lora.save(tmp_path / "style", weights)
    (style / "config.json").write_text(json.dumps(tiny_llama.configs("f32")["config.json"]))
    wrong = doit("prepare", f"model={gguf}", f"lora={style}", status=1)
    assert (
        f"lora={style}: makes blk.0.ffn_up.weight 256 × 768, the model's has 256 × 512" in wrong.err
    )
    assert not [*(doit.home / "models").rglob("style-*.gguf")]


@pytest.fixture
def gateway(servers: Servers, gguf: Path, tmp_path: Path) -> Iterator[str]:
    """The tiny model with two adapters behind a gateway: the first is off."""
    for name in ("style", "facts"):
        make_gguf(tmp_path / f"{name}.gguf")
    servers.chat("chat", gguf)
    port = free_port()
    lora = ["style.gguf:0", f"./facts.gguf:{LITTLE}"]  # relative to the file
    servers.write(
        {
            "instance.chat.model": {"ref": str(gguf), "lora": lora},
            "gateway": {"enable": True, "port": port},
        }
    )
    servers.up()
    yield f"http://127.0.0.1:{port}"


def test_a_request_sets_the_scales_through_the_gateway(gateway: str) -> None:
    def answer(*scales: float) -> list[float]:
        lora = [{"id": number, "scale": scale} for number, scale in enumerate(scales)]
        return scores(gateway, model="chat", **({"lora": lora} if scales else {}))

    facts, off, both = answer(), answer(0, 0), answer(LITTLE, LITTLE)
    assert min(distance(facts, off), distance(facts, both), distance(off, both)) > 0.01
    assert distance(answer(0, LITTLE), facts) < 1e-3, "without scales those of the file hold"
    listed = get(f"{gateway}/upstream/chat/lora-adapters")
    assert [(Path(each["path"]).name, each["scale"]) for each in listed] == [
        ("style.gguf", 0),
        ("facts.gguf", pytest.approx(LITTLE)),
    ]
