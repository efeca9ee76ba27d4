"""The layout of a GGUF's header, read within bounds whatever the file claims.

It is that of ggml's docs/gguf.md: magic, version, counts, key-value pairs, tensor table, then the
tensors, aligned. Refused is what the pinned llama.cpp refuses (`gguf_init_from_reader` of ggml's
gguf.cpp), what makes it crash, and what no model has. What is skipped is never built.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from operator import gt
from pathlib import Path
from typing import Any

from msgspec import Struct

from pipeline.core.text import size as shown_size

from .contents import Readable, shown
from .quants import TENSOR_BLOCKS, row_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
WINDOW = 1024 * 1024  # bytes that are read at once
ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
MAX_ALIGNMENT = 65_536
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_NAME = 63  # bytes of a tensor's name: GGML_MAX_NAME counts the zero behind it
MAX_ELEMENTS = (1 << 63) - 1  # ggml counts them in an int64_t

NEWEST_TYPE = max(TENSOR_BLOCKS)
MOST_NEWER = 64  # types that llama.cpp may add; a larger number is damage
UNKNOWN_TYPE = f"has the tensor type {{t.kind}}, which is not known: the newest is {NEWEST_TYPE}"

# Bounds that no model comes near.
MAX_HEADER = 256 * 1024 * 1024  # bytes; the largest have some 20 MiB
MAX_PAIRS = 1 << 14
MAX_KEY = 1024  # bytes
MAX_TENSORS = 1 << 16
MAX_TEXTS = 1 << 21  # in all arrays: tokens and merges; the largest have 0.9 million
MAX_TEXT = 1024 * 1024  # bytes; a longer one, such as a whole tokenizer.json, is skipped
MAX_KEPT_TEXT = 2 * 1024 * 1024  # bytes of all texts that are kept
MAX_ARRAY = 1024  # numbers; a value for each layer is kept, a vocabulary never
MAX_KEPT = 65_536  # numbers of all such arrays together

# Value types: struct format by number; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
SCALARS[12] = "d"
UINT32, STRING, ARRAY = 4, 8, 9

TOKENS = "tokenizer.ggml.tokens"
TEMPLATE = "tokenizer.chat_template"  # and TEMPLATE.NAME for others, such as one for tools
# Counts at which llama.cpp aborts (src/llama-hparams.h), or makes a list of that length.
RANGES = {"block_count": (1, 512), "expert_count": (0, 1024), "vocab_size": (0, MAX_TEXTS)}

# llama.cpp parses and runs a template recursively, without a bound: 8 MiB of stack, the usual for
# Linux, are enough for some 2,000 brackets in brackets, and for 8,000 of the others.
MAX_BRACKETS = 100  # nested
MAX_OPERATORS = 1000  # in one tag
MAX_BLOCKS = 100  # nested, and branches of one `if`
TEMPLATE_PART = re.compile(
    r"\{%[-+]?\s*(?P<statement>\w+)|(?P<open>\{\{)|(?P<close>[%}]\})"
    r"|[()\[\]{}.|+*/~<>=!-]|\b(?:not|and|or|if|else|in|is)\b"
)
OPENS = ("if", "for", "macro", "call", "filter")


class Broken(ValueError):
    """The bytes are not the header of a GGUF that can be used. The text says why: `it …`."""


class Newer(Broken):
    """The file may be right: it uses what came after the pinned llama.cpp."""


def padded(count: int, step: int = ALIGNMENT) -> int:
    """The next multiple of `step`, which `count` may be itself."""
    return -(-count // step) * step


class Reader:
    """A position in the header of a file, of which WINDOW bytes are held at a time. Every method
    that reads raises Broken where the header or the file would end first."""

    def __init__(self, file: Readable, at: int = 0) -> None:
        self.file = file
        self.at = at
        self.window = b""
        self.start = at  # of the window
        self.kept = self.kept_text = self.texts = 0

    def move(self, to: int) -> None:
        if to > self.file.size:
            raise Broken("it ends inside its header")
        if to > MAX_HEADER:
            raise Broken(f"its header is longer than {shown_size(MAX_HEADER)}")
        self.at = to

    def take(self, count: int) -> bytes:
        start = self.at
        self.move(start + count)
        if self.at > self.start + len(self.window):
            self.load(start, self.at)
        return self.window[start - self.start : self.at - self.start]

    def load(self, start: int, stop: int) -> None:
        self.window = self.file.get(start, min(self.file.size, max(stop, start + WINDOW)))
        self.start = start

    def scalar(self, form: str) -> Any:
        form = f"<{form}"
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, most: int, what: str) -> int:
        number = int(self.scalar("Q"))
        if number > most:
            raise Broken(f"it claims {number} {what}")
        return number

    def text(self, most: int = MAX_HEADER, what: str = "bytes in one text") -> bytes:
        return self.take(self.count(most, what))

    def value(self) -> str | None:
        """A text as llama.cpp reads it, up to a zero; None where it is too long to be kept."""
        length = self.count(self.file.size, "bytes in one text")
        if length > MAX_TEXT:
            self.move(self.at + length)
            return None
        self.kept_text += length
        if self.kept_text > MAX_KEPT_TEXT:
            raise Broken(f"its values hold more than {shown_size(MAX_KEPT_TEXT)} of text")
        return self.take(length).partition(b"\0")[0].decode("utf-8", "replace")

    def array(self) -> tuple[int, list[Any] | None]:
        """How many elements there are, and the elements where they are a few numbers."""
        kind = self.scalar("I")
        count = self.count(self.file.size, "elements in an array")
        if kind == STRING:
            self.skip_texts(count)
            return count, None
        if kind not in SCALARS:
            raise Broken(f"it holds an array of value type {kind}")
        form = f"<{count}{SCALARS[kind]}"
        width = struct.calcsize("<" + SCALARS[kind])
        if count > MAX_ARRAY or self.kept + count > MAX_KEPT:
            self.move(self.at + count * width)
            return count, None
        self.kept += count
        return count, list(struct.unpack(form, self.take(count * width)))

    def skip_texts(self, count: int) -> None:
        self.texts += count
        if self.texts > MAX_TEXTS:
            raise Broken(f"it claims {self.texts} texts in arrays")
        at, start, window = self.at, self.start, self.window
        for _ in range(count):  # a vocabulary: this loop must be fast
            offset = at - start
            if offset + 8 > len(window):
                self.move(at + 8)
                self.load(at, at + 8)
                offset, start, window = 0, at, self.window
            at += 8 + int.from_bytes(window[offset : offset + 8], "little")
        self.move(at)


class Metadata(Struct, frozen=True, kw_only=True):
    """How many tensors there are, the plain values and short arrays of numbers, how many tokens
    there are, and where the first begins."""

    tensors: int
    values: Mapping[str, Any]
    vocabulary: int
    tokens_at: int

    @property
    def alignment(self) -> int:
        return int(self.values.get("general.alignment", ALIGNMENT))


class TensorInfo(Struct, frozen=True):
    """An entry of the table of tensors. `shape` has the length of a row first; `due` is the offset
    that it must have, behind the tensors before it."""

    name: str
    shape: list[int]
    kind: int
    offset: int
    due: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def block(self) -> int:
        return TENSOR_BLOCKS[self.kind][0]

    @property
    def stop(self) -> int:
        return self.offset + row_bytes(self.kind, self.elements)


# What holds for every tensor, in this order, and what is wrong with one for which it does not.
TENSOR_RULES: tuple[tuple[Callable[[TensorInfo], bool], str], ...] = (
    (lambda t: 0 not in t.shape, "has the shape {t.shape}: a dimension is 0"),
    (lambda t: t.elements <= MAX_ELEMENTS, "has the shape {t.shape}: these are too many elements"),
    (lambda t: t.kind in TENSOR_BLOCKS, UNKNOWN_TYPE),
    (
        lambda t: t.row % t.block == 0,
        "has rows of {t.row} elements, which are no multiple of {t.block}, its type's block",
    ),
    (
        lambda t: t.offset == t.due,
        "begins at byte {t.offset} of the data, not at {t.due}: tensors overlap or leave gaps",
    ),
)


def is_gguf(path: Path) -> bool:
    """Whether a file starts as a GGUF does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def start(reader: Reader) -> int:
    """Read what comes before the key-value pairs; returns the number of tensors."""
    if reader.take(4) != MAGIC:
        raise Broken("it does not start with GGUF")
    version = reader.scalar("I")
    if version not in VERSIONS:
        raise Broken(f"it has GGUF version {version}; 2 and 3 are known")
    return reader.count(MAX_TENSORS, "tensors")


def metadata(reader: Reader) -> Metadata:
    """Read from the start of the file to the table of tensors."""
    tensors = start(reader)
    values: dict[str, Any] = {}
    keys: set[bytes] = set()
    vocabulary = tokens_at = 0
    for _ in range(reader.count(MAX_PAIRS, "values")):
        key = unique(reader.text(MAX_KEY, "bytes in one key"), keys, "key")
        kind = reader.scalar("I")
        if key == "general.alignment" and kind != UINT32:
            raise Broken(f"its general.alignment has value type {kind}, not {UINT32}")
        if kind == ARRAY:
            first = reader.at + 12  # behind the elements' type and count
            count, numbers = reader.array()
            if key == TOKENS:
                vocabulary, tokens_at = count, first
            elif numbers is not None and not key.startswith("tokenizer."):
                values[key] = numbers
        elif kind == STRING:
            text = reader.value()
            if text is not None:
                values[key] = text
            elif key.startswith(TEMPLATE):
                raise Broken(f"its {shown(key)} is longer than {shown_size(MAX_TEXT)}")
        elif kind in SCALARS:
            values[key] = reader.scalar(SCALARS[kind])
        else:
            raise Broken(f"its value {shown(key)} has value type {kind}, which is not known")
    require_usable(values)
    return Metadata(tensors=tensors, values=values, vocabulary=vocabulary, tokens_at=tokens_at)


def unique(name: bytes, names: set[bytes], what: str) -> str:
    """A name that is not yet among `names`, to which it is added. llama.cpp ends a name at a zero:
    with one in it, it would read another name than is checked here."""
    text = name.decode("utf-8", "replace")
    if not name or b"\0" in name:
        raise Broken(f"it has a {what} {'with a zero byte in it' if name else 'of no bytes'}")
    if name in names:
        raise Broken(f"it has the {what} {shown(text)} twice")
    names.add(name)
    return text


def require_usable(values: Mapping[str, Any]) -> None:
    """Raise Broken where llama.cpp would abort, crash or see another layout."""
    alignment = values.get("general.alignment", ALIGNMENT)
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise Broken(
            f"its general.alignment is {alignment}, not a power of two up to {MAX_ALIGNMENT}"
        )
    for name, (low, high) in RANGES.items():
        key = f"{values.get('general.architecture')}.{name}"
        value = values.get(key, low)
        if type(value) is not int or not low <= value <= high:
            raise Broken(f"its {shown(key)} is {shown(value)}; allowed are {low} to {high}")
    for key, value in values.items():
        if key.startswith(TEMPLATE) and isinstance(value, str):
            require_shallow(value, key)


def require_shallow(template: str, key: str) -> None:
    """Raise Broken for a chat template that is nested so deep that llama.cpp's stack overflows."""
    brackets = operators = 0
    blocks: list[int] = []
    is_inside = False
    for part in TEMPLATE_PART.finditer(template):
        statement = part["statement"]
        if statement or part["open"]:
            brackets, operators, is_inside = 0, 0, True
            if statement in OPENS:
                blocks.append(1)
            elif statement == "elif" and blocks:
                blocks[-1] += 1  # a branch is parsed within the one before it
            elif statement and statement.startswith("end") and blocks:
                blocks.pop()
        elif part["close"]:
            is_inside = False
        elif not is_inside:
            continue
        elif part[0] in ")]}":
            brackets -= 1
        else:
            operators += 1
            brackets += part[0] in "([{"
        depths = (brackets, operators, sum(blocks))
        if any(map(gt, depths, (MAX_BRACKETS, MAX_OPERATORS, MAX_BLOCKS))):
            raise Broken(f"its {shown(key)} is nested too deep")


def tensors(reader: Reader, metadata: Metadata) -> Iterator[TensorInfo]:
    """Read the table of tensors, which follows the `metadata`."""
    names: set[bytes] = set()
    due = 0
    for _ in range(metadata.tensors):
        name = unique(reader.text(MAX_NAME, "bytes in a tensor's name"), names, "tensor")
        dimensions = reader.scalar("I")
        if dimensions > MAX_DIMENSIONS:
            raise Broken(f"its tensor {shown(name)} has {dimensions} dimensions")
        shape = list(struct.unpack(f"<{dimensions}Q", reader.take(8 * dimensions)))
        kind, offset = struct.unpack("<IQ", reader.take(12))
        tensor = TensorInfo(name, shape, kind, offset, due)
        for holds, problem in TENSOR_RULES:
            if not holds(tensor):
                is_newer = problem == UNKNOWN_TYPE and 0 < kind - NEWEST_TYPE <= MOST_NEWER
                error = Newer if is_newer else Broken
                raise error(f"its tensor {shown(name)} {problem.format(t=tensor)}")
        due = padded(tensor.stop, metadata.alignment)
        yield tensor
