"""The relay of a replica: what carries no lease does not reach the server, and a lease is over with
its connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from pipeline.deploy.ray import relay as relays
from pipeline.deploy.ray.relay import HEADER, Relay

HOST = "127.0.0.1"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@asynccontextmanager
async def relayed(on_socket: Path | None = None) -> AsyncIterator[tuple[Relay, list[bytes]]]:
    """A relay before a server that answers each request, and what the server got."""
    got: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                got.append(data)
                writer.write(ANSWER)
        await end(writer)

    if on_socket:
        server = await asyncio.start_unix_server(serve, on_socket)
        relay = Relay(lambda: str(on_socket))
    else:
        server = await asyncio.start_server(serve, HOST, 0)
        relay = Relay(lambda: server.sockets[0].getsockname())
    async with server:
        await relay.listen(HOST)
        yield relay, got
        await closed(relay)


async def closed(relay: Relay) -> None:
    """Close it, and let what it had open end."""
    relay.close()
    while relay.connections:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)


async def end(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def ask(relay: Relay, key: str) -> tuple[bytes, asyncio.StreamWriter]:
    """The head of an answer, and the connection that stays open."""
    reader, writer = await asyncio.open_connection(HOST, relay.port)
    writer.write(f"GET / HTTP/1.1\r\nHost: x\r\n{HEADER}: {key}\r\n\r\n".encode())
    return await asyncio.wait_for(reader.readuntil(b"\r\n"), 10), writer


def run(check: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(check(), 30))  # type: ignore[arg-type]


@pytest.mark.parametrize("is_socket", [False, True])
def test_a_request_with_a_lease_goes_through(tmp_path: Path, is_socket: bool) -> None:
    async def check() -> None:
        async with relayed(tmp_path / "s" if is_socket else None) as (relay, got):
            with relay.lease() as lease:
                status, writer = await ask(relay, lease.key)
                assert status == b"HTTP/1.1 200 OK\r\n"
                assert len(got) == 1
                assert not lease.over.is_set()
                await end(writer)
                await asyncio.wait_for(lease.over.wait(), 10)

    run(check)


def test_what_carries_no_lease_is_refused() -> None:
    async def check() -> None:
        async with relayed() as (relay, got):
            with relay.lease() as lease:
                for key in ("", "wrong", "ü", lease.key[:-1]):
                    status, writer = await ask(relay, key)
                    assert status == b"HTTP/1.1 401 Unauthorized\r\n"
                    await end(writer)
            status, writer = await ask(relay, lease.key)  # given back
            assert status == b"HTTP/1.1 401 Unauthorized\r\n"
            await end(writer)
            assert got == []
            status, writer = await ask(relay, relay.key)
            assert status == b"HTTP/1.1 200 OK\r\n"
            await end(writer)

    run(check)


def test_a_lease_is_for_one_connection() -> None:
    async def check() -> None:
        async with relayed() as (relay, _):
            with relay.lease() as lease:
                _, first = await ask(relay, lease.key)
                status, second = await ask(relay, lease.key)
                assert status == b"HTTP/1.1 401 Unauthorized\r\n"
                assert not lease.over.is_set()
                await end(first)
                second.close()

    run(check)


def test_the_end_of_a_lease_cuts_its_connection() -> None:
    async def check() -> None:
        async with relayed() as (relay, _):
            reader, writer = await asyncio.open_connection(HOST, relay.port)
            with relay.lease() as lease:
                head = f"GET / HTTP/1.1\r\nHost: x\r\n{HEADER}: {lease.key}\r\n\r\n"
                writer.write(head.encode())
                assert await reader.read(len(ANSWER))
            with suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(1), 10) == b""
            await end(writer)

    run(check)


def test_a_lease_that_nobody_uses_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "UNUSED_SECONDS", 0.05)

    async def check() -> None:
        async with relayed() as (relay, _):
            with relay.lease() as lease:
                await asyncio.wait_for(lease.over.wait(), 10)
                status, writer = await ask(relay, lease.key)
                assert status == b"HTTP/1.1 401 Unauthorized\r\n"
                await end(writer)

    run(check)


def test_while_the_server_is_away_the_answer_is_that_it_loads(tmp_path: Path) -> None:
    async def check() -> None:
        relay = Relay(lambda: str(tmp_path / "nothing"))
        await relay.listen(HOST)
        with relay.lease() as lease:
            status, writer = await ask(relay, lease.key)
            assert status == b"HTTP/1.1 503 Service Unavailable\r\n"
            await end(writer)
        await closed(relay)

    run(check)
