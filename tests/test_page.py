"""llama.cpp's page, built from its source and embedded, in a real browser."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import debian
import pytest
from conftest import Doit, post, wait_for

from pipeline.bins.node import find_node
from pipeline.core.paths import Home

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = [pytest.mark.build, pytest.mark.slow]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MESSAGE = "hello there, größe"
LETTERS = re.compile(r"\W+")


@pytest.fixture
def with_page(doit: Doit) -> Doit:
    """doit on a home whose programs were built where there was a page to embed."""
    if find_node(Home(doit.home)) is None:
        pytest.skip("needs Node.js with npm, 20.19, 22.13, 24 or newer, to build the page")
    return doit


def programs() -> tuple[str | None, str | None]:
    """Chromium and its driver."""
    return next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    from selenium import webdriver

    chromium, driver_path = programs()
    if not (chromium and driver_path):
        debian.require("chromium", "chromium-driver")
        chromium, driver_path = programs()
    options = webdriver.ChromeOptions()
    options.binary_location = str(chromium)
    for word in ("headless=new", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to start as root with it
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(executable_path=driver_path))
    try:
        yield driver
    finally:
        driver.quit()


def letters(text: str) -> str:
    """What stays of a text however it is set: the page renders Markdown."""
    return LETTERS.sub("", text)


def test_a_message_in_the_page_is_answered(
    with_page: Doit, tiny: Path, converter: Path, browser: Chrome
) -> None:
    from selenium.webdriver.common.by import By

    greedy = ("server.temp=0", "server.n_predict=24")
    with with_page.serving(f"model={tiny}", "ctx_size=2048", *greedy) as url:
        messages = [{"role": "user", "content": MESSAGE}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 24}
        answer = post(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]
        assert len(letters(answer)) > 10

        def seen(selector: str) -> list[str]:
            return [found.text for found in browser.find_elements(By.CSS_SELECTOR, selector)]

        browser.get(url)
        field = wait_for(
            lambda: browser.find_elements(By.CSS_SELECTOR, "form textarea, form [contenteditable]"),
            seconds=120,
        )[0]
        assert seen(".chat-message-assistant") == []
        field.send_keys(MESSAGE)
        send = browser.find_element(By.XPATH, "//button[@type='submit'][.//span[text()='Send']]")
        wait_for(send.is_enabled)
        send.click()
        wait_for(
            lambda: letters(answer) in letters("".join(seen(".chat-message-assistant"))),
            seconds=120,
        )
        assert len(seen(".chat-message-assistant")) == 1
        assert [text.strip() for text in seen(".chat-message-user-bubble")] == [MESSAGE]
        # The page asks for what this server does not offer, too: those are of the network.
        assert [line for line in browser.get_log("browser") if line["source"] == "javascript"] == []
        log = (with_page.home / "logs" / f"serve-{url.rpartition(':')[2]}.log").read_text()
        assert log.count("stop processing") == 2, "once from here, once from the page"


def test_the_page_is_what_was_built(with_page: Doit, tiny: Path, converter: Path) -> None:
    built = with_page.home / "bins" / ".ui" / "page"
    with with_page.serving(f"model={tiny}", "ctx_size=512") as url:
        for name in ("index.html", "sw.js", "_app/version.json"):
            request = urllib.request.Request(f"{url}/{name}", headers={"Accept-Encoding": "gzip"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                assert gzip.decompress(reply.read()) == (built / name).read_bytes()
