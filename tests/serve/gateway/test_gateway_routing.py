"""Which instances a request means: decisions without effects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import REPOSITORY
from gateway_tools import instance

from pipeline.core.errors import UsageError
from pipeline.serve.gateway.answers import health, models
from pipeline.serve.gateway.counters import merge_metrics
from pipeline.serve.gateway.request_body import RequestBody, parse_body
from pipeline.serve.gateway.servers import (
    ANY,
    CHAT,
    EMBEDDING,
    RERANK,
    ServerList,
    View,
    find,
    server_list,
)
from pipeline.serve.gateway.settings import GatewaySettings, as_instance, check
from pipeline.serve.gateway.upstream import Keys
from pipeline.serve.guard.refusal import Refused, error_body
from pipeline.serve.keys import is_loopback
from pipeline.serve.supervisor.state import (
    DesiredState,
    Folder,
    ServerStatus,
    State,
    write_state,
    write_wanted,
)


def servers(*instances: Any, asked: int = 1, **states: str) -> ServerList:
    """The instances as they were seen; ready where nothing else is said."""
    seen = tuple(
        ServerStatus(name=one.name, state=states.get(one.name, "ready"), asked=1)
        for one in instances
    )
    wanted = DesiredState(config="x", instances=instances, asked=asked)
    return server_list(wanted, State(pid=1, started=0, asked=1, instances=seen))


def found(listed: ServerList, model: str | None, kind: str = CHAT, **patterns: str) -> list[str]:
    return [one.name for one in find(listed, model, kind, patterns)]


def refused(listed: ServerList, model: str | None, kind: str = CHAT, **patterns: str) -> Refused:
    with pytest.raises(Refused) as why:
        find(listed, model, kind, patterns)
    return why.value


THREE = servers(
    instance("chat", aliases=("gpt-4o", "Both")),
    instance("small", aliases=("both",)),
    instance("search", aliases=("embedder", "Both"), kind="embedding"),
)


def test_a_model_is_a_name_or_an_alias() -> None:
    assert found(THREE, "chat") == ["chat"]
    assert found(THREE, "gpt-4o") == ["chat"]
    assert found(THREE, "embedder", CHAT) == ["search"], "a named model is not guessed about"


def test_the_exact_letter_case_comes_first() -> None:
    assert found(THREE, "both") == ["small"]
    assert found(THREE, "Both") == ["chat", "search"]
    assert found(THREE, "BOTH") == ["chat", "small", "search"]
    assert found(THREE, "GPT-4O") == ["chat"]


def test_an_unknown_model_is_told_with_the_nearest_and_all() -> None:
    why = refused(THREE, "gpt-4")
    assert why.status == 404 and why.code == "model_not_found"
    assert "did you mean gpt-4o?" in why.message
    assert "chat, gpt-4o, Both, small, both, search, embedder" in why.message


def test_without_a_model_the_only_one_of_the_kind_is_meant() -> None:
    assert found(THREE, None, EMBEDDING) == ["search"]
    why = refused(THREE, None, CHAT)
    assert why.status == 400 and "chat, gpt-4o" in why.message
    assert refused(THREE, None, ANY).status == 400
    assert found(servers(instance("one")), None, RERANK) == ["one"], "which says why it cannot"
    alike = servers(instance("a", aliases=("both",)), instance("b", aliases=("both",)))
    assert found(alike, None) == ["a", "b"], "two of one model"


def test_a_tag_that_clients_of_ollama_add_names_the_same_model() -> None:
    assert found(THREE, "chat:latest") == found(THREE, "Chat:latest", **{"*": "small"}) == ["chat"]
    tagged = servers(instance("chat"), instance("new", aliases=("chat:latest",)))
    assert found(tagged, "chat:latest") == ["new"], "a name as it stands comes first"
    assert "no model other:latest" in refused(THREE, "other:latest").message


def test_patterns_lead_to_a_name() -> None:
    patterns = {"claude-*": "CHAT", "*": "embedder"}
    assert found(THREE, "claude-opus-9", **patterns) == ["chat"]
    assert found(THREE, "whatever", **patterns) == ["search"]
    assert found(THREE, "small", **patterns) == ["small"], "a name comes before a pattern"
    why = refused(THREE, "claude-x", **{"claude-*": "chta"})
    assert "chta (from claude-x)" in why.message


def test_the_gateway_itself_is_no_target() -> None:
    own = as_instance(Folder(Path("/f")), GatewaySettings())
    assert servers(own, instance("chat")).by_name.keys() == {"chat"}
    assert refused(servers(own), "gateway").status == 503


def test_what_was_given_up_is_waited_for_once_it_is_asked_for_anew() -> None:
    (given_up,) = servers(instance("a"), a="failed").targets
    assert not given_up.is_pending
    (anew,) = servers(instance("a"), a="failed", asked=2).targets
    assert anew.is_pending
    (ready,) = servers(instance("a"), asked=2).targets
    assert ready.is_ready
    (unseen,) = server_list(DesiredState(config="x", instances=(instance("a"),)), None).targets
    assert unseen.is_pending


def test_the_view_follows_the_files(tmp_path: Path) -> None:
    at = Folder(tmp_path / "not yet")
    view = View(at)
    assert view.now().targets == ()
    write_wanted(at, DesiredState(config="x", instances=(instance("a"), instance("b"))))
    assert [one.name for one in view.now().targets] == ["a", "b"]
    ready = ServerStatus(name="a", state="ready")
    write_state(at, State(pid=1, started=0, asked=0, instances=(ready,)))
    assert [one.is_ready for one in view.now().targets] == [True, False]
    assert view.now() is view.now(), "nothing is read where nothing changed"
    at.wanted.write_text("{ damaged")
    assert len(view.now().targets) == 2, "what was last read holds"
    write_wanted(at, DesiredState(config="x"))
    assert view.now().targets == ()


@pytest.mark.parametrize(
    ("states", "status", "word"),
    [
        ({}, 200, "ok"),
        ({"a": "failed"}, 200, "degraded"),
        ({"a": "failed", "b": "pausing"}, 200, "loading"),
        ({"a": "failed", "b": "stopped"}, 503, "unavailable"),
    ],
)
def test_health(states: dict[str, str], status: int, word: str) -> None:
    told = health(servers(instance("a"), instance("b"), **states), detailed=True)
    assert told[0] == status and told[1]["status"] == word
    assert told[1]["instances"]["a"]["state"] == states.get("a", "ready")
    assert "instances" not in health(servers(instance("a")), detailed=False)[1]


def test_the_list_of_models_has_each_name_once() -> None:
    both = servers(instance("a", aliases=("m",)), instance("b", aliases=("m",)), b="loading")
    listed = models(both, {})
    assert [(one["id"], one["state"], one["instances"]) for one in listed["data"]] == [
        ("a", "ready", ["a"]),
        ("m", "ready", ["a", "b"]),
        ("b", "loading", ["b"]),
    ]
    assert models(ServerList(), {})["data"] == []


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b"", None),
        (b'{"model": "a", "more": 1}', "a"),
        (b'{"more": {"model": "inner"}}', None),
        (b'{"model": ""}', None),
        ('{"model": "größer/ü"}'.encode(), "größer/ü"),
    ],
)
def test_the_model_of_a_body(body: bytes, model: str | None) -> None:
    told = parse_body("application/json", body)
    assert told.model == model and told.body == body


def renamed(parsed: RequestBody, name: str) -> bytes:
    assert parsed.renamed
    return parsed.renamed(name)


def test_a_renamed_body_keeps_the_rest() -> None:
    told = parse_body("", '{"a": 1.5, "model": "x", "ü": [null, 12345678901234567890]}'.encode())
    assert json.loads(renamed(told, "y")) == {
        "a": 1.5,
        "model": "y",
        "ü": [None, 12345678901234567890],
    }


LONG = b'{"model": "' + b"x" * 1001 + b'"}'


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'"model"', b'{"model": 1}', b"\xff", b"[" * 99999, LONG]
)
def test_a_body_that_cannot_be_read_is_refused(body: bytes) -> None:
    with pytest.raises(Refused) as why:
        parse_body("application/json", body)
    assert why.value.status == 400


def test_a_text_that_is_not_utf_8_is_refused() -> None:
    """llama-server fails at it with status 500, for which clients try again."""
    long = '{"model": "x", "text": "%s"}' % ("aé😀" * 300_000)
    assert parse_body("", long.encode()).model == "x"
    latin = '{"model": "x", "text": "é"}'.encode("latin-1")
    for text in (latin, b'{"text": "\xc3"}', long.encode("cp1252", "ignore")):
        with pytest.raises(Refused, match="its text is not UTF-8") as refused:
            parse_body("", text)
        assert refused.value.status == 400


def form(*parts: tuple[str, bytes]) -> bytes:
    told = (
        b'--B-1\r\nContent-Disposition: form-data; name="%s"\r\nX: y\r\n\r\n%s\r\n'
        % (name.encode(), value)
        for name, value in parts
    )
    return b"".join(told) + b"--B-1--\r\n"


@pytest.mark.parametrize("content_type", ["boundary=B-1", 'boundary="B-1"; charset=utf-8'])
def test_the_model_of_a_form(content_type: str) -> None:
    content_type = f"multipart/form-data; {content_type}"
    sound = b'\x00\r\n--B-\r\nname="model"\r\n\r\n--B' * 50
    body = form(('file"; filename="model', sound), ("other_model", b"no"), ("model", b"whisper"))
    told = parse_body(content_type, body)
    assert told.model == "whisper"
    assert renamed(told, "x") == body.replace(b"whisper", b"x")
    assert parse_body(content_type, form(("file", sound))).model is None
    assert parse_body(content_type, body[:100]).model is None


def test_metrics_of_several_are_one_text() -> None:
    text = '# HELP x_s Help me.\n# TYPE x_s histogram\nx_s_bucket{le="1"} 1\nx_s_sum 2\nlone 3\n'
    told = list(merge_metrics({"a": text, 'b"': text + "# a remark\n\n??\n"}))
    assert told == [
        "# HELP x_s Help me.",
        "# TYPE x_s histogram",
        'x_s_bucket{instance="a",le="1"} 1',
        'x_s_sum{instance="a"} 2',
        'x_s_bucket{instance="b\\"",le="1"} 1',
        'x_s_sum{instance="b\\""} 2',
        'lone{instance="a"} 3',
        'lone{instance="b\\""} 3',
    ]


def test_errors_in_both_forms() -> None:
    openai = error_body(404, "no", "model_not_found", anthropic=False)["error"]
    assert openai["param"] == "model" and openai["code"] == "model_not_found"
    told = error_body(413, "no", None, anthropic=True)
    assert told == {"type": "error", "error": {"type": "request_too_large", "message": "no"}}


def test_keys_are_read_again_when_their_file_changes(tmp_path: Path) -> None:
    file, keys = tmp_path / "keys", Keys()
    assert not keys.allow(str(file), {"x-api-key": ""})
    file.write_text("\n# three\none\n\n  two \n")
    assert keys.of(str(file)) == ("one", "two")
    for right in ({"authorization": "Bearer one"}, {"x-api-key": "two"}):
        assert keys.allow(str(file), right)
    for wrong in ({}, {"authorization": "one"}, {"authorization": "Bearer "}, {"x-api-key": "ö"}):
        assert not keys.allow(str(file), wrong)
    file.write_text("three")
    assert keys.of(str(file)) == ("three",)
    file.unlink()
    assert not keys.allow(str(file), {"x-api-key": "three"})


def test_an_open_address_needs_a_key(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""):
        assert not is_loopback(host)
        with pytest.raises(UsageError, match="no API key"):
            check(GatewaySettings(host=host))
        check(GatewaySettings(host=host, without_key=True))
    for host in ("127.0.0.1", "127.0.0.9", "::1", "LocalHost"):
        check(GatewaySettings(host=host))
    with pytest.raises(UsageError, match="none is not a file"):
        check(GatewaySettings(api_key_file=str(tmp_path / "none")))
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfk\n")
    with pytest.raises(UsageError, match="byte order mark"):
        check(GatewaySettings(api_key_file=str(tmp_path / "marked")))
    (tmp_path / "key").write_text("k\n")
    check(GatewaySettings(host="0.0.0.0", api_key_file=str(tmp_path / "key")))


def test_the_gateway_as_an_instance(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    settings = GatewaySettings(
        port=9,
        api_key_file=str(tmp_path / "key"),
        models={"c-*": "chat"},
        origins=("app://obsidian.md",),
        hosts=("a.lan",),
    )
    told = as_instance(Folder(tmp_path), settings)
    assert (told.engine, told.kind, told.host, told.port) == ("gateway", "gateway", "127.0.0.1", 9)
    assert told.cmd[:3] == ("-m", "pipeline.serve.gateway", str(tmp_path))
    assert msgspec.json.decode(told.cmd[3], type=GatewaySettings) == settings
    assert told.probe_timeout == 60, "one that hangs is started again"
    assert "secret" not in str(told.as_json())


def test_settings_are_light() -> None:
    """They are imported where tasks are listed."""
    script = (
        "import sys; import pipeline.serve.gateway.settings;"
        "print({'starlette', 'uvicorn', 'httpx2', 'anyio', 'asyncio'} & set(sys.modules))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "set()"


def test_what_else_is_read_of_a_body() -> None:
    parsed = parse_body("", b'{"a": {"stream": true}, "stream" : true, "keep_alive":"1h30m"}')
    assert parsed.streams and parsed.keep_alive == 5400
    parsed = parse_body("", b'{"stream": false, "x": "stream", "keep_alive": -1}')
    assert not parsed.streams and parsed.keep_alive == -1
    assert parse_body("", b'{"keep_alive": null}').keep_alive is None
    assert parse_body("", b'{"keep_alive": 0.5}').keep_alive == 0.5
    with pytest.raises(Refused, match="keep_alive 'soon' is not a duration"):
        parse_body("", b'{"keep_alive": "soon"}')
    for wrong in (b"true", b"[]", b"{}", b"1e400"):
        with pytest.raises(Refused, match="keep_alive must be a number of seconds or a duration"):
            parse_body("", b'{"keep_alive": %b}' % wrong)
