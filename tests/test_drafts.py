"""Models that draft for others: prepared by the same steps, checked, used, and told of."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Doit, get, post
from test_servers import Servers
from test_servers import servers as servers

from pipeline.models import gguf as gguf_headers
from pipeline.models.vocabulary import Vocabulary, difference, of_gguf, of_tokenizer

TOKEN = 400  # which differs

pytestmark = [pytest.mark.build, pytest.mark.slow]


def words(*texts: str, size: int = 0, **values: object) -> Vocabulary:
    return Vocabulary(
        texts={number: text.encode() for number, text in enumerate(texts)},
        size=size,
        values={f"tokenizer.ggml.{name}": value for name, value in values.items()},
    )


@pytest.mark.parametrize(
    ("model", "draft", "why"),
    [
        (words(*"abcdefg"), words(*"abcdefg"), ""),
        (words(*"abcdefg"), words(*"vwxyzfgh"), ""),  # the first five may differ
        (words(*"abcdefg"), words(*"abcdeXg"), "its token 5 is 'X', the model's 'f'"),
        (words(size=1000), words(size=1128), ""),
        (words(size=1000), words(size=1129), "it has 1129 tokens, the model 1000"),
        (words(model="llama"), words(model="gpt2"), "its tokenizer has model gpt2, the model's"),
        (words(bos_token_id=1), words(bos_token_id=2), ""),  # neither is added
        (
            words(bos_token_id=1, add_bos_token=True),
            words(bos_token_id=2, add_bos_token=True),
            "bos_token_id 2, the model's 1",
        ),
        (words(add_eos_token=False), words(add_eos_token=True), "add_eos_token True"),
        (words(add_eos_token=False), words(), ""),  # llama.cpp decides
    ],
)
def test_the_rule_of_llama_cpp(model: Vocabulary, draft: Vocabulary, why: str) -> None:
    found = difference(model, draft)
    assert why in found and bool(why) == bool(found)


@pytest.mark.parametrize(
    "text",
    ['{"model": {"vocab": {"a": 0, "b": 1}}}', '{"model": {"vocab": [["a", 0], ["b", -1]]}}'],
)
def test_a_tokenizer_file(text: str) -> None:
    assert of_tokenizer(text.encode()) == Vocabulary(texts={0: b"a", 1: b"b"})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"vocab": [1]}}', "[" * 100_000])
def test_a_tokenizer_file_that_is_none(text: str) -> None:
    assert of_tokenizer(text.encode()) is None


@pytest.fixture
def other_words(gguf: Path, tmp_path: Path) -> Path:
    """The tiny model with one other token."""
    made = tmp_path / "öther words.gguf"
    header = gguf_headers.read(gguf)
    texts = list(gguf_headers.tokens(gguf, header))
    data = bytearray(gguf.read_bytes())
    at = header.tokens_at + sum(8 + len(text) for text in texts[: TOKEN + 1])
    data[at - 1 : at] = b"$"  # the last letter of its text
    made.write_bytes(data)
    return made


def test_the_vocabulary_of_a_gguf(gguf: Path, other_words: Path) -> None:
    model = of_gguf(gguf)
    assert model.size == len(model.texts) == 512
    assert (model.texts[1], model.texts[3]) == (b"<s>", b"<|im_start|>")
    assert f"its token {TOKEN} is " in difference(model, of_gguf(other_words))


def test_a_draft_is_made_and_used(doit: Doit, gguf: Path, own_tiny: Path, converter: Path) -> None:
    asked = (f"model={gguf}", f"draft={own_tiny}", "ctx_size=512")
    plan = doit("plan", *asked, "format=json").json()
    todo = [step["name"] for step in plan["steps"] if step["state"] == "to do"]
    assert todo == ["convert:draft", "quantize:draft"]
    assert plan["draft"]["model"] == "tiny-ü"
    alone = doit("plan", asked[0], asked[2], "format=json").json()
    assert plan["memory"]["total_bytes"] > alone["memory"]["total_bytes"]
    with doit.serving(*asked) as url:
        answer = post(f"{url}/completion", {"prompt": "hello", "n_predict": 16, "temperature": 0})
        assert answer["timings"]["draft_n_accepted"] > 0, "it is loaded, and used"
    assert doit.summary["draft"] == "model.q4_k_m.gguf (draft-simple)"
    assert doit("prepare", *asked[:2]).steps == []


def test_a_draft_with_another_vocabulary_is_refused(
    doit: Doit, gguf: Path, other_words: Path
) -> None:
    for task in ("plan", "serve"):
        refused = doit(task, f"model={gguf}", f"draft={other_words}", status=None)
        assert refused.status in (1, 3)
        assert "cannot draft for this model: its token" in refused.err
        assert "llama-server --model" not in refused.err
    own = (f"server.spec_draft_model={other_words}", "server.spec_type=draft-simple")
    refused = doit("serve", f"model={gguf}", *own, status=3)
    assert "cannot draft for this model" in refused.err


def test_it_is_refused_before_anything_is_downloaded(
    doit: Doit, gguf: Path, other_words: Path, tmp_path: Path
) -> None:
    from fakes import hub

    for name, file in (("large", gguf), ("small", other_words)):
        repository = tmp_path / "hub" / "org" / name
        repository.mkdir(parents=True)
        shutil.copy(file, repository / f"{name}-Q8_0.gguf")
    with hub.start(tmp_path / "hub") as server:
        doit.env |= {"HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1"}
        doit.env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        refused = doit("prepare", "model=org/large", "draft=org/small:Q8_0", status=3)
        assert "draft=org/small:Q8_0: cannot draft for this model: its token" in refused.err
        assert not [*(doit.home / "models" / "gguf").rglob("*.gguf")]
        doit("prepare", "model=org/large", "draft=org/large:Q8_0")


def test_ngrams_need_no_model(doit: Doit, gguf: Path) -> None:
    with doit.serving(f"model={gguf}", "draft=ngram", "ctx_size=512") as url:
        assert get(f"{url}/slots")[0]["speculative"] is True
    assert doit.summary["draft"] == "ngram-mod, without a model"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["draft=mtp"], "draft=mtp: the model has no head for multi-token prediction"),
        (["server.spec_type=draft-mtp"], "the model has no head for multi-token prediction"),
        (
            ["draft=ngram", "server.spec_type=ngram-cache"],
            "server.spec_type=ngram-cache: contradicts draft=ngram-mod; leave one out",
        ),
        (["draft=$", "server.spec_type=none"], "server.spec_type=none: contradicts draft="),
    ],
)
def test_what_cannot_draft_is_said_before_a_start(
    doit: Doit, gguf: Path, words: list[str], says: str
) -> None:
    words = [word.replace("$", str(gguf)) for word in words]
    for task in ("plan", "serve"):
        wrong = doit(task, f"model={gguf}", *words, status=3)
        assert says in wrong.err and "llama-server --model" not in wrong.err


@pytest.mark.parametrize("task", ["plan", "up"])
@pytest.mark.parametrize("line", ["draft = 'mtp'", "mmproj = '$'", "lora = ['$']"])
def test_which_of_many_models_is_meant(
    doit: Doit, gguf: Path, tmp_path: Path, task: str, line: str
) -> None:
    tables = (f"[instance.{x}.model]\nref = '{gguf}'\n" for x in ("first", "second"))
    file = tmp_path / "two.toml"
    text = "".join(tables) + line.replace("$", str(gguf)) + "\n[instance.first.server]\nport = 9\n"
    file.write_text(text, encoding="utf-8")
    wrong = doit(task, f"config={file}", status=None)
    assert wrong.status in (1, 3) and wrong.err.count("two.toml: instance.second.model: ") == 1


def test_plan_warns_as_serve_does(doit: Doit, gguf: Path) -> None:
    """Of a draft that is not used, a number with a unit, and an address without a key."""
    words = (f"server.spec_draft_model={gguf}", "server.ubatch_size=1k", "host=0.0.0.0")
    warnings = doit("plan", f"model={gguf}", *words, "format=json").json()["warnings"]
    for says in ("does not use it without spec_type", "taken as 1024", "no api_key_file is given"):
        assert any(says in warning for warning in warnings)


def test_mistakes(doit: Doit, gguf: Path) -> None:
    wrong = doit("plan", f"model={gguf}", "draft=nowhere.gguf", status=3)
    assert "draft=nowhere.gguf" in wrong.err and "ngram" in wrong.err
    twice = doit(
        "serve", f"model={gguf}", "draft=ngram", f"server.spec_draft_model={gguf}", status=3
    )
    assert "contradicts draft=" in twice.err
    assert "pass model=" in doit("plan", "draft=ngram", status=3).err


def test_a_draft_in_a_file(servers: Servers, gguf: Path) -> None:
    port = servers.chat("chat", gguf)
    (servers.file.parent / gguf.name).symlink_to(gguf)  # relative to the file
    servers.write({"instance.chat.model": {"ref": str(gguf), "draft": gguf.name}})
    servers.up()
    assert servers.ps()["chat"]["drafts_accepted"] is None
    url = f"http://127.0.0.1:{port}"
    post(f"{url}/completion", {"prompt": "hello", "n_predict": 16, "temperature": 0})
    assert servers.ps()["chat"]["drafts_accepted"] == 1.0
    assert "drafts accepted" in servers.doit("ps").out
