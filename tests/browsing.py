"""Headless Chromium, and what is seen in it of llama.cpp's page."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import debian
import pytest
from conftest import wait_for

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LETTERS = re.compile(r"\W+")


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


def seen(browser: Chrome, selector: str) -> list[str]:
    """The text of each element; read again where the page was drawn anew meanwhile."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By

    while True:
        with suppress(StaleElementReferenceException):
            return [found.text for found in browser.find_elements(By.CSS_SELECTOR, selector)]


def press(browser: Chrome, selector: str, *keys: str) -> None:
    """Type into the first such element, or press keys on it; on the new one where the page was
    drawn anew meanwhile."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By

    while True:
        with suppress(StaleElementReferenceException):
            browser.find_element(By.CSS_SELECTOR, selector).send_keys(*keys)
            return


def say(browser: Chrome, message: str) -> None:
    """Write a message into the page, and send it."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By

    fields = "form textarea, form [contenteditable]"
    field = wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, fields), seconds=120)[0]
    field.send_keys(message)
    button = "//button[@type='submit'][.//span[text()='Send']]"

    def is_sent() -> bool:
        with suppress(StaleElementReferenceException):  # the page was drawn anew meanwhile
            send = browser.find_element(By.XPATH, button)
            if send.is_enabled():
                send.click()
                return True
        return False

    wait_for(is_sent)


def script_errors(browser: Chrome) -> list[str]:
    """What failed in the page's own script. What a server does not offer is of the network."""
    found = [line for line in browser.get_log("browser") if line["source"] == "javascript"]
    return [str(line["message"]) for line in found]
