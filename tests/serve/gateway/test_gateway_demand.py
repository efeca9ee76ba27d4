"""Requests for models that are not loaded: what the supervisor is told, what clients get."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from conftest import wait_for
from gateway_tools import Site, site, stop

from pipeline.serve.gateway.demand import Demand
from pipeline.serve.gateway.servers import View
from pipeline.serve.supervisor import liveness
from pipeline.serve.supervisor.state import Order, ServerStatus, read_wanted
from pipeline.serve.supervisor.usage import Gateways, ServerUse


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as one:
        yield one


def use(here: Site, name: str) -> ServerUse:
    gateways = Gateways(here.at)
    gateways.read()
    return gateways.use(name)


def asks(here: Site, **body: Any) -> tuple[threading.Thread, list[httpx2.Response]]:
    """A request in a thread, and where its answer will be."""
    answers: list[httpx2.Response] = []
    message = {"messages": [], **body}
    thread = threading.Thread(
        target=lambda: answers.append(here.post("/v1/chat/completions", message))
    )
    thread.start()
    return thread, answers


def says(here: Site, name: str, state: str, **more: Any) -> None:
    here.seen[name] = ServerStatus(name=name, state=state, asked=here.asked, **more)
    here.write()


def once_it_waits(here: Site, state: str, **more: Any) -> None:
    """A second after a request for `chat` has come, which then was shown signs of life."""

    def change() -> None:
        wait_for(lambda: use(here, "chat").waiting)
        time.sleep(1)
        says(here, "chat", state, **more)

    threading.Thread(target=change).start()


def test_the_supervisor_is_told_who_waits_and_who_is_in_use(here: Site) -> None:
    here.upstream("chat", state="asleep", start="demand")
    here.gateway()
    before = time.monotonic()
    thread, answers = asks(here, model="chat", keep_alive="5m", do={"slow": 1.0})
    told = wait_for(lambda: (now := use(here, "chat")).waiting and now)
    assert told.waiting == 1 and before - 1 < told.since < time.monotonic() and not told.in_flight
    says(here, "chat", "ready", ready_at=7.0)
    wait_for(lambda: use(here, "chat").in_flight == 1)
    assert not use(here, "chat").waiting
    says(here, "chat", "unloading", ready_at=7.0)
    wait_for(lambda: has_left(here, 7.0) is False and closed(here) == 7.0)
    thread.join()
    assert answers[0].status_code == 200, "what it had begun it ends"
    wait_for(lambda: has_left(here, 7.0))
    told = use(here, "chat")
    assert told.keep == 300 and told.last > before
    assert told.recent > told.last + 5, "a use that begins and one that ends are two"
    thread, answers = asks(here, model="chat")
    wait_for(lambda: use(here, "chat").waiting)  # it gets no new ones
    says(here, "chat", "ready", ready_at=8.0)
    thread.join()
    assert answers[0].status_code == 200 and use(here, "chat").last
    wait_for(lambda: use(here, "chat").keep is None)
    stop(here.processes["gateway"])
    assert not list(here.at.usage.iterdir())


def closed(here: Site) -> float | None:
    gateways = Gateways(here.at)
    gateways.read()
    return next((usage.servers["chat"].closed for usage in gateways.usages), None)


def has_left(here: Site, ready_at: float) -> bool:
    gateways = Gateways(here.at)
    gateways.read()
    return gateways.have_left("chat", ready_at, 0)


def test_a_question_that_must_not_load_it(here: Site) -> None:
    here.add("chat", state="asleep", start="demand")
    here.gateway()
    for path in ("/props?model=chat&autoload=false", "/props?model=chat&autoload=0"):
        answer = here.get(path)
        assert answer.status_code == 400 and "not loaded" in answer.text
    assert not use(here, "chat").waiting


def test_a_client_that_leaves_waits_no_more(here: Site) -> None:
    here.add("chat", state="asleep", start="demand")
    here.gateway()
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{here.url}/v1/completions", json={"model": "chat"}, timeout=1)
    wait_for(lambda: use(here, "chat").waiting == 0)


def test_requests_that_wait_learn_of_a_change_at_once(here: Site) -> None:
    here.add("chat", state="asleep", start="demand")
    demand = Demand(View(here.at), Counter())

    async def change() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(demand.report)
            await anyio.sleep(0.2)
            changed = demand.changed
            assert not changed.is_set(), "nothing has"
            says(here, "chat", "ready")
            with anyio.fail_after(30):
                await changed.wait()
            assert demand.changed is not changed, "the next change has an event of its own"
            group.cancel_scope.cancel()

    anyio.run(change)


def test_where_nothing_is_unloaded_nothing_is_written(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    assert here.chat("chat").status_code == 200
    time.sleep(0.3)
    assert not here.at.usage.exists()


def test_what_can_never_be_loaded_is_refused_at_once(here: Site) -> None:
    import openai  # takes two seconds

    here.add("huge", start="demand", aliases=("m",))
    problem = "it needs 9.0 GB of ram; models may take 8.0 GB"
    says(here, "huge", "asleep", problem=problem)
    here.gateway()
    answer = here.chat("m")
    assert answer.status_code == 507 and answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["message"] == f"huge cannot be loaded: {problem}"
    assert here.get("/health").status_code == 503
    assert here.get("/v1/models/m").json()["state"] == "asleep"
    with (
        openai.OpenAI(base_url=f"{here.url}/v1", api_key="x") as client,
        pytest.raises(openai.InternalServerError),
    ):
        client.chat.completions.create(model="m", messages=[])
    refused = here.metric('llama_gateway_requests_total{instance="",status="507"}')
    assert refused == 2, "it is not retried"


def test_a_stream_that_waits_shows_signs_of_life(here: Site) -> None:
    import openai

    here.upstream("chat", state="asleep", start="demand", aliases=("m",))
    here.gateway(comment_seconds=0.2)
    with (
        openai.OpenAI(base_url=f"{here.url}/v1", api_key="x", timeout=60) as client,
        httpx2.stream(
            "POST",
            f"{here.url}/v1/chat/completions",
            json={"model": "m", "messages": [], "stream": True, "do": {"chunks": 3}},
            timeout=60,
        ) as raw,
    ):
        assert raw.status_code == 200 and raw.headers["content-type"] == "text/event-stream"
        assert raw.headers["x-accel-buffering"] == "no", "or nginx would keep the signs back"
        lines = raw.iter_lines()
        for _ in range(3):
            assert next(line for line in lines if line).startswith(": waiting until")
        says(here, "chat", "ready", ready_at=1.0)
        rest = [line for line in lines if line.startswith("data: ")]
        assert len(rest) >= 3
        says(here, "chat", "asleep")
        once_it_waits(here, "ready", ready_at=2.0)
        do: Any = {"do": {"chunks": 3}}
        stream = client.chat.completions.create(model="m", messages=[], stream=True, extra_body=do)
        assert len(list(stream)) >= 2
    answer = here.chat("m")
    assert answer.status_code == 200, "the connection goes on"


def test_an_error_after_a_sign_of_life_is_an_event(here: Site) -> None:
    import openai

    here.add("chat", state="asleep", start="demand")
    here.gateway(comment_seconds=0.1)
    once_it_waits(here, "failed", reason="out of memory")
    with openai.OpenAI(base_url=f"{here.url}/v1", api_key="x", timeout=60) as client:
        stream = client.chat.completions.create(model="chat", messages=[], stream=True)
        with pytest.raises(openai.APIError, match="out of memory"):
            list(stream)
    assert here.metric('llama_gateway_requests_total{instance="",status="503"}') == 1


OLLAMA = {"choices": [{"delta": {"content": "ab"}, "finish_reason": None}]}


def test_signs_of_life_for_clients_of_ollama(here: Site) -> None:
    """An empty object from time to time, which its own client takes for a piece of the answer."""
    import ollama

    here.upstream(
        "chat", "--chunks", 3, "--reply", json.dumps(OLLAMA), state="asleep", start="demand"
    )
    here.gateway(comment_seconds=0.2)
    turns = [{"role": "user", "content": "hello"}]
    with ollama.Client(here.url, timeout=5) as client:
        stream = iter(client.chat("chat", turns, stream=True))
        waited = [next(stream) for _ in range(3)]
        assert [(part.message.content, part.done) for part in waited] == [("", False)] * 3
        says(here, "chat", "ready", ready_at=1.0)
        *parts, last = stream
        assert "".join(part.message.content or "" for part in parts) == "ababab"
        assert last.done and last.load_duration and last.load_duration > 400_000_000

        says(here, "chat", "asleep")
        generated = iter(client.generate("chat", "hello", stream=True))
        assert next(generated).response == ""
        with ThreadPoolExecutor() as pool:  # a client that wants one object gets no sign
            whole = pool.submit(client.chat, "chat", turns)
            wait_for(lambda: here.metric("llama_gateway_held") == 2)
            says(here, "chat", "ready", ready_at=2.0)
            assert whole.result().message.content == "ababab"
        assert "".join(part.response for part in generated) == "ababab"

        says(here, "chat", "asleep")
        stream = iter(client.chat("chat", turns, stream=True))
        assert next(stream).message.content == ""
        says(here, "chat", "failed", reason="out of memory")
        with pytest.raises(ollama.ResponseError, match="out of memory"):
            list(stream)


def test_of_two_with_one_alias_the_one_that_loads_is_waited_for(here: Site) -> None:
    for name in ("a", "b"):
        here.add(name, state="asleep", start="demand", aliases=("m",))
    here.gateway()
    first, _ = asks(here, model="m")
    wait_for(lambda: use(here, "a").waiting)
    says(here, "b", "loading")
    second, _ = asks(here, model="m")
    wait_for(lambda: use(here, "b").waiting == 2 and not use(here, "a").waiting)
    says(here, "a", "failed")
    says(here, "b", "failed")
    first.join()
    second.join()


def test_one_that_sleeps_with_its_process_is_stopped_by_hand(here: Site) -> None:
    here.add("vllm", start="demand", state="asleep")
    here.add("gone", start="demand", state="asleep")
    says(here, "vllm", "asleep", pid=os.getpid())
    here.gateway()
    unload = {"keep_alive": 0}
    with liveness.only_supervisor(here.at) as is_only:
        assert is_only
        for path, body in (
            ("/models/unload", {}),
            ("/unload", {}),
            ("/api/generate", unload),
            ("/api/chat", unload),
        ):
            before = orders(here)
            assert here.post(path, {"model": "vllm", **body}).status_code == 200
            after = orders(here)
            assert after.keys() == {"vllm"} and not after["vllm"].loads
            assert after != before, path
        assert here.post("/models/unload", {"model": "gone"}).status_code == 400
        assert here.post("/api/chat", {"model": "gone", **unload}).status_code == 200
    assert orders(here) == after, "what has no process is left alone"


def orders(here: Site) -> Mapping[str, Order]:
    wanted = read_wanted(here.at)
    return wanted.orders if wanted else {}


def test_one_that_failed_is_loaded_by_hand(here: Site) -> None:
    here.add("chat", start="demand", state="failed")
    here.add("boot", state="failed")
    here.gateway()
    with liveness.only_supervisor(here.at) as is_only:
        assert is_only
        assert here.post("/models/load", {"model": "chat"}).json() == {"success": True}
        assert here.post("/models/load", {"model": "boot"}).status_code == 400
    wanted = read_wanted(here.at)
    assert wanted and {name: each.loads for name, each in wanted.orders.items()} == {"chat": True}
