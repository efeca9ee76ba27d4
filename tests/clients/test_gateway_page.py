"""llama.cpp's page through the gateway, in a real browser: the models of all instances."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest
from browsing import letters, say, script_errors, seen
from client_tools import KEY, serve
from conftest import wait_for
from gateway_tools import Site, site, stop

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = [pytest.mark.build, pytest.mark.slow]
MESSAGE = "hello there, größe"
LINES = ("--threads", "1", "--temp", "0", "--parallel", "1")


@pytest.fixture
def here(built: Path, gguf: Path, tmp_path: Path) -> Iterator[Site]:
    """Two chat models, and an embedder that comes first."""
    if not (built / ".ui" / "page" / "index.html").exists():
        pytest.skip("needs a llama-server with its page: Node.js with npm, when it is built")
    program = next(built.glob("*/llama-server*"))
    with site(tmp_path) as one:
        serve(one, program, "search", gguf, "--embeddings", kind="embedding")
        serve(one, program, "first", gguf, *LINES, "--alias", "first", "--n-predict", "24")
        serve(one, program, "second", gguf, *LINES, "--alias", "second")
        (tmp_path / "key").write_text(KEY)
        yield one


def answer_of(here: Site, name: str, **more: object) -> str:
    """What the page will be answered, without its Markdown."""
    messages = [{"role": "user", "content": MESSAGE}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 24, **more}
    url = f"{here.instances[name].url}/v1/chat/completions"
    told = httpx2.post(url, json=body, timeout=60).json()
    return letters(told["choices"][0]["message"]["content"])


def stops(here: Site, name: str) -> int:
    return here.output(name).count("stop processing")


def test_a_message_reaches_the_first_chat_model(here: Site, browser: Chrome) -> None:
    expected = answer_of(here, "first")
    here.gateway()
    browser.get(here.url)
    say(browser, MESSAGE)
    wait_for(
        lambda: expected in letters("".join(seen(browser, ".chat-message-assistant"))), seconds=120
    )
    assert script_errors(browser) == []
    assert (stops(here, "first"), stops(here, "second")) == (2, 0)
    # in the picker: the chat models, and not the embedder
    from selenium.webdriver.common.by import By

    browser.find_element(By.XPATH, "//form//button[contains(., 'first')]").click()
    wait_for(lambda: "second" in browser.find_element(By.TAG_NAME, "body").text)
    assert "search" not in browser.find_element(By.TAG_NAME, "body").text


def test_with_a_key_and_a_model_of_ones_choice(here: Site, browser: Chrome) -> None:
    """The page asks for the key itself; Stop ends the answer at the instance."""
    from selenium.webdriver.common.by import By

    here.gateway(api_key_file=here.path / "key")
    browser.get(here.url)
    enter = "//button[contains(., 'API Key')]"
    wait_for(lambda: browser.find_elements(By.XPATH, enter), seconds=120)[0].click()
    field = wait_for(lambda: browser.find_elements(By.ID, "api-key-input"))[0]
    field.send_keys(KEY + "\n")
    wait_for(lambda: not browser.find_elements(By.ID, "api-key-input"))
    # a page that is loaded anew knows the key
    browser.get(f"{here.url}/?model=second#/")
    wait_for(lambda: browser.find_elements(By.XPATH, "//form//button[contains(., 'second')]"))
    say(browser, MESSAGE)
    wait_for(lambda: "processing task" in here.output("second"), seconds=60)
    assert "processing task" not in here.output("first")
    stop = "//button[.//span[text()='Stop']]"
    wait_for(lambda: browser.find_elements(By.XPATH, stop))[0].click()
    wait_for(lambda: stops(here, "second") == 1)


def test_what_is_open_and_what_is_not(here: Site) -> None:
    here.gateway(api_key_file=here.path / "key")
    page = here.get("/")
    assert page.status_code == 200 and "<!doctype html>" in page.text.lower()
    assert "etag" in page.headers and "access-control-allow-origin" not in page.headers
    again = here.get("/", headers={"If-None-Match": page.headers["etag"]})
    assert again.status_code == 304
    for path in ("/sw.js", "/_app/version.json", "/manifest.webmanifest", "/favicon.ico"):
        assert here.get(path).status_code == 200, path
    plain = here.get("/", headers={"Accept-Encoding": "identity"})  # as curl asks
    assert plain.json() == {"name": "llama-pipeline gateway"}
    assert here.get("/nothing.js").status_code == 404
    for path in ("/props", "/props?model=first", "/slots", "/models/sse", "/v1/models/x.js"):
        assert here.get(path).status_code == 401, path
    key = {"Authorization": f"Bearer {KEY}"}
    assert here.get("/props", headers=key).json()["role"] == "router"
    props = here.get("/props?model=first", headers=key).json()
    assert props["default_generation_settings"]["n_ctx"] == 16_384
    assert here.get("/props?model=search", headers=key).json()["ui"] is False
    assert here.get("/props?model=frist", headers=key).status_code == 404
    assert here.get("/slots", headers=key).status_code == 404, "other people's prompts"
    assert here.post("/props", {}, headers=key).status_code == 405
    assert here.get("/_app/../slots", headers=key).status_code in (401, 404)


def test_the_page_hears_what_becomes_of_a_model(here: Site) -> None:
    here.gateway()
    states = {one["id"]: one["status"]["value"] for one in here.get("/v1/models").json()["data"]}
    assert states == {"search": "loaded", "first": "loaded", "second": "loaded"}
    with httpx2.stream("GET", f"{here.url}/models/sse", timeout=60) as feed:
        lines = feed.iter_lines()
        assert next(lines) == ": "
        here.says("second", "loading")
        line = next(one for one in lines if one)
        assert '"status": "loading"' in line and '"second"' in line
        assert here.post("/models/load", {"model": "second"}).json() == {"success": True}
        here.says("second", "failed")
        assert '"status": "failed"' in next(one for one in lines if one)
        wrong = here.post("/models/load", {"model": "second"})
        assert wrong.status_code == 400 and "is not running; start it: ./doitw up" in wrong.text
        assert stop(here.processes["gateway"]) == 0, "an open feed does not keep it"
    assert "Traceback" not in here.output()
