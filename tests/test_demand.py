"""More models than fit, as a user has them: real servers, a real gateway, a budget for two."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import psutil
import pytest
from browsing import press, script_errors, seen
from conftest import Doit, free_port, wait_for, with_programs

from pipeline.core.store import receipts
from pipeline.serve.supervisor import marker, state
from pipeline.serve.supervisor.state import Folder

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = pytest.mark.build

NAMES = ("one", "two", "three", "four", "five", "six")
MB = 1_000_000
BUDGET = 190 * MB  # each is counted with some 75
CLIENTS, SECONDS = 8, 12.0


class Site:
    """A configuration that is up."""

    def __init__(self, doit: Doit, file: Path, port: int) -> None:
        self.doit, self.file, self.url = doit, file, f"http://127.0.0.1:{port}"
        self.at: Folder = state.folder(doit_home(doit), str(file))

    def __call__(self, task: str, *words: str, status: int = 0) -> str:
        done = self.doit(task, f"config={self.file}", *words, status=status)
        return done.out + done.err

    def rows(self) -> dict[str, Any]:
        done = self.doit("ps", f"config={self.file}", "format=json")
        return {row["name"]: row for row in done.json()}

    def ask(self, path: str, model: str, **more: Any) -> httpx2.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], **more}
        return httpx2.post(f"{self.url}{path}", json=body, timeout=120)

    def running(self) -> list[str]:
        loaded = httpx2.get(f"{self.url}/running", timeout=30).json()["running"]
        return [row["model"] for row in loaded]

    def kernel_bytes(self) -> int:
        """What the kernel counts for the llama-servers: shared pages to equal parts."""
        total = 0
        for value, processes in marker.marked(self.at).items():
            if value.partition("/")[2] in NAMES:
                for process in processes:
                    try:
                        total += process.memory_full_info().pss
                    except psutil.Error:
                        continue  # it has just ended
        return total


def doit_home(doit: Doit) -> Any:
    from pipeline.core.paths import Home

    return Home(doit.home)


@pytest.fixture
def site(built: Path, gguf: Path, tmp_path: Path) -> Iterator[Site]:
    doit = with_programs(built, tmp_path / "hôme of many")
    port, file = free_port(), tmp_path / "many ü.toml"
    lines = [f'[master]\nmemory = "{BUDGET // MB}MB"', f"[gateway]\nenable = true\nport = {port}"]
    lines += ['[instance.control]\nstart = "demand"']
    lines += [f"[instance.server]\nmodel = '{gguf}'\nctx_size = 512\nthreads = 1"]
    for name in NAMES:
        template = f"{name}:{{{{ messages[0].content }}}}"
        lines += [f'[instance.{name}.server]\nport = {free_port()}\nchat_template = "{template}"']
    file.write_text("\n\n".join(lines), encoding="utf-8")
    made = Site(doit, file, port)
    try:
        yield made
    finally:
        made("down")
    assert not marker.marked(made.at)


def test_six_models_in_a_budget_for_two(site: Site) -> None:
    seed = random.randrange(1000)
    print(f"seed {seed}")
    said = site("up")
    assert all(f"{name}: asleep; a request at the gateway loads it" in said for name in NAMES)
    end, errors, answers = time.monotonic() + SECONDS, list[str](), list[str]()
    most, at_once = 0, 0

    def ask(number: int) -> None:
        chance = random.Random(seed * 100 + number)
        names = [NAMES[number % len(NAMES)]]  # each is asked for, however few have their turn
        while time.monotonic() < end:
            name = names.pop() if names else chance.choice(NAMES)
            if chance.random() < 0.5:
                answer = site.ask("/apply-template", name)
                is_right = answer.status_code == 200 and answer.json()["prompt"] == f"{name}:hello"
            else:
                stream = chance.random() < 0.5
                answer = site.ask("/v1/chat/completions", name, max_tokens=8, stream=stream)
                is_right = answer.status_code == 200 and f'"model":"{name}"' in answer.text
                is_right &= not stream or answer.text.rstrip().endswith("[DONE]")
            answers.append(name)
            if not is_right:
                errors.append(f"{name}: {answer.status_code} {answer.text[:500]}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, site.kernel_bytes())
        at_once = max(at_once, len(site.running()))
        time.sleep(0.05)
    assert errors == []
    assert set(answers) == set(NAMES), f"nobody starves: {answers}"
    assert 0 < most <= BUDGET
    rows = site.rows()
    assert all(rows[name]["load_seconds"] and rows[name]["last_use"] for name in NAMES)
    assert "asleep" in {rows[name]["state"] for name in NAMES}


def test_loading_by_name(site: Site) -> None:
    site("up")
    assert "loaded one" in site("load", "name=one")
    assert site.running() == ["one"]
    answer = httpx2.post(f"{site.url}/models/load", json={"model": "two"}, timeout=30)
    assert answer.json() == {"success": True}
    wait_for(lambda: ("two", "ready") in [(row["model"], row["state"]) for row in running(site)])
    assert "unloaded one" in site("unload", "name=one")
    listed = httpx2.get(f"{site.url}/v1/models", timeout=30).json()["data"]
    states = {model["id"]: model["status"]["value"] for model in listed}
    assert (states["one"], states["two"]) == ("unloaded", "loaded")
    assert httpx2.get(f"{site.url}/health", timeout=30).json()["status"] == "ok"
    unload = {"model": "two"}
    assert httpx2.post(f"{site.url}/models/unload", json=unload, timeout=30).json()["success"]
    wait_for(lambda: not site.running(), 30)
    again = httpx2.post(f"{site.url}/models/unload", json=unload, timeout=30)
    assert again.status_code == 400 and "the model is not loaded" in again.text
    assert site.ask("/v1/chat/completions", "three", max_tokens=1).status_code == 200
    other = {"Sec-Fetch-Site": "cross-site"}
    assert httpx2.get(f"{site.url}/unload", headers=other, timeout=30).status_code == 403
    assert httpx2.get(f"{site.url}/unload", timeout=30).text == "OK"
    wait_for(lambda: not site.running(), 30)
    assert "name=seven: there is no such instance" in site("load", "name=seven", status=3)
    assert "name=… is one of one, two" in site("unload", status=3)


def test_one_that_is_started_beside_the_others_leaves_them_their_budget(site: Site) -> None:
    boot = '[instance.one.control]\nstart = "boot"\n\n[instance.one.server]'
    text = site.file.read_text(encoding="utf-8").replace("[instance.one.server]", boot)
    site.file.write_text(text, encoding="utf-8")
    site("up")
    before = state.read_wanted(site.at)
    assert before and before.memory and before.saved_slots
    site("down", "name=one")
    site("up", "name=one")
    now = state.read_wanted(site.at)
    assert now and {**now.needs} == {**before.needs}
    assert (now.memory, now.swap_wait) == (before.memory, before.swap_wait)
    assert now.saved_slots == before.saved_slots


def test_a_conversation_survives_an_unload(site: Site) -> None:
    site("up")
    words = " ".join(f"word {number}" for number in range(40))
    said = [{"role": "user", "content": words}]
    first = site.ask("/v1/chat/completions", "one", messages=said, max_tokens=4, temperature=0)
    evaluated = first.json()["timings"]["prompt_n"]
    assert evaluated > 100
    site("unload", "name=one")
    folder = site.at.path / "slots" / "one"
    (saved,) = folder.glob("*.slot")
    assert saved.stat().st_size > 1000 and folder.stat().st_mode & 0o77 == 0
    site("load", "name=one")
    again = site.ask("/v1/chat/completions", "one", messages=said, max_tokens=4, temperature=0)
    assert again.json()["timings"]["prompt_n"] < 10, "the rest was restored"
    assert again.json()["choices"] == first.json()["choices"]
    site("unload", "name=one")
    saved = next(folder.glob("*.slot"))
    saved.write_bytes(saved.read_bytes()[:500])  # as a full disk may leave it
    third = site.ask("/v1/chat/completions", "one", messages=said, max_tokens=4, temperature=0)
    assert third.json()["timings"]["prompt_n"] == evaluated
    assert third.json()["choices"] == first.json()["choices"]
    site("down")
    assert not folder.exists(), "nobody asked to keep them"


def test_every_model_on_disk(site: Site, gguf: Path) -> None:
    folder = site.doit.home / "models" / "gguf" / "org__stored__0123456789ab"
    folder.mkdir(parents=True)
    stored = Path(shutil.copy(gguf, folder / "stored.Q8_0.gguf"))
    receipts.change(stored, receipts.stamp(stored, {"step": "fetch"}, seconds=1))
    port = site.url.rpartition(":")[2]
    site.file.write_text(
        f'[master]\ninstances = "models"\n[gateway]\nenable = true\nport = {port}\n'
        f"[instance.stored.server]\nport = {free_port()}\nctx_size = 512\n",
        encoding="utf-8",
    )
    assert "stored: asleep; a request at the gateway loads it" in site("up")
    answer = site.ask("/v1/chat/completions", "stored", max_tokens=2)
    assert answer.json()["model"] == "stored"


@pytest.mark.slow
def test_loading_in_the_dashboard(site: Site, browser: Chrome) -> None:
    site("up")
    browser.get(f"{site.url}/dashboard")
    wait_for(lambda: browser.find_elements("id", "Load-three"), 60)
    press(browser, "#Load-three", "\n")
    wait_for(lambda: browser.find_elements("id", "Unload-three"), 60)
    assert site.running() == ["three"]
    site.ask("/v1/chat/completions", "three", max_tokens=4)
    wait_for(lambda: "4" in seen(browser, "#requests td"), 30)
    press(browser, "#Unload-three", "\n")
    wait_for(lambda: browser.find_elements("id", "Load-three"), 60)
    assert site.running() == [] and script_errors(browser) == []


def running(site: Site) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = httpx2.get(f"{site.url}/running", timeout=30).json()["running"]
    return rows


def test_what_never_fits_is_said_at_once(site: Site) -> None:
    text = site.file.read_text(encoding="utf-8")
    huge = text.replace("[instance.six.server]", "[instance.six.server]\nctx_size = 200000")
    site.file.write_text(huge, encoding="utf-8")
    assert "six can never be loaded: it needs" in site("up")
    began = time.monotonic()
    answer = site.ask("/v1/chat/completions", "six")
    assert answer.status_code == 507 and time.monotonic() - began < 60
    assert "models may take 190.0 MB" in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"
    boot = huge.replace('start = "demand"', 'start = "boot"\nidle_timeout = 60')
    site.file.write_text(boot, encoding="utf-8")
    refused = site("up", status=3)
    assert "one, two, three, four, five, six are loaded together and take" in refused
    assert 'start = "demand"' in refused
    assert json.loads(json.dumps(site.rows()))["six"]["reason"].startswith("it needs")
