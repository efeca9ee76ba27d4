"""From a reference to answers, with real models, programs and HTTP."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY, Doit, get, post, wait_for

pytestmark = pytest.mark.build

SENTENCES = [
    "A cat sits on the warm windowsill.",
    "The kitten rests near the window in the sun.",
    "Quarterly revenue rose by eleven percent.",
    "Der Zug nach Köln fährt um acht Uhr ab.",
]


def cosine(one: list[float], other: list[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


@pytest.fixture(scope="module")
def reference(demo: Doit, converter: Path) -> list[list[float]]:
    """What PyTorch computes for SENTENCES, in the converter's environment."""
    folder = next((demo.home / "models" / "source").glob("demo__*"))
    done = subprocess.run(
        [converter, REPOSITORY / "tests" / "reference.py", folder],
        input=json.dumps(SENTENCES),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(("quant", "least"), [("f16", 0.9999), ("q8_0", 0.999), ("q4_k_m", 0.985)])
def test_the_demo_embeds_as_pytorch_does(
    embedder: Doit, reference: list[list[float]], quant: str, least: float
) -> None:
    with embedder.serving("model=demo-embed", f"quant={quant}") as url:
        answer = post(f"{url}/v1/embeddings", {"input": SENTENCES})
    found = [item["embedding"] for item in answer["data"]]
    assert len(found) == len(SENTENCES)
    for ours, theirs in zip(found, reference, strict=True):
        assert cosine(ours, theirs) >= least


FRUITS = ("Apple", "Banana", "Orange", "Grape", "Strawberr", "Mango", "Pear", "Peach", "Lemon")


def test_the_demo_talks(doit: Doit) -> None:
    with doit.serving("model=demo", "ctx_size=2048") as url:
        assert get(f"{url}/v1/models")["data"][0]["id"] == "SmolLM2-135M-Instruct"
        question = {"role": "user", "content": "Give me three names of fruits."}
        body = {"messages": [question], "temperature": 0, "max_tokens": 40}
        answer = post(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]
        # which ones depends on the processor's rounding
        assert sum(fruit in answer for fruit in FRUITS) >= 2, answer
    again = doit("prepare", "model=demo")
    assert again.steps == []
    assert "as their receipts say" in doit("verify", "model=demo").err
    wrong = doit("plan", "model=demo", "quant=q8_0", status=3)
    assert "is Q4_1: quantizing it again (quant=q8_0) would cost quality" in wrong.err


def test_a_chat_model_answers_whole_and_streaming(ready: Doit, tiny: Path) -> None:
    import openai

    with ready.serving(f"model={tiny}", "ctx_size=2048", "alias=tiny") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        messages = [{"role": "user", "content": "hello there"}]
        whole = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=16, temperature=0
        )
        assert whole.model == "tiny"
        assert whole.usage.completion_tokens == 16
        assert whole.choices[0].message.content
        pieces = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=16, temperature=0, stream=True
        )
        deltas = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
        assert len(deltas) > 2
        assert "".join(deltas) == whole.choices[0].message.content
        client.close()


def test_a_gguf_is_used_in_place_whole_and_split(doit: Doit, gguf: Path, tmp_path: Path) -> None:
    whole = shutil.copy2(gguf, tmp_path)
    split = next((doit.home / "bins").glob("*-cpu")) / "llama-gguf-split"
    parts = tmp_path / "pärts"
    parts.mkdir()
    command = [split, "--split", "--split-max-tensors", "8", whole, parts / "tiny"]
    subprocess.run(command, check=True, capture_output=True)
    first = sorted(parts.iterdir())[0]
    assert first.name.startswith("tiny-00001-of-0000")

    before = sorted(doit.home.rglob("*.gguf"))
    answers = []
    for path in (whole, first):
        with doit.serving(f"model={path}", "ctx_size=512") as url:
            body = {"prompt": "hello", "n_predict": 12, "temperature": 0}
            answers.append(post(f"{url}/completion", body)["content"])
    assert answers[0] and answers[0] == answers[1]
    assert sorted(doit.home.rglob("*.gguf")) == before, "a file used in place was copied"

    second = sorted(parts.iterdir())[1]
    wrong = doit("serve", f"model={second}", status=3)
    assert str(first) in wrong.err and "part 2" in wrong.err


def test_a_gguf_repository_through_the_hub(doit: Doit, gguf: Path, tmp_path: Path) -> None:
    from fakes import hub

    repository = tmp_path / "hub" / "org" / "tiny-GGUF"
    repository.mkdir(parents=True)
    shutil.copy(gguf, repository / "tiny-Q8_0.gguf")
    shutil.copy(gguf, repository / "tiny-Q4_K_M.gguf")
    with hub.start(tmp_path / "hub") as server:
        doit.env |= {"HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1"}
        doit.env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        with doit.serving("model=org/tiny-GGUF", "filename=tiny-Q8_0.gguf") as url:
            models = get(f"{url}/v1/models")
            assert models["data"][0]["id"] == "tiny"
        server.control(clear_log=True)
        again = doit("prepare", "model=org/tiny-GGUF", "filename=tiny-Q8_0.gguf")
        assert again.steps == []
        assert server.log() == [], "an up-to-date model needs no network"
        unknown = doit("prepare", "model=org/tiny-GGUF:Q6_K", status=3)
        assert "tiny-Q4_K_M.gguf" in unknown.err and "tiny-Q8_0.gguf" in unknown.err


def test_the_summary_and_the_log(ready: Doit, tiny: Path) -> None:
    with ready.serving(f"model={tiny}", "server.flash_attn=on") as url:
        file = ready.home / "logs" / f"serve-{url.rpartition(':')[2]}.log"
        wait_for(lambda: "model loaded" in file.read_text())  # it answers before we have read it
        log = file.read_text()
        properties = get(f"{url}/props")
        assert properties["default_generation_settings"]["n_ctx"] == 16384, "the trained context"
        threads = re.search(r"n_threads = (\d+)", log)
        assert threads
        told = ready.summary
        assert told["threads"] == int(threads[1]) and told["quant"] == "Q4_K_M"
        assert told["context"] == "16384 tokens, as trained" and told["log"].startswith(
            str(ready.home)
        )
    planned = ready("plan", f"model={tiny}", "format=json").json()
    assert {step["state"] for step in planned["steps"]} == {"up to date"}
    assert planned["download_bytes"] == 0
    assert planned["memory"]["fits"] is True
    assert "--model" in planned["cmd"]


def test_inherited_settings_do_not_change_a_launch(ready: Doit, tiny: Path) -> None:
    ready.env |= {"LLAMA_ARG_CTX_SIZE": "64", "LLAMA_ARG_ALIAS": "stranger"}
    with ready.serving(f"model={tiny}", "ctx_size=1024") as url:
        assert get(f"{url}/v1/models")["data"][0]["id"] == "tiny-llama-é"
        assert get(f"{url}/props")["default_generation_settings"]["n_ctx"] == 1024


def test_a_safetensors_repository_through_the_hub(
    doit: Doit, tiny: Path, converter: Path, tmp_path: Path
) -> None:
    from fakes import hub

    repository = Path(shutil.copytree(tiny, tmp_path / "hub" / "org" / "tiny"))
    (repository / "modeling_tiny.py").write_text("raise SystemExit('this must not be run')")
    (repository / "pytorch_model.bin").write_bytes(b"pickle")
    with hub.start(tmp_path / "hub") as server:
        doit.env |= {"HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1"}
        doit.env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        first = doit("prepare", "model=org/tiny")
        assert first.steps == ["resolve", "fetch", "convert", "quantize"]
        asked = {line["path"].rpartition("/")[2] for line in server.log()}
        assert "model.safetensors" in asked
        assert not asked & {"modeling_tiny.py", "pytorch_model.bin"}
    # and now without the hub
    with doit.serving("model=org/tiny", "ctx_size=512", "offline=1") as url:
        answer = post(f"{url}/completion", {"prompt": "hello", "n_predict": 8, "temperature": 0})
        assert answer["tokens_predicted"] == 8
    assert "as their receipts say" in doit("verify", "model=org/tiny").err
