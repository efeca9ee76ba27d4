"""Harnesses for what servers say of themselves, their metrics, and what GitHub says of releases."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from gateway_tools import instance
from hostile_input import cuts, damaged, encoded, harness, mutated, pieces, replace, texts
from hypothesis import strategies

from pipeline.bins.release import assets, releases
from pipeline.bins.release.releases import PublishedRelease
from pipeline.core.errors import PipelineError
from pipeline.serve.gateway import answers, counters, upstream
from pipeline.serve.gateway.counters import GENERATED, PROMPT, History, Tail, merge_metrics
from pipeline.serve.gateway.ollama import models as ollama_models
from pipeline.serve.gateway.servers import ServerList, Target
from pipeline.serve.supervisor.usage import ServerUse

# What a server says of itself

LISTED = {
    "object": "list",
    "data": [{"id": "m", "meta": {"n_ctx": 4096, "n_params": 1}}],
    "models": [{"capabilities": ["completion"]}],
}


@harness(
    strategies.one_of(
        damaged(LISTED).map(json.dumps).map(encoded), mutated(json.dumps(LISTED).encode())
    ),
    spoil=replace(upstream, "details", json.loads),
    cases=[
        json.dumps({"data": [{"meta": meta}], "models": [{"capabilities": []}]}).encode()
        for meta in (
            None,
            [],
            1,
            float("nan"),
            {"n_ctx": "x"},
            {"n_ctx": float("inf")},
            {"\ud800": 1},
        )
    ]
    + [b"[" * 100_000, b"9" * 5000, b'{"data": [{"meta": {"a": ' + b"9" * 5000 + b"}}]}"],
)
def described_model(document: bytes, folder: Path) -> None:
    """A client can be told what there is, and no answer depends on what is strange in it."""
    target = Target(instance=instance("chat"), state="ready", ready_at=1.0)
    found = upstream.details(document)
    listed = answers.models(ServerList((target,), {"chat": (target,)}), {"chat": found})
    strict = json.dumps(listed, allow_nan=False, ensure_ascii=False)
    assert json.loads(strict.encode())["data"][0]["id"] == "chat"
    context = upstream.context_of(found)
    assert context is None or context > 0
    msgspec.json.encode(ollama_models.running("chat", target, found, ServerUse()))
    msgspec.json.encode(ollama_models.shown("chat", target, found))


# Metrics

METRICS = (
    b"# HELP llamacpp:tokens_predicted_total Tokens.\n"
    b"# TYPE llamacpp:tokens_predicted_total counter\n"
    b"llamacpp:tokens_predicted_total 12\n"
    b'latency_bucket{le="0.5",instance="inner"} 3\nlatency_sum 1\n',
    b'# TYPE a histogram\na_bucket{le="+Inf",x="}\\"\\n"} 1 1700000000\n'
    b'a_count 1\nb{} 2\nc{x="y",} NaN\n',
)
metric_texts = pieces(
    *("# HELP ", "# TYPE ", "a", "a_total", "llamacpp:tokens_predicted_total", "{", "}", '="', '"'),
    *(
        " 1",
        " NaN",
        " +Inf",
        " 1e400",
        "\n",
        ",",
        "instance=",
        "\\",
        "le=",
        " counter\n",
        "b{x=",
        " ",
    ),
)
LINE = re.compile(r"([a-zA-Z_:][\w:]*)\{instance=\"x\\\"y\"(.*)\} *\s*\S.*", re.DOTALL)


@harness(
    strategies.one_of(mutated(*METRICS), metric_texts.map(encoded)),
    spoil=replace(counters, "_total", lambda numbers: sum(map(float, numbers)) or None),
    cases=[
        b"llamacpp:tokens_predicted_total NaN\n",
        b"llamacpp:tokens_predicted_total inf\n",
        b"llamacpp:tokens_predicted_total 1e400\n",
        b"a{" + b"{" * 100_000 + b" 1\n",
        b"# HELP " + b"a" * 100_000,
    ],
)
def metrics(text: bytes, folder: Path) -> None:
    """Each sample of a server gets its name as a label, and its counts are numbers."""
    read = text.decode("utf-8", "replace")
    for line in merge_metrics({'x"y': read}):
        if not line.startswith("#"):
            assert LINE.fullmatch(line), line
    history = History()
    for texts_ in ({"x": read}, {"x": "llamacpp:tokens_predicted_total 5\n"}, {"x": read}):
        history.sample({}, texts_)
    json.dumps(list(history.samples), allow_nan=False)


@harness(
    cuts(mutated(b'{"usage": {"prompt_tokens": 12, "completion_tokens": 5}, "predicted_n": 7}')),
    spoil=replace(counters, "GENERATED", re.compile(rb"(\D)")),
    cases=[[b'"prompt_tokens": ' + b"9" * 5000 + b', "completion_tokens": ' + b"9" * 5000]],
)
def tail_of_an_answer(blocks: list[bytes], folder: Path) -> None:
    tail = Tail(whole=True)
    for block in blocks:
        tail.add(block)
    for pattern in (PROMPT, counters.GENERATED, GENERATED):
        number = tail.number(pattern)
        assert number is None or 0 <= number < 2**64
    assert tail.text is not None


# GitHub

RELEASE = {
    "tag_name": "b10605",
    "draft": False,
    "assets": [
        {
            "name": name,
            "size": 9,
            "browser_download_url": f"https://example.com/{name}",
            "digest": "sha256:" + "a" * 64,
            "state": "uploaded",
        }
        for name in (
            "llama-b10605-bin-ubuntu-x64.tar.gz",
            "llama-b10605-bin-win-cuda-12.4-x64.zip",
            "cudart-llama-bin-win-cuda-12.4-x64.zip",
        )
    ],
}


def _decoded(form: Any) -> Callable[[bytes], Any]:
    """As `github.ask` reads an answer."""
    from pipeline.bins.release import github

    def read(data: bytes) -> Any:
        try:
            return github.json.decode(data, type=form)
        except (ValueError, RecursionError) as error:
            raise github.strange(str(error)) from None

    return read


@harness(
    strategies.one_of(
        damaged([RELEASE, RELEASE]).map(json.dumps).map(encoded),
        mutated(json.dumps([RELEASE]).encode()),
    ),
    spoil=replace(assets.Asset, "sha256", property(lambda self: self.digest)),
    cases=[
        json.dumps([{**RELEASE, "assets": [{**RELEASE["assets"][0], key: value}]}]).encode()  # type: ignore[index]
        for key, value in (
            *(("browser_download_url", url) for url in ("http://[", "file:///x", "https://a\0")),
            *(("digest", digest) for digest in ("sha256:x", "md5:", "\ud800", None)),
            *(("name", name) for name in ("../x.zip", "llama-b1-bin-ubuntu-99999.zip", "")),
            *(("size", size) for size in (-1, 10**30, 1.5)),
        )
    ]
    + [b"[" * 100_000, b"[]", b'"\xff"'],
)
def github_releases(data: bytes, folder: Path) -> None:
    try:
        listed = _decoded(list[PublishedRelease])(data)
        for platform, backend in (("linux-x64", "cpu"), ("windows-x64", "cuda")):
            chosen = releases._first(listed, platform, backend, (12, 8))
            for asset in chosen.choice.assets:
                assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)
                assert "/" not in asset.name and asset.url.startswith("https://")
            releases.store(folder / "record.json", chosen)
            assert releases.stored(folder / "record.json") == chosen
    except PipelineError as error:
        str(error).encode("utf-8", "backslashreplace")


@harness(
    strategies.one_of(
        texts, pieces("llama-b1", "-bin-", "ubuntu-", "x64", ".zip", "cuda-", "12.4", "-")
    ),
    spoil=replace(assets, "SYSTEMS", None),
    cases=["llama-b1-bin-win-cuda-99999.99999.99999.99999-x64.zip"],
)
def asset_names(name: str, folder: Path) -> None:
    assets.kind(assets.Asset(name=name, size=1, digest="", url="https://x"))
