"""llama.cpp's page, built from its source and embedded, in a real browser."""

from __future__ import annotations

import gzip
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browsing import letters, say, script_errors, seen
from conftest import Doit, post, wait_for

from pipeline.bins.compile.node import find_node
from pipeline.core.paths import Home

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = [pytest.mark.build, pytest.mark.slow]
MESSAGE = "hello there, größe"


@pytest.fixture
def with_page(doit: Doit) -> Doit:
    """doit on a home whose programs were built where there was a page to embed."""
    if find_node(Home(doit.home)) is None:
        pytest.skip("needs Node.js with npm, 20.19, 22.13, 24 or newer, to build the page")
    return doit


def test_a_message_in_the_page_is_answered(with_page: Doit, browser: Chrome) -> None:
    greedy = ("server.temp=0", "server.n_predict=24")
    with with_page.serving("model=demo", "ctx_size=2048", *greedy) as url:
        messages = [{"role": "user", "content": MESSAGE}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 24}
        answer = post(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]
        assert len(letters(answer)) > 10

        browser.get(url)
        assert seen(browser, ".chat-message-assistant") == []
        say(browser, MESSAGE)
        wait_for(
            lambda: letters(answer) in letters("".join(seen(browser, ".chat-message-assistant"))),
            seconds=120,
        )
        assert len(seen(browser, ".chat-message-assistant")) == 1
        assert [text.strip() for text in seen(browser, ".chat-message-user-bubble")] == [MESSAGE]
        assert script_errors(browser) == []
        log = with_page.home / "logs" / f"serve-{url.rpartition(':')[2]}.log"
        # once from here, once from the page
        wait_for(lambda: log.read_text().count("stop processing") == 2)


def test_the_page_is_what_was_built(with_page: Doit, gguf: Path) -> None:
    built = with_page.home / "bins" / ".ui" / "page"
    with with_page.serving(f"model={gguf}", "ctx_size=512") as url:
        for name in ("index.html", "sw.js", "_app/version.json"):
            request = urllib.request.Request(f"{url}/{name}", headers={"Accept-Encoding": "gzip"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                assert gzip.decompress(reply.read()) == (built / name).read_bytes()
