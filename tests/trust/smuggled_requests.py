"""Requests that two readers could take for different ones, and odd ones that are right."""

from __future__ import annotations

from serve.guard.test_guard_relay import head

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = b'{"content": "a"}'
HIDDEN = b'{"content":\r\n\r\n"GET /smuggled HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n"}'
LENGTH = f"Content-Length: {len(BODY)}"
POST = "POST /tokenize HTTP/1.1"
CHUNKED = "Transfer-Encoding: chunked"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# Each hides a second request in the first for whoever reads it in another way.
ATTACKS: dict[str, bytes] = {
    "CL.TE": head(POST, f"Content-Length: {5 + len(SMUGGLED)}", CHUNKED) + b"0\r\n\r\n" + SMUGGLED,
    "TE.CL": head(POST, CHUNKED, "Content-Length: 4") + chunk(SMUGGLED) + b"0\r\n\r\n",
    "TE twice": head(POST, CHUNKED, "Transfer-Encoding: identity", LENGTH) + BODY + SMUGGLED,
    "TE in odd spelling": head(POST, "Transfer-Encoding: xchunked", LENGTH) + BODY + SMUGGLED,
    "TE with a tab": head(POST, "Transfer-Encoding:\tchunked", "Content-Length: 4")
    + chunk(SMUGGLED),
    "TE behind a blank": head(POST, "Transfer-Encoding : chunked", LENGTH) + BODY + SMUGGLED,
    "TE behind a line": head(POST, "X: y\nTransfer-Encoding: chunked", LENGTH) + BODY + SMUGGLED,
    "TE behind a return": head(POST, "X: y\rTransfer-Encoding: chunked", LENGTH) + BODY + SMUGGLED,
    "two lengths": head(POST, "Content-Length: 0", LENGTH) + SMUGGLED[: len(BODY)] + SMUGGLED,
    "a list of lengths": head(POST, "Content-Length: 0, 16") + SMUGGLED,
    "a length with a sign": head(POST, "Content-Length: +0") + SMUGGLED,
    "a length in hex": head(POST, "Content-Length: 0x10") + BODY + SMUGGLED,
    "a length of two words": head(POST, "Content-Length: 0 16") + BODY + SMUGGLED,
    "a length that overflows": head(POST, f"Content-Length: {2**64 + 16}") + BODY + SMUGGLED,
    "a folded line": head(POST, "Content-Length:\r\n 0", "X: y") + SMUGGLED,
    "a folded name": head(POST, "X: y\r\n Content-Length: 3") + SMUGGLED,
    "bare line feeds": b"GET /health HTTP/1.1\nHost: localhost\n\n" + SMUGGLED,
    "a line feed ends the head": b"GET /health HTTP/1.1\r\nHost: localhost\n\n" + SMUGGLED,
    "NUL in a name": head(POST, "Content-\0Length: 3", LENGTH) + BODY + SMUGGLED,
    "NUL in a value": head(POST, "X: a\0b", LENGTH) + BODY + SMUGGLED,
    "NUL in the target": head("GET /health\0/x HTTP/1.1") + SMUGGLED,
    "a chunk's size overflows": head(POST, CHUNKED) + b"1" + b"0" * 16 + b"\r\n" + SMUGGLED,
    "a negative chunk": head(POST, CHUNKED) + b"-1\r\n" + SMUGGLED,
    "a chunk with 0x": head(POST, CHUNKED) + b"0x10\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED,
    "a chunk that is longer": head(POST, CHUNKED) + b"2\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED,
    "a chunk ends in a line feed": head(POST, CHUNKED) + b"10\n" + BODY + b"\n0\n\n" + SMUGGLED,
    "an extension over lines": head(POST, CHUNKED)
    + b"10;a\nb\r\n"
    + BODY
    + b"\r\n0\r\n\r\n"
    + SMUGGLED,
    "chunks in HTTP/1.0": head("POST /tokenize HTTP/1.0", CHUNKED, LENGTH) + BODY + SMUGGLED,
    "HTTP/0.9": b"GET /smuggled\r\n\r\n",
    "no version": b"GET /smuggled HTTP\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SMUGGLED,
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
    "two hosts": head("GET /smuggled HTTP/1.1", "Host: evil.example"),
    "another's host": head("GET /smuggled HTTP/1.1", host="evil.example"),
    "a host with a user": head("GET /smuggled HTTP/1.1", host="localhost@evil.example"),
    "a header without a name": head(POST, ": x", LENGTH) + BODY + SMUGGLED,
    "a header without a colon": head(POST, "X", LENGTH) + BODY + SMUGGLED,
    "a huge head": b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 300_000,
    "many headers": head("GET /smuggled HTTP/1.1", *(f"X{n}: y" for n in range(5000))),
    "a body of OPTIONS": head("OPTIONS /x HTTP/1.1", f"Content-Length: {len(SMUGGLED)}") + SMUGGLED,
    "a body of GET": head("GET /health HTTP/1.1", f"Content-Length: {len(SMUGGLED)}") + SMUGGLED,
    # llama-server reads 4 KiB at once, and drops what of them is not of the first request
    **{
        f"{size} bytes behind a request": head("GET /health HTTP/1.1")
        + head(POST, f"Content-Length: {size + len(SMUGGLED)}")
        + b" " * size
        + SMUGGLED
        for size in (4096, 8192, 16384)
    },
    "aligned": (head("GET /health HTTP/1.1") + head(POST, "Content-Length: 9000")).ljust(4096)
    + SMUGGLED.ljust(9000),
    "CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n" + SMUGGLED,
}
# Odd, and still one request each, or several that are meant: what they are for llama-server.
GOOD: dict[str, tuple[bytes, list[str]]] = {
    "a body": (head(POST, LENGTH) + BODY, ["/tokenize"]),
    "chunks": (head(POST, CHUNKED) + chunk(BODY) + b"0\r\n\r\n", ["/tokenize"]),
    "extensions and trailers": (
        head(POST, CHUNKED) + b'10;a="b"\r\n' + BODY + b"\r\n0;c\r\nHost: evil.example\r\n\r\n",
        ["/tokenize"],
    ),
    "a body that looks like a request": (
        head(POST, f"Content-Length: {len(HIDDEN)}") + HIDDEN,
        ["/tokenize"],
    ),
    "one behind the other": (
        head("GET /health HTTP/1.1") + head(POST, LENGTH) + BODY + head("GET /health HTTP/1.1"),
        ["/health", "/tokenize", "/health"],
    ),
    "an expectation": (head(POST, LENGTH, "Expect: 100-continue") + BODY, ["/tokenize"]),
    "an offer to upgrade": (
        head(POST, LENGTH, "Connection: Upgrade", "Upgrade: h2c") + BODY,
        ["/tokenize"],
    ),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", ["/health"]),
    "a host with a port": (head("GET /health HTTP/1.1", host="localhost:1"), ["/health"]),
    "a path with dots": (head("GET /x/../health HTTP/1.1"), ["/x/../health"]),
}
