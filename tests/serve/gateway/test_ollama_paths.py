"""Ollama's API at the gateway as a process, before stand-ins: the rules of its other paths hold."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import wait_for
from gateway_tools import Site, site, stop

HELLO = [{"role": "user", "content": "hello"}]
PIECE = json.dumps({"choices": [{"delta": {"content": "ab"}, "finish_reason": None}]})
KEY = "of-the-gateway"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as one:
        yield one


def chat(here: Site, model: str = "chat", **more: Any) -> httpx2.Response:
    return here.post("/api/chat", {"model": model, "messages": HELLO, **more})


def asked(here: Site, name: str = "chat") -> list[Any]:
    """What an instance was asked for text or vectors."""
    return [json.loads(one["body"]) for one in here.events(name, "request")]


def lines(answer: httpx2.Response) -> list[Any]:
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_stream_and_one_object(here: Site) -> None:
    here.upstream("chat", "--chunks", 3, "--reply", PIECE, aliases=("other",))
    here.gateway()
    answer = chat(here)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    *parts, last = lines(answer)
    assert [part["message"]["content"] for part in parts] == ["ab"] * 3
    assert [part["done"] for part in parts] == [False] * 3 and last["done"] is True
    assert last["load_duration"] < last["total_duration"]

    whole = chat(here, "other:latest", stream=False)
    assert whole.headers["content-type"] == "application/json"
    assert whole.json()["message"] == {"role": "assistant", "content": "ababab"}
    assert whole.json()["model"] == "other:latest"
    assert [one["model"] for one in asked(here)] == ["chat", "other"]
    (first, _) = here.events("chat", "request")
    assert first["path"] == "/v1/chat/completions"
    assert first["headers"]["content-type"] == "application/json"
    assert here.metric('llama_gateway_requests_total{instance="chat",status="200"}') == 2
    assert here.metric('llama_gateway_first_byte_seconds_count{instance="chat"}') == 2


def test_other_paths_of_an_instance(here: Site) -> None:
    vectors = {"data": [{"embedding": [1, 2]}], "usage": {"prompt_tokens": 3}}
    here.upstream("chat", "--chunks", 1, "--reply", PIECE)
    here.upstream("search", "--reply", json.dumps(vectors), kind="embedding")
    here.gateway()
    assert here.post("/api/generate", {"prompt": "x", "stream": False}).json()["response"] == "ab"
    raw = {"model": "chat", "prompt": "x", "raw": True, "stream": False}
    assert here.post("/api/generate", raw).status_code == 200
    fill = {"model": "chat", "prompt": "x", "suffix": "y", "stream": False}
    assert here.post("/api/generate", fill).status_code == 200
    paths = [one["path"] for one in here.events("chat", "request")]
    assert paths == ["/v1/chat/completions", "/v1/completions", "/infill"]
    # without a model: to the only one of the kind
    made = here.post("/api/embed", {"input": ["x"]}).json()
    assert made["embeddings"] == [[1, 2]] and made["prompt_eval_count"] == 3
    assert made["model"] == "search"
    older = here.post("/api/embeddings", {"model": "search", "prompt": "x"})
    assert older.json() == {"embedding": [1, 2]}
    assert [one["input"] for one in asked(here, "search")] == [["x"], "x"]


def test_names(here: Site) -> None:
    here.upstream("chat", "--chunks", 1, "--reply", PIECE)
    aliases = ("qwen:latest", "qwen:7b", "org/m")
    here.upstream("tagged", "--chunks", 1, "--reply", PIECE, aliases=aliases)
    here.gateway(models={"gpt-*": "chat"})
    for model, instance in {
        **dict.fromkeys(("chat", "CHAT:latest", "chat:q4_K_M", "gpt-x", "gpt-x:latest"), "chat"),
        **dict.fromkeys(("qwen", "qwen:7b", "org/m:Q8"), "tagged"),
    }.items():
        before = len(asked(here, instance))
        answer = chat(here, model, stream=False)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        assert len(asked(here, instance)) == before + 1, model


def test_an_unknown_name(here: Site) -> None:
    here.add("chat")
    here.gateway()
    for path in ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/api/show"):
        answer = here.post(path, {"model": "chatt:7b"})
        assert answer.status_code == 404, path
        assert list(answer.json()) == ["error"] and "did you mean chat?" in answer.json()["error"]


def test_a_key_is_required(here: Site) -> None:
    here.upstream("chat", "--chunks", 1, "--reply", PIECE)
    (here.path / "key").write_text(KEY)
    here.gateway(api_key_file=here.path / "key")
    for answer in (chat(here), here.get("/api/tags"), here.get("/api/version")):
        assert answer.status_code == 401
        assert answer.json() == {"error": "the API key is missing or wrong"}
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "chat", "messages": HELLO}
    assert here.post("/api/chat", body, headers=headers).status_code == 200
    (request,) = here.events("chat", "request")
    assert KEY not in str(request["headers"])


def test_pages_of_other_sites_are_refused(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    headers = {"Origin": "https://evil.example"}
    answer = here.post("/api/chat", {"model": "chat", "messages": HELLO}, headers=headers)
    assert answer.status_code == 403 and "evil.example" in answer.json()["error"]
    assert not here.events("chat", "request")


def test_held_while_it_loads(here: Site) -> None:
    here.upstream("chat", "--chunks", 1, "--reply", PIECE, state="starting")
    here.gateway()
    with ThreadPoolExecutor() as pool:
        text = pool.submit(chat, here, stream=False)
        load = pool.submit(here.post, "/api/generate", {"model": "chat"})
        wait_for(lambda: here.metric("llama_gateway_held") == 2)
        # what is not loaded need not be loaded to be unloaded
        unload = here.post("/api/chat", {"model": "chat", "keep_alive": 0})
        assert unload.json()["done_reason"] == "unload"
        here.says("chat", "ready")
        made = text.result().json()
        assert 0 < made["load_duration"] <= made["total_duration"]
        assert load.result().json()["done_reason"] == "load"
        assert load.result().json()["response"] == "" and load.result().json()["done"] is True
    loaded = here.post("/api/chat", {"model": "chat", "messages": [], "keep_alive": "0s"})
    assert loaded.json()["done_reason"] == "unload"
    assert loaded.json()["message"] == {"role": "assistant", "content": ""}
    assert len(here.events("chat", "request")) == 1


def test_one_that_has_failed_is_not_waited_for(here: Site) -> None:
    here.add("chat", state="failed")
    here.gateway()
    for answer in (chat(here), here.post("/api/generate", {"model": "chat"})):
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert "chat is failed" in answer.json()["error"]


def test_a_client_that_leaves(here: Site) -> None:
    here.upstream("chat", "--chunks", 1000, "--pause", 0.05, "--reply", PIECE)
    here.gateway()
    body = {"model": "chat", "messages": HELLO}
    with httpx2.stream("POST", f"{here.url}/api/chat", json=body) as answer:
        next(answer.iter_lines())
    wait_for(lambda: len(here.events("chat", "gone")) == 1)
    # one that waits for all of it
    connection = http.client.HTTPConnection("127.0.0.1", here.port, timeout=60)
    connection.request("POST", "/api/chat", json.dumps({**body, "stream": False}))
    wait_for(lambda: len(here.events("chat", "request")) == 2)
    connection.close()
    wait_for(lambda: len(here.events("chat", "gone")) == 2)
    assert "Traceback" not in here.output()


@pytest.mark.parametrize("path", ["/api/show", "/api/chat", "/v1/chat/completions"])
def test_a_client_that_leaves_within_its_request(here: Site, path: str) -> None:
    here.add("chat")
    here.gateway()
    connection = http.client.HTTPConnection("127.0.0.1", here.port, timeout=30)
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", "100")
    connection.endheaders(b'{"model": "ch')
    connection.close()
    assert here.get("/health").status_code == 200
    stop(here.processes["gateway"])
    assert "Traceback" not in here.output()


def test_an_instance_that_dies(here: Site) -> None:
    here.upstream("chat", "--chunks", 5, "--reply", PIECE, "--die-after", 2)
    here.gateway()
    *parts, last = lines(chat(here))
    assert len(parts) == 2 and last == {"error": "chat broke off its answer"}
    here.kill("chat")
    here.run("chat", "--chunks", 5, "--reply", PIECE, "--die-after", 2)
    answer = chat(here, stream=False)
    assert answer.status_code == 502 and answer.json() == {"error": "chat broke off its answer"}
    vectors = here.post("/api/embed", {"model": "chat", "input": "x"})
    assert vectors.status_code == 503  # nothing runs


def test_a_document_that_is_cut(here: Site) -> None:
    here.upstream("search", "--length", 100_000, kind="embedding")
    here.gateway()
    answer = here.post("/api/embed", {"model": "search", "input": "x"})
    assert answer.status_code == 502
    assert answer.json() == {"error": "the instance broke off its answer"}


def test_answers_that_are_none(here: Site) -> None:
    here.upstream("chat", "--reply", "<html>")
    here.gateway()
    answer = here.post("/api/embed", {"model": "chat", "input": "x"})
    assert answer.status_code == 502 and "cannot be read" in answer.json()["error"]


def test_errors_of_an_instance(here: Site) -> None:
    here.upstream("chat", "--status", 418)
    here.gateway()
    for stream in (True, False):
        answer = chat(here, stream=stream)
        assert answer.status_code == 418 and answer.json() == {"error": "as asked"}
        assert answer.headers["content-type"] == "application/json"


def test_wrong_requests(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    for body, text in (
        (b'{"model": "chat"', "not valid JSON"),
        (b'{"model": 3}', '"model" must be a string'),
        (b'{"model": "chat", "messages": 3}', "$.messages"),
        (b'{"model": "chat", "messages": [{"role": "user", "content": "\xff"}]}', "not UTF-8"),
        (b'{"model": "chat", "tools": ' + b"[" * 2000 + b"]" * 2000 + b"}", "nested too deep"),
        (b'{"model": "chat", "keep_alive": "soon"}', "is not a duration"),
        (b'{"model": "chat", "keep_alive": true}', "keep_alive must be a number of seconds or a"),
    ):
        answer = httpx2.post(f"{here.url}/api/chat", content=body, timeout=30)
        assert answer.status_code == 400 and text in answer.json()["error"], body
    assert not here.events("chat", "request")


def test_as_large_as_on_other_paths(here: Site) -> None:
    """A large image passes; more than 100 MB is refused."""
    here.upstream("chat", "--chunks", 1, "--reply", PIECE)
    here.gateway()
    image = "iVBORw0KGgoAAAAN" + "A" * 10_000_000
    turn = {"role": "user", "content": "", "images": [image]}
    answer = here.post("/api/chat", {"model": "chat", "messages": [turn], "stream": False})
    assert answer.json()["message"]["content"] == "ab"
    (passed,) = asked(here)
    assert passed["messages"][0]["content"][0]["image_url"]["url"].endswith(f",{image}")
    connection = http.client.HTTPConnection("127.0.0.1", here.port, timeout=30)
    connection.putrequest("POST", "/api/chat")
    connection.putheader("Content-Length", "100000001")
    connection.endheaders()
    refused = connection.getresponse()
    assert refused.status == 413 and "100,000,000 bytes" in json.load(refused)["error"]
    connection.close()


def test_options_without_effect_are_logged_once(here: Site) -> None:
    listed = {"data": [{"meta": {"n_ctx": 4096}}], "models": [{"capabilities": []}]}
    here.upstream("chat", "--chunks", 1, "--reply", PIECE, "--models", json.dumps(listed))
    here.gateway()
    for context in (4096, 32_768, 32_768):
        options = {"num_ctx": context, "num_gpu": 1, "tfs_z\x1b": 1, "top_k": 3}
        assert chat(here, options=options).status_code == 200
    told = [line for line in here.output().splitlines() if "request's" in line]
    assert len(told) == 2
    assert "option tfs_z" in told[0] and "\x1b" not in told[0]
    assert "num_ctx of 32,768 is ignored, the context has 4,096 tokens" in told[1]
    assert all(one["top_k"] == 3 and "num_ctx" not in one for one in asked(here))


def test_a_client_writes_no_lines_into_the_log(here: Site) -> None:
    here.upstream("chat", "--chunks", 1, "--reply", PIECE)
    here.gateway(models={"*": "chat"})
    before = len(here.output().splitlines())
    options = {"a\nforged by an option": 1, "num_ctx": 4096}
    assert chat(here, "any\nforged by a name", options=options).status_code == 200
    told = here.output().splitlines()[before:]
    assert told == ["chat: a request's option a forged by an option is unknown, and ignored"]


def test_what_is_known_without_a_model_file(here: Site) -> None:
    here.add("chat", aliases=("other",))
    here.add("loading", state="starting")
    here.gateway()
    tags = here.get("/api/tags").json()["models"]
    assert [one["name"] for one in tags] == ["chat", "other", "loading"]
    assert all(one["model"] == one["name"] and len(one["digest"]) == 64 for one in tags)
    assert tags[0]["details"]["family"] == "" and tags[0]["size"] == 0
    running = here.get("/api/ps").json()["models"]
    assert [one["name"] for one in running] == ["chat", "other"]
    shown = here.post("/api/show", {"name": "other:latest"}).json()
    assert shown["capabilities"] == ["completion"] and shown["model_info"] == {}
    major, minor, _ = here.get("/api/version").json()["version"].split(".")
    assert (int(major), int(minor)) >= (0, 13)


def test_what_changes_models_is_refused(here: Site) -> None:
    here.add("chat")
    here.gateway()
    for method, path in (
        *(("POST", "/api/create"), ("POST", "/api/copy"), ("DELETE", "/api/delete")),
        *(("POST", "/api/push"), ("POST", "/api/blobs/sha256:00")),
    ):
        answer = httpx2.request(method, here.url + path, json={"model": "chat"})
        assert answer.status_code == 501, path
        assert f"{path} is not supported: " in answer.json()["error"]
    assert httpx2.head(f"{here.url}/api/blobs/sha256:00").status_code == 501
    assert here.get("/api/nothing").json() == {"error": "there is no /api/nothing"}


def test_pull(here: Site) -> None:
    """What is here is pulled; nothing else is."""
    here.add("chat", state="starting")
    here.gateway()
    assert lines(here.post("/api/pull", {"model": "chat:latest"})) == [{"status": "success"}]
    assert here.post("/api/pull", {"name": "chat", "stream": False}).json() == {"status": "success"}
    nameless = here.post("/api/pull", {})
    assert nameless.status_code == 400 and "names no" in nameless.json()["error"]
    answer = here.post("/api/pull", {"model": "hf.co/org/model:Q4_K_M"})
    assert answer.status_code == 403
    assert "the gateway downloads no models: add an instance" in answer.json()["error"]


def test_the_address_itself(here: Site) -> None:
    """Clients ask it whether Ollama runs."""
    here.add("chat")
    here.gateway()
    assert httpx2.head(here.url).status_code == 200
    assert httpx2.get(here.url).status_code == 200
