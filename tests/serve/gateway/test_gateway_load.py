"""1,000 idle connections and 200 streams at once: none is dropped, none gets another's events."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from statistics import median

import psutil
import pytest
from gateway_tools import Site, site

from pipeline.serve.gateway.app import KEEP_ALIVE_SECONDS

IDLE, STREAMS, REQUESTS = 1_000, 200, 15
SOFT_LIMIT = 1024  # open files that a login shell usually allows
# What a connection may take in the gateway: three times what was measured. An idle one takes 8 KiB
# for its socket and uvicorn's and h11's state; a stream takes 34 KiB for two sockets, the request
# and its task, and what one read brought.
IDLE_BYTES, STREAM_BYTES = 24 * 1024, 100 * 1024
FAIR = 4  # times as many events of others before an answer, with idle connections as without

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
HEALTH = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as made:
        yield made


class Upstream:
    """A server whose streams go on in step with their readers: each event is sent once the one
    before has arrived. So what is counted does not depend on how fast the machine is."""

    def __init__(self) -> None:
        self.arrived: dict[str, asyncio.Event] = {}
        self.sent: dict[str, bytes] = {}
        self.is_over = False

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
            body = json.loads(await reader.readexactly(length)) if length else {}
            if body.get("stream"):
                await self._stream(body["name"], writer)
            else:
                writer.write(WHOLE)
                await writer.drain()

    async def _stream(self, name: str, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        number = 0
        while not self.is_over:
            event = f'data: {{"name": "{name}", "number": {number}}}\n\n'.encode()
            self.sent[name] = self.sent.get(name, b"") + event
            self.arrived[name].clear()
            writer.write(event)
            await self.arrived[name].wait()
            number += 1


class Client:
    """All connections of the test."""

    def __init__(self, port: int, upstream: Upstream) -> None:
        self.port, self.upstream = port, upstream
        self.received: dict[str, bytes] = {}
        self.events = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    def close(self) -> None:
        for writer in self.writers:
            writer.close()

    async def post(self, body: dict[str, object]) -> tuple[asyncio.StreamReader, bytes]:
        """The answer's head, and what its body is read from."""
        reader, writer = await self.connect()
        text = json.dumps({"model": "chat", "messages": [], **body}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
        writer.write(head + b"content-length: %d\r\n\r\n" % len(text) + text)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200"), answer
        return reader, answer

    async def stream(self, name: str) -> None:
        self.upstream.arrived[name] = asyncio.Event()
        self.received[name] = b""
        reader, _ = await self.post({"stream": True, "name": name})
        while size := int(await reader.readline(), 16):
            self.received[name] += await reader.readexactly(size)
            await reader.readline()
            if self.received[name].endswith(b"\n\n"):
                self.events += 1
                self.upstream.arrived[name].set()

    async def wait(self) -> float:
        """How many events of streams came before new requests were answered, as the median."""
        counts = []
        for _ in range(REQUESTS):
            before = self.events
            reader, _ = await self.post({})
            assert await reader.read() == b"{}"
            counts.append(self.events - before)
        return median(counts)


async def health(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEALTH)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_many_connections(here: Site) -> None:
    import resource  # not on Windows

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 3 * (IDLE + 2 * STREAMS):
        pytest.skip(f"this system allows {most} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT_LIMIT, most))
    try:
        here.add("chat")
        here.gateway()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(serve(here))
    assert "Traceback" not in here.output()


async def serve(here: Site) -> None:
    upstream = Upstream()
    port = here.instances["chat"].port
    async with await asyncio.start_server(upstream.answer, "127.0.0.1", port, backlog=STREAMS):
        with closing(Client(here.port, upstream)) as client:
            await many_connections(here, upstream, client)


async def many_connections(here: Site, upstream: Upstream, client: Client) -> None:
    gateway = psutil.Process(here.processes["gateway"].pid)
    await client.wait()
    empty = gateway.memory_info().rss

    names = [f"größe {number}" for number in range(STREAMS)]
    streams = [asyncio.create_task(client.stream(name)) for name in names]
    while client.events < 5 * STREAMS:
        await asyncio.sleep(0.01)
    alone = await client.wait()
    with_streams = gateway.memory_info().rss
    assert with_streams - empty < STREAMS * STREAM_BYTES

    idle = {}
    for _ in range(IDLE):
        connection = await client.connect()
        await health(*connection)
        idle[connection] = time.monotonic()
    beside = await client.wait()
    assert beside <= FAIR * max(alone, STREAMS), (alone, beside)
    with_idle = gateway.memory_info().rss
    assert with_idle - with_streams < IDLE * IDLE_BYTES

    assert not any(task.done() for task in streams), "none was dropped"
    upstream.is_over = True
    await asyncio.gather(*streams)
    for name in names:
        assert client.received[name] == upstream.sent[name], name
    for connection, since in reversed(idle.items()):
        if time.monotonic() - since < KEEP_ALIVE_SECONDS / 2:  # on a slow machine some are older
            await health(*connection)
    assert here.metric('llama_gateway_failures_total{instance="chat"}') == 0
