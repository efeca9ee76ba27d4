"""Every public class of flaw in parsers of GGUF and safetensors, as files: a name, what the check
says of it, and the file's bytes. What is long is mostly a hole."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fakes.raw_gguf import ARRAY, TEXT, UINT32, Pair, array, number, raw, tensor, text, whole


class Flaw(NamedTuple):
    """`parts` are bytes and where they are; the file has `size` bytes, or ends with the last."""

    said: str
    parts: tuple[tuple[int, bytes], ...]
    size: int = 0

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            for at, data in self.parts:
                file.seek(at)
                file.write(data)
            if self.size:
                file.truncate(self.size)


def flaw(said: str, data: bytes, size: int = 0) -> Flaw:
    return Flaw(said, ((0, data),), size)


# GGUF


def u64(value: int) -> bytes:
    return struct.pack("<Q", value % (1 << 64))


def head(version: int = 3, tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<I", version) + u64(tensors) + u64(pairs)


def pairs(said: str, *values: Pair) -> Flaw:
    return flaw(said, whole(raw(*values)))


def table(said: str, *entries: bytes, data: int = 4096) -> Flaw:
    return flaw(said, whole(raw(tensors=b"".join(entries), count=len(entries)), data))


def template(text_of_it: str) -> Flaw:
    return pairs("nested too deep", ("tokenizer.chat_template", TEXT, text(text_of_it)))


def long_texts() -> Flaw:
    """6 GB: a hundred texts of 60 MB, none of which is needed."""
    parts, at, length = [(0, head(pairs=100))], 24, 60_000_000
    for n in range(100):
        pair = text(f"general.text{n}") + number(TEXT) + u64(length)
        parts.append((at, pair))
        at += len(pair) + length
    return Flaw("header is longer than", tuple(parts), at)


def architecture(name: str) -> Pair:
    return "general.architecture", TEXT, text(name)


DEEP = 200_000
NESTED = 30_000  # for a template of less than 1 MiB
MANY = 1_000_000
ONE = ("a", UINT32, number(1))

GGUF = {
    # The start
    "empty": flaw("is empty", b""),
    "magic": flaw("does not start with GGUF", b"GGML is not a GGUF, it is older"),
    "magic cut": flaw("ends inside", b"GG"),
    "version 0": flaw("version 0", head(0)),
    "version 1": flaw("version 1", head(1)),
    "version 4": flaw("version 4", head(4)),
    "version huge": flaw("version 4294967295", head(0xFFFFFFFF)),
    "big-endian": flaw("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(64)),
    "counts cut": flaw("ends inside", head()[:20]),
    "tensors 2^63": flaw("claims", head(tensors=1 << 63)),
    "tensors -1": flaw("claims", head(tensors=-1)),
    "tensors missing": flaw("ends inside", head(tensors=3)),
    "a million tensors": flaw("claims 1000000 tensors", head(tensors=MANY), 80 * MANY),
    "pairs 2^63": flaw("claims", head(pairs=1 << 63)),
    "pairs missing": flaw("ends inside", head(pairs=3)),
    "a million pairs": flaw("claims 1000000 values", head(pairs=MANY), 20 * MANY),
    # Keys
    "key twice": pairs("the key a twice", ONE, ("b", UINT32, number(1)), ONE),
    "key empty": pairs("key of no bytes", ("", UINT32, number(1))),
    "key with a zero": pairs("zero byte", ("general.alignment\0", UINT32, number(64))),
    "key long": pairs("in one key", ("k" * 70_000, UINT32, number(1))),
    "key past the end": flaw("ends inside", head(pairs=1) + u64(500) + b"k"),
    "key of 2^64 - 1": flaw("claims", head(pairs=1) + u64(-1) + b"k" * 100),
    "key that wraps around": flaw("claims", head(pairs=1) + u64(-8) + b"k" * 100),
    # Values
    "value type 13": pairs("value type 13", ("a", 13, bytes(8))),
    "value type -1": pairs("value type 4294967295", ("a", 0xFFFFFFFF, bytes(8))),
    "value cut": flaw("ends inside", raw(("a", 10, b"\1"))),
    "text past the end": flaw("claims 60 bytes", raw(("a", TEXT, u64(60) + b"short"))),
    "text of 2^64 - 1": pairs("bytes in one text", ("a", TEXT, u64(-1) + b"short")),
    "text of 5 GB": flaw("header is longer", raw(("a", TEXT, u64(5 * 10**9))), 6 * 10**9),
    "100 texts of 60 MB": long_texts(),
    "many kept texts": pairs(
        "of text", *((f"a{n}", TEXT, text("x" * 1_000_000)) for n in range(3))
    ),
    # Arrays
    "array of arrays": pairs("value type 9", ("a", ARRAY, array(ARRAY, 1, array(4, 1, bytes(4))))),
    "arrays nested deep": pairs("value type 9", ("a", ARRAY, array(ARRAY, 1) * DEEP)),
    "array type 13": pairs("value type 13", ("a", ARRAY, array(13, 1, bytes(8)))),
    "array type -1": pairs("value type", ("a", ARRAY, array(0xFFFFFFFF, 1, bytes(8)))),
    "array past the end": flaw("ends inside", raw(("a", ARRAY, array(4, 100, bytes(99))))),
    "array of 2^64 - 1": pairs("elements in an array", ("a", ARRAY, u64(4)[:4] + u64(-1))),
    "array that overflows": pairs("elements", ("a", ARRAY, number(10) + u64(1 << 61))),
    "array of a billion": flaw("header is longer", raw(("a", ARRAY, array(0, 1 << 30))), 1 << 31),
    "texts past the end": flaw("ends inside", raw(("a", ARRAY, array(TEXT, 9, text("x"))))),
    "texts that wrap around": flaw(
        "ends inside", raw(("a", ARRAY, array(TEXT, 3, u64(-8) * 3))) + bytes(64)
    ),
    "268 million empty tokens": flaw(
        "texts in arrays",
        raw(("tokenizer.ggml.tokens", ARRAY, array(TEXT, 1 << 28))),
        (1 << 31) + 4096,
    ),
    "many arrays of texts": pairs(
        "texts in arrays",
        *((f"a{n}", ARRAY, array(TEXT, 500_000, bytes(4 * MANY))) for n in range(5)),
    ),
    # What llama.cpp aborts at
    "alignment 0": pairs("power of two", ("general.alignment", UINT32, number(0))),
    "alignment 33": pairs("power of two", ("general.alignment", UINT32, number(33))),
    "alignment 2^31": pairs("power of two", ("general.alignment", UINT32, number(1 << 31))),
    "alignment of 64 bits": pairs("value type 10", ("general.alignment", 10, u64(32))),
    "alignment as text": pairs("value type 8", ("general.alignment", TEXT, text("32"))),
    **{
        f"block_count {n}": pairs(
            "block_count is", architecture("llama"), ("llama.block_count", UINT32, number(n))
        )
        for n in (0, 513, 0xFFFFFFFF)
    },
    "block_count as text": pairs(
        "block_count is", ("llama.block_count", TEXT, text("9")), architecture("llama")
    ),
    "expert_count": pairs(
        "expert_count is", architecture("llama"), ("llama.expert_count", UINT32, number(1025))
    ),
    "vocab_size": pairs(
        "vocab_size is", architecture("llama"), ("llama.vocab_size", UINT32, number(0xFFFFFFFF))
    ),
    # Tensors
    "tensor twice": table("the tensor t twice", tensor(), tensor(offset=128)),
    "tensor without name": table("tensor of no bytes", tensor("")),
    "tensor with a zero": table("zero byte", tensor("a\0b")),
    "tensor name of 64": table("claims 64 bytes in a tensor's name", tensor("n" * 64)),
    "tensor name of 2^64 - 1": table("in a tensor's name", u64(-1) + bytes(64)),
    "5 dimensions": table("5 dimensions", tensor(shape=(32, 1, 1, 1, 1))),
    "2^32 - 1 dimensions": table("4294967295 dimensions", text("t") + number(0xFFFFFFFF)),
    "dimension 0": table("a dimension is 0", tensor(shape=(32, 0))),
    "dimension -1": table("too many elements", tensor(shape=((1 << 64) - 1,))),
    "dimensions that overflow": table("too many elements", tensor(shape=(1 << 32, 1 << 31))),
    "dimensions that wrap to 0": table("too many elements", tensor(shape=(1 << 32, 1 << 32))),
    "dimensions that wrap to 32": table("too many", tensor(shape=(32, (1 << 59) + 1, 1, 1))),
    "bytes that overflow": table("cut short", tensor(shape=(1 << 62,))),
    "type that was removed": table("tensor type 4,", tensor(kind=4)),
    "type unknown": table("tensor type 43,", tensor(kind=43)),
    "type -1": table("tensor type 4294967295", tensor(kind=0xFFFFFFFF)),
    "row of half a block": table("no multiple of 32", tensor(shape=(48,), kind=8)),
    "scalar of blocks": table("no multiple of 256", tensor(shape=(), kind=12)),
    "offset not aligned": table("begins at byte 4", tensor(offset=4)),
    "offset before the end": table("begins at byte 96", tensor(), tensor("u", offset=96)),
    "offsets of two in one": table("begins at byte 0", tensor(), tensor("u")),
    "offset behind a gap": table("begins at byte 256", tensor(), tensor("u", offset=256)),
    "offsets out of order": table("begins at byte 128", tensor(offset=128), tensor("u")),
    "offset 2^64 - 32": table("leave gaps", tensor(offset=(1 << 64) - 32)),
    "data cut by a byte": table("cut short", tensor(), data=127),
    "data missing": table("cut short", tensor(shape=(1 << 40,))),
    # Templates: each overflows the stack of llama.cpp
    "template of brackets": template("{{ " + "(" * NESTED + "1" + ")" * NESTED + " }}"),
    "template of lists": template("{{ " + "[" * NESTED + "]" * NESTED + " }}"),
    "template of not": template("{{ " + "not " * NESTED + "1 }}"),
    "template of minus": template("{{ " + "- " * NESTED + "1 }}"),
    "template of sums": template("{{ 1" + "+1" * NESTED + " }}"),
    "template of calls": template("{{ f" + "()" * NESTED + " }}"),
    "template of members": template("{{ f" + ".f" * NESTED + " }}"),
    "template of filters": template("{{ f" + "|trim" * NESTED + " }}"),
    "template of choices": template("{{ 1" + " if 1 else 1" * NESTED + " }}"),
    "template of blocks": template("{% if 1 %}" * NESTED + "{%- endif %}" * NESTED),
    "template of loops": template("{% for a in b %}" * NESTED + "{% endfor %}" * NESTED),
    "template of branches": template("{% if 1 %}" + "{% elif 1 %}" * NESTED + "{% endif %}"),
    "template for tools": pairs(
        "nested too deep", ("tokenizer.chat_template.tool_use", TEXT, text("{{" + "[" * NESTED))
    ),
    "template of 2 MB": pairs(
        "longer than", ("tokenizer.chat_template", TEXT, text("x" * 2 * MANY))
    ),
}


# Safetensors


def file(said: str, header: bytes | Any, data: int = 4, length: int | None = None) -> Flaw:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = u64(len(content) if length is None else length)
    return flaw(said, start + content + bytes(data))


def entry(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32", **more: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def named(said: str, tensors: dict[str, Any] | Iterable[Any], data: int = 4) -> Flaw:
    entries = tensors if isinstance(tensors, dict) else {f"t{n}": t for n, t in enumerate(tensors)}
    return file(said, entries, data)


NO_HEADER = "header is not that"
A = json.dumps(entry()).encode()

SAFETENSORS = {
    "empty": flaw("is empty", b""),
    "length cut": flaw("cut short", b"\2\0\0"),
    "length 0": file("not a safetensors file", b"", 100, 0),
    "length 1": file("not a safetensors file", b"{}", 100, 1),
    "length past the end": file("cut short", b"{}", 4, 7),
    "length of 100 MB and 1": flaw("not a safetensors file", u64(100_000_001) + b"{}", 10**9),
    "length 2^63": file("not a safetensors file", b"{}", 4, 1 << 63),
    "length -1": file("not a safetensors file", b"{}", 4, -1),
    "a hole of 100 MB": flaw("cannot be read", u64(100_000_000), 10**9),
    "no JSON": file("cannot be read", b"{]"),
    "JSON cut": file("cannot be read", b'{"a": {"dtype": "F32"'),
    "not UTF-8": file("cannot be read", b'{"\xff\xfe": 1}'),
    "UTF-16": file("cannot be read", "{}".encode("utf-16")),
    "list": file("not an object", b"[1, 2]"),
    "blank before it": file("not an object", b"  {}", 0),
    "text behind it": file("cannot be read", b"{} {}", 0),
    "JSON nested deep": file("cannot be read", b'{"a":' * DEEP),
    "lists nested deep": file("cannot be read", b'{"a":' + b"[" * DEEP),
    "a million values": file("more values", b'{"a":[' + b"[]," * (3 * MANY) + b"[]]}"),
    "250,000 tensors": file(
        "more values", b"{" + b",".join(b'"%x":%s' % (n, A) for n in range(250_000)) + b"}"
    ),
    "a long number": file("cannot be read", b'{"a": %s}' % (b"9" * MANY)),
    "key twice": file("t is there twice", b'{"t":%s,"t":%s}' % (A, A)),
    "key twice, escaped": file("t is there twice", b'{"t":%s,"\\u0074":%s}' % (A, A)),
    "key twice in a tensor": file("shape is there twice", b'{"t":%s,"shape":[2]}}' % A[:-1]),
    "key twice in metadata": file("a is there twice", b'{"__metadata__":{"a":"","a":""}}', 0),
    "metadata of numbers": file(NO_HEADER, {"__metadata__": {"a": 1}}, 0),
    "metadata of lists": file(NO_HEADER, {"__metadata__": []}, 0),
    "tensor as a number": named(NO_HEADER, [1]),
    "tensor without shape": named(NO_HEADER, [{"dtype": "F32", "data_offsets": [0, 4]}]),
    "tensor with more": named(NO_HEADER, [entry(code="x")]),
    "type unknown": named("has the type Q4", [entry(dtype="Q4")]),
    "type a number": named(NO_HEADER, [entry(dtype=1)]),
    "shape of floats": named(NO_HEADER, [entry([1.0])]),
    "shape of infinity": file(NO_HEADER, b'{"t":%s}' % A.replace(b"[1]", b"[1e999]")),
    "shape of NaN": file(NO_HEADER, b'{"t":%s}' % A.replace(b"[1]", b"[NaN]")),
    "shape of truth": named(NO_HEADER, [entry([True])]),
    "shape negative": named(NO_HEADER, [entry([-1])]),
    "shapes negative": named(NO_HEADER, [entry([-1, -1])]),
    "shape of 2^64": named(NO_HEADER, [entry([1 << 64])]),
    "shape that wraps to 1": named("not what the shape", [entry([(1 << 62) + 1, 4])]),
    "shape of many dimensions": named(NO_HEADER, [entry([1] * 100_000)]),
    "shape too large": named("not what the shape", [entry([2])]),
    "shape too small": named("not what the shape", [entry([1], dtype="F16")]),
    "shape of half a byte": named("not what the shape", [entry([3], [0, 1], "F4")], 1),
    "offsets of floats": named(NO_HEADER, [entry(offsets=[0.0, 4.0])]),
    "offsets negative": named(NO_HEADER, [entry(offsets=[-4, 0])]),
    "offsets swapped": named("ends before it begins", [entry(offsets=[4, 0])]),
    "offsets of 2^64": named(NO_HEADER, [entry(offsets=[0, 1 << 64])]),
    "offsets of three": named(NO_HEADER, [entry(offsets=[0, 2, 4])]),
    "offsets overlap": named("leave gaps", [entry(), entry(offsets=[2, 6])], 6),
    "offsets the same": named("leave gaps", [entry(), entry()]),
    "offsets with a hole": named("leave gaps", [entry(), entry(offsets=[5, 9])], 9),
    "offsets start late": named("leave gaps", [entry(offsets=[4, 8])], 8),
    "data cut": named("header needs", [entry()], 3),
    "data too long": named("header needs", [entry()], 5),
    "data past the end": named("header needs", [entry([1 << 40], [0, 1 << 42])]),
}

INDEX = "model.safetensors.index.json"
INDEXES = {
    **{
        f"index names {name}": ({"weight_map": {"t": name}}, "not a file beside it")
        for name in (
            *("../model.safetensors", "/etc/model.safetensors", "a/../../model.safetensors"),
            *("..\\model.safetensors", "C:model.safetensors", "model.safetensors\0.safetensors"),
        )
    },
    "index names a number": ({"weight_map": {"t": 1}}, "not a file beside it"),
    "index of a list": ({"weight_map": ["model.safetensors"]}, "names no file"),
    "index nested deep": (b'{"weight_map":' * DEEP, "cannot be read as JSON"),
    "index of 34 MB": (b" " * 34 * MANY, "too large"),
}
