"""The dashboard: what it counts and tells, to whom, and how it looks in a real browser."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from browsing import press, script_errors, seen
from conftest import wait_for
from gateway_tools import Site, site

from pipeline.core.store import json_file
from pipeline.serve.gateway.counters import (
    GENERATED,
    KEPT,
    KEPT_BYTES,
    PROMPT,
    History,
    Tail,
    memory_lines,
)
from pipeline.serve.supervisor import memory, status

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

USAGE = {"prompt_tokens": 7, "completion_tokens": 21}
REPLY = json.dumps({"x": "größe", "usage": USAGE}, ensure_ascii=False)
HOSTILE = "<img src=x onerror=document.title='taken'>"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    """An instance that answers, and one that has failed."""
    with site(tmp_path) as one:
        log = tmp_path / "chat.log"
        log.write_text("first\n" + "x" * 20_000 + "\n\x1b[2Jlast line\n", encoding="utf-8")
        one.upstream("chat", "--reply", REPLY, log_file=str(log))
        one.add("broken", log_file=str(tmp_path / "none.log"))
        one.says("broken", "failed", f"the model is damaged {HOSTILE}")
        yield one


def tail(*blocks: bytes) -> Tail:
    made = Tail()
    for block in blocks:
        made.add(block)
    return made


@pytest.mark.parametrize(
    ("answer", "prompt", "generated"),
    [
        (b'{"usage":{"completion_tokens":8,"prompt_tokens":30,"total_tokens":38}}', 30, 8),
        (b'data: {"usage": {"prompt_tokens": 30, "completion_tokens": 8}}\n\n', 30, 8),
        (b'{"usage":{"input_tokens":30,"output_tokens":8}}', 30, 8),
        (b'"timings":{"cache_n":20,"prompt_n":10,"predicted_n":8,"predicted_ms":5.1}', None, 8),
        (b'{"tokens_predicted":8,"tokens_evaluated":30}', 30, None),
        (b'{"data":[{"embedding":[1]}],"usage":{"prompt_tokens":6,"total_tokens":6}}', 6, None),
        (b"{}", None, None),
    ],
)
def test_tokens_are_read_from_the_end_of_an_answer(
    answer: bytes, prompt: int | None, generated: int | None
) -> None:
    half = len(answer) // 2
    ended = tail(*[b"data: {}\n\n"] * 50, answer[:half], answer[half:], b"data: [DONE]\n\n")
    assert (ended.number(PROMPT), ended.number(GENERATED)) == (prompt, generated)
    assert ended.text is None, "contents are kept where they are asked for alone"


def test_what_an_hour_counts() -> None:
    history = History()

    def count(tokens: float, answered: int) -> tuple[dict[str, int], dict[str, int]]:
        name = "llamacpp:tokens_predicted_total"
        text = f"# TYPE {name} counter\n{name} {tokens}\n"
        history.sample({("a", 200): answered, ("a", 500): 1}, {"a": text, "b": "nonsense"})
        return history.samples[-1][1:]

    assert count(100, 4) == ({"a": 5}, {"a": 0}), "what was before the gateway is not of this hour"
    assert count(150, 4) == ({}, {"a": 50})
    assert count(20, 6) == ({"a": 2}, {"a": 20}), "it was started again"
    history.sample({}, {}, ["a", "new"])
    assert count(30, 6)[1] == {"a": 30}, "it was unloaded between"
    history.sample({}, {"new": "llamacpp:tokens_predicted_total 7\n"})
    assert history.samples[-1][2] == {"new": 7}, "it was loaded since"
    vllm = (
        'vllm:generation_tokens_total{engine="0"} 3.0\nvllm:generation_tokens_total{engine="1"} 4\n'
    )
    for _ in range(400):
        history.sample({}, {"v": vllm})
    assert len(history.samples) == 360


def test_the_figures(here: Site) -> None:
    here.gateway()
    assert here.chat("chat").status_code == 200
    assert here.chat("nobody").status_code == 404
    assert here.post("/v1/chat/completions", {"model": "chat", "do": {"status": 500}}).is_error
    data = here.get("/dashboard/data").json()
    chat, broken = data["instances"]
    assert (chat["name"], chat["in_flight"]) == ("chat", 0)
    assert broken["reason"].startswith("the model is damaged")
    last, first = data["requests"]
    assert (first["model"], first["instance"], first["path"]) == (
        *("chat", "chat"),
        "/v1/chat/completions",
    )
    assert (first["status"], first["prompt_tokens"], first["tokens"]) == (200, 7, 21)
    assert (last["status"], last["tokens"], last["asked"]) == (500, None, None)
    assert 0 < first["seconds"] < 60 and first["at"] < last["at"]
    (ram,) = [each for each in data["devices"] if each["name"] == "ram"]
    assert 0 < ram["free"] < ram["total"]
    assert data["unloads"] is True
    assert data["inspect"] is False and "größe" not in json.dumps(data, ensure_ascii=False)


def test_the_memory_that_it_shows_is_in_metrics(here: Site) -> None:
    here.upstream("small", start="demand")
    need = {"ram": 1000, "gpu0": 50}
    account = {"command": "x", "need": need}
    json_file.write_private(here.at.books, {"small": account})
    here.gateway()
    (ram,) = [
        each for each in here.get("/dashboard/data").json()["devices"] if each["name"] == "ram"
    ]
    assert here.metric('llama_gateway_device_memory_bytes{device="ram"}') == ram["total"]
    assert here.metric('llama_gateway_device_memory_free_bytes{device="ram"}') == ram["free"]
    for device, count in need.items():
        line = f'llama_gateway_instance_counted_bytes{{instance="small",device="{device}"}}'
        assert here.metric(line) == count
    processes = [psutil.Process(os.getpid())]
    rows = [row(name="a", memory=memory.used(processes, {})["ram"], gpu_memory=7), row(name="b")]
    lines = list(memory_lines(rows, []))
    assert 'llama_gateway_instance_memory_bytes{instance="a",device="gpus"} 7' in lines
    assert not any('instance="b"' in line for line in lines), "what is not known is left out"


def row(**more: Any) -> status.Row:
    known: dict[str, Any] = {"ready_since": None, "pid": None, "port": 1, "restarts": 0}
    known |= dict.fromkeys(("engine", "model", "state", "start", "reason", "url", "log_file"), "x")
    known |= dict.fromkeys(("memory", "gpu_memory", "tokens_per_second", "drafts_accepted"))
    return status.Row(**(known | more))


def test_contents_are_kept_where_that_is_wanted(here: Site) -> None:
    here.gateway(inspect=True)
    here.chat("chat", fill="y" * (2 * KEPT_BYTES))
    for _ in range(KEPT + 5):
        here.chat("chat")
    requests = here.get("/dashboard/data").json()["requests"]
    assert len(requests) == KEPT
    assert '"model": "chat"' in requests[0]["asked"].replace('":"', '": "')
    assert requests[0]["answered"] == REPLY
    assert all(len(each["asked"]) <= KEPT_BYTES for each in requests)


def test_who_may_see_it(here: Site, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame\n")
    here.gateway(api_key_file=str(tmp_path / "key"))
    for path in ("/dashboard", "/dashboard/page.css", "/dashboard/page.js"):
        page = here.get(path)
        assert (
            page.status_code == 200
            and "default-src 'self'" in page.headers["content-security-policy"]
        ), path
    key = {"Authorization": "Bearer sesame"}
    for path in ("/dashboard/data", "/dashboard/log?name=chat"):
        assert here.get(path).status_code == 401
        assert here.get(path, headers=key).status_code == 200


def test_a_page_of_another_site_sees_nothing(here: Site) -> None:
    here.gateway()
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        assert here.get("/dashboard/data", headers=headers).status_code == 403
        assert here.get("/dashboard", headers=headers).status_code == 403


def test_the_end_of_a_log(here: Site) -> None:
    here.gateway()
    log = here.get("/dashboard/log?name=chat")
    assert log.headers["content-type"].startswith("text/plain")
    assert log.text == "[2Jlast line\n", "without what a terminal would obey"
    assert "none.log: No such file" in here.get("/dashboard/log?name=broken").text
    assert here.get("/dashboard/log?name=nobody").status_code == 404
    assert here.get("/dashboard/log").status_code == 404


@pytest.mark.slow
def test_in_a_browser(here: Site, browser: Chrome, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "key").write_text("sesame\n")
    here.add("wanted", start="demand", state="failed")
    here.gateway(inspect=True, api_key_file=str(tmp_path / "key"))
    key = {"Authorization": "Bearer sesame"}
    here.post("/v1/chat/completions", {"model": "chat", "messages": [HOSTILE]}, headers=key)

    browser.get(f"{here.url}/dashboard")
    wait_for(lambda: "an API key is needed" in seen(browser, "#state"))
    browser.find_element("id", "key").send_keys("wrong", Keys.ENTER)
    wait_for(lambda: "this key is not accepted" in seen(browser, "#state"))
    browser.find_element("id", "key").clear()
    browser.find_element("id", "key").send_keys("sesame", Keys.ENTER)
    wait_for(lambda: seen(browser, "#instances th") == ["chat", "broken", "wanted"])
    assert len(browser.find_elements("id", "Load-wanted")) == 1, "a load that failed, once more"
    assert not browser.find_elements("id", "Load-broken"), "`up` starts this one"
    assert HOSTILE in seen(browser, ".reason")[0], "as text"
    assert len(seen(browser, "#devices .device")) >= 1

    press(browser, "#Log-chat", Keys.ENTER)
    wait_for(lambda: "last line" in seen(browser, "#log")[0])
    press(browser, "#log-close", Keys.ENTER)
    assert browser.switch_to.active_element.get_attribute("id") == "Log-chat"

    wait_for(lambda: "21" in seen(browser, "#requests td"))
    press(browser, "#requests button", Keys.SPACE)
    wait_for(lambda: any(HOSTILE in text for text in seen(browser, "#requests pre")))
    assert any("größe" in text for text in seen(browser, "#requests pre"))
    assert browser.title == "llama-pipeline" and script_errors(browser) == []
    here.kill("gateway")
    wait_for(lambda: "the gateway does not answer" in seen(browser, "#state"))
