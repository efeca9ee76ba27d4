"""A GGUF byte by byte, also such as no writer makes."""

from __future__ import annotations

import struct

Pair = tuple[str | bytes, int, bytes]  # a key, its value's type, and the value
UINT32, TEXT, ARRAY = 4, 8, 9


def raw(*pairs: Pair, tensors: bytes = b"", count: int = 0, version: int = 3) -> bytes:
    """A header of these pairs and the table of `count` tensors."""
    head = b"GGUF" + struct.pack("<IQQ", version, count, len(pairs))
    for key, kind, value in pairs:
        head += text(key) + struct.pack("<I", kind) + value
    return head + tensors


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


def number(value: int) -> bytes:
    """An unsigned one of 32 bits."""
    return struct.pack("<I", value)


def tensor(
    name: str | bytes = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0
) -> bytes:
    """An entry of the table; the length of a row comes first."""
    numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return text(name) + numbers


def whole(header: bytes, data: int = 0, alignment: int = 32) -> bytes:
    """A file with `data` bytes of tensors behind its header."""
    return header + bytes(-len(header) % alignment + data)
