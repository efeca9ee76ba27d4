"""Read a GGUF's header: small, bounded, and skipping vocabularies without building them.

The layout is that of ggml's docs/gguf.md: magic, version, counts, key-value pairs, tensor table,
then the tensors, aligned. Everything in it is checked before it is used as a length.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field, to_builtins
from msgspec.structs import replace

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.store import stat_cache
from pipeline.core.text import size as shown_size

from . import contents
from .quants import FILE_TYPES, row_bytes

MAGIC = b"GGUF"
MAX_PAIRS = 100_000
MAX_TENSORS = 1_000_000
MAX_STRING = 64 * 1024 * 1024  # bytes; a chat template has some thousands
MAX_CONTEXT = 1 << 30  # tokens; the longest have some millions
ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_ARRAY = 1024  # numbers; a value for each layer is kept, a vocabulary never
MAX_KEPT = 65_536  # numbers of all such arrays together

# Value types: struct format by number; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
SCALARS[12] = "d"
STRING, ARRAY = 8, 9

BLOCK = re.compile(r"(?:enc\.|dec\.)?blk\.(\d{1,4})\.")  # a layer's tensors
PROJECTING = ("mm.", "resampler.", "adapter.")  # tensors, as llama.cpp's clip-impl.h names them
# Architectures that only embed, whatever else their metadata says.
ENCODERS = (
    *("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2"),
    *("jina-bert-v3", "eurobert", "gemma-embedding", "llama-embed", "t5encoder"),
)
WRITERS = ("dream", "llada", "llada-moe", "rnd1")  # diffusion: not causal, and write all the same
ASSUMED_POOLING = "mean"  # that of most embedding models
POOLING = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}  # enum llama_pooling_type


class Broken(ValueError):
    """The bytes are not a GGUF header, or stop before its end."""


class Cut(Broken):
    """They are the start of a longer file, and stop before the header's end."""


class Header(Struct, frozen=True, kw_only=True):
    """The header of a GGUF. `size` is how many bytes the whole file must have at least,
    `data` where its tensors start, `vocabulary` how many tokens it knows (0: unknown).

    `widths` are those of a projector's last part, whose output has one of them. `values` holds
    the plain values and short arrays of numbers; the tokenizer's are left out. `blocks` are the
    numbers of the layers that have tensors, None where they are not known. `tokens_at` is where the
    first token's text starts, 0 where that is not known.
    """

    tensors: int
    size: int
    data: int
    vocabulary: int = 0
    widths: list[int] = field(default_factory=list)
    blocks: list[int] | None = None
    tokens_at: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    @property
    def name(self) -> str:
        """The model's own name, printable characters only."""
        name = str(self.values.get("general.name", ""))
        return "".join(letter for letter in name if letter.isprintable()).strip()

    @property
    def quant(self) -> str:
        """The file's type in llama-quantize's spelling; empty where it does not say."""
        return FILE_TYPES.get(whole(self.values, "general.file_type", -1), "")

    @property
    def context_length(self) -> int:
        """The trained context in tokens; 0 where that is unknown."""
        length = whole(self.values, f"{self.architecture}.context_length", 0)
        return length if 0 < length <= MAX_CONTEXT else 0

    @property
    def pooling(self) -> str:
        """How an embedding model pools, `none` for all others."""
        return ASSUMED_POOLING if self.lacks_pooling else self._said_pooling

    @property
    def is_encoder(self) -> bool:
        """Whether it can only embed: it reads a text at once and writes none."""
        architecture = self.architecture
        is_causal = self.values.get(f"{architecture}.attention.causal", True)
        return architecture in ENCODERS or (is_causal is False and architecture not in WRITERS)

    @property
    def lacks_pooling(self) -> bool:
        """Whether an encoder does not say how it pools."""
        return self.is_encoder and self._said_pooling == "none"

    @property
    def _said_pooling(self) -> str:
        return POOLING.get(whole(self.values, f"{self.architecture}.pooling_type", 0), "none")

    @property
    def heads(self) -> int:
        """How many layers of the model draft tokens for it (multi-token prediction)."""
        return whole(self.values, f"{self.architecture}.nextn_predict_layers", 0)

    @property
    def has_chat_template(self) -> bool:
        return "tokenizer.chat_template" in self.values

    @property
    def shards(self) -> int:
        """Into how many files the model is split; 1 for a whole one."""
        return max(1, whole(self.values, "split.count", 1))


def whole(values: Mapping[str, Any], key: str, default: int) -> int:
    """A value that should be a whole number; the default where it is not."""
    value = values.get(key, default)
    return value if isinstance(value, int) else default


def padded(count: int, step: int = ALIGNMENT) -> int:
    """The next multiple of `step`, which `count` may be itself."""
    return -(-count // step) * step


class _Reader:
    """A position in a buffer that may end too early, and starts a file of `size` bytes."""

    def __init__(self, buffer: bytes | mmap.mmap, size: int) -> None:
        self.buffer = buffer
        self.size = size
        self.at = 0
        self.kept = 0

    def move(self, to: int) -> None:
        if to > len(self.buffer):
            raise (Cut if to <= self.size else Broken)("it ends inside its header")
        self.at = to

    def skip(self, count: int) -> int:
        start = self.at
        self.move(start + count)
        return start

    def scalar(self, form: str) -> Any:
        start = self.skip(struct.calcsize("<" + form))
        return struct.unpack_from("<" + form, self.buffer, start)[0]

    def count(self, most: int, what: str) -> int:
        number = int(self.scalar("Q"))
        if number > most:
            raise Broken(f"it claims {number} {what}")
        return number

    def string(self) -> str:
        length = self.count(MAX_STRING, "bytes in one text")
        start = self.skip(length)
        return self.buffer[start : self.at].decode("utf-8", "replace")

    def array(self) -> tuple[int, list[Any] | None]:
        """How many elements there are, and the elements where they are a few numbers."""
        kind = self.scalar("I")
        count = self.count(self.size, "elements in an array")
        if kind in SCALARS:
            form = f"<{count}{SCALARS[kind]}"
            start = self.skip(count * struct.calcsize("<" + SCALARS[kind]))
            if count > MAX_ARRAY or self.kept + count > MAX_KEPT:
                return count, None
            self.kept += count
            return count, list(struct.unpack_from(form, self.buffer, start))
        if kind != STRING:
            raise Broken(f"it holds an array of value type {kind}")
        buffer, at, end = self.buffer, self.at, len(self.buffer)
        for _ in range(count):  # a vocabulary: this loop must be fast
            at += 8 + int.from_bytes(buffer[at : at + 8], "little")
            if at > end:
                break
        self.move(at)
        return count, None


def parse(
    buffer: bytes | mmap.mmap, size: int | None = None, shapes: dict[str, list[int]] | None = None
) -> Header:
    """Parse the header at the start of `buffer`, the start of a file of `size` bytes. Adds each
    tensor's shape to `shapes`, with the length of a row first.

    Raises Broken, and Cut where more of the file's bytes are needed.
    """
    reader = _Reader(buffer, len(buffer) if size is None else size)
    start = reader.skip(4)
    if buffer[start : start + 4] != MAGIC:
        raise Broken("it does not start with GGUF")
    version = reader.scalar("I")
    if version not in (2, 3):
        raise Broken(f"it has GGUF version {version}; 2 and 3 are known")
    tensors = reader.count(MAX_TENSORS, "tensors")
    values, vocabulary, tokens_at = _metadata(reader)
    widths: set[int] = set()
    blocks: set[int] = set()
    end = 0
    for name, shape, stop in _tensor_table(reader, tensors):
        end = max(end, stop)
        if block := BLOCK.match(name):
            blocks.add(int(block[1]))
        if name.startswith(PROJECTING) and len(widths) < MAX_ARRAY:
            widths.update(shape)
        if shapes is not None:
            shapes[name] = shape
    alignment = whole(values, "general.alignment", ALIGNMENT)
    if alignment < 1:
        raise Broken(f"its alignment is {alignment}")
    data = padded(reader.at, alignment)
    return Header(
        tensors=tensors,
        size=data + end,
        data=data,
        vocabulary=vocabulary,
        widths=sorted(widths),
        blocks=sorted(blocks),
        tokens_at=tokens_at,
        values=values,
    )


def _metadata(reader: _Reader) -> tuple[dict[str, Any], int, int]:
    """The plain values and short arrays, how many tokens there are, and where the first begins."""
    values: dict[str, Any] = {}
    vocabulary = tokens_at = 0
    for _ in range(reader.count(MAX_PAIRS, "values")):
        key, kind = reader.string(), reader.scalar("I")
        if kind == ARRAY:
            start = reader.at + 12  # behind the elements' type and count
            count, numbers = reader.array()
            if key == "tokenizer.ggml.tokens":
                vocabulary, tokens_at = count, start
            elif numbers is not None and not key.startswith("tokenizer."):
                values[key] = numbers
        elif kind == STRING:
            values[key] = reader.string()
        elif kind in SCALARS:
            values[key] = reader.scalar(SCALARS[kind])
        else:
            raise Broken(f"{key} has value type {kind}")
    return values, vocabulary, tokens_at


def _tensor_table(reader: _Reader, tensors: int) -> Iterator[tuple[str, list[int], int]]:
    """The name and shape of each tensor, and where it ends, in bytes from the start of the data."""
    for _ in range(tensors):
        name = reader.string()
        dimensions = reader.scalar("I")
        if dimensions > MAX_DIMENSIONS:
            raise Broken(f"its tensor {name} has {dimensions} dimensions")
        shape = [int(reader.scalar("Q")) for _ in range(dimensions)]
        kind, offset = reader.scalar("I"), reader.scalar("Q")
        # Of a type newer than the table of types at least the start must be there.
        yield name, shape, offset + row_bytes(kind, math.prod(shape))


def read(path: Path, shapes: dict[str, list[int]] | None = None) -> Header:
    """The header of the file `path`, which must be as long as its header says. Adds each tensor's
    shape to `shapes`, with the length of a row first.

    Raises PipelineError.
    """
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(contents.START)
            if length < 24:
                raise Broken("it is too short")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                header = parse(buffer, shapes=shapes)
    except Broken as error:
        raise unusable(str(path), start, error) from None
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read: {error.strerror}") from None
    if length < header.size:
        raise PipelineError(
            f"{path}: is cut short: it has {shown_size(length)} ({length} bytes), its header "
            f"needs {shown_size(header.size)} ({header.size} bytes)",
            "download or copy it again",
        )
    return header


def tokens(path: Path, header: Header) -> list[bytes]:
    """The texts of all tokens of the file `path`, whose header was just read."""
    with path.open("rb") as file:
        data = file.read(header.data)
    texts, at = [], header.tokens_at
    for _ in range(header.vocabulary):
        end = at + 8 + int.from_bytes(data[at : at + 8], "little")
        texts.append(data[at + 8 : end])
        at = end
    return texts


def unusable(where: str, start: bytes, error: Broken) -> PipelineError:
    """The error for a file that is no GGUF: it names what the file is, where that is known."""
    what, hint = contents.foreign(start) or (f"is not a usable GGUF: {error}", "download it again")
    return contents.ForeignFile(f"{where}: {what}", hint)


def read_cached(path: Path, cache: Path) -> Header:
    """As `read`, but from the file `cache` while the stamp of `path` stays the same."""
    with contextlib.suppress(TypeError):  # no entry, or one of another version
        return Header(**stat_cache.recall(cache, path))  # type: ignore[arg-type]
    stamp = stat_cache.stamp(path) if path.exists() else [0, 0]
    header = read(path)
    values = dict(header.values)
    if header.has_chat_template:
        values["tokenizer.chat_template"] = ""  # only whether there is one matters
    header = replace(header, values=values)
    stat_cache.remember(cache, path, to_builtins(header), stamp)
    return header


SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def shards(first: Path) -> list[Path]:
    """All files of the model whose first file is `first`, in order. Raises PipelineError."""
    match = SHARD.fullmatch(first.name)
    if not match:
        return [first]
    count, suffix = int(match["count"]), first.suffix
    names = [f"{match['stem']}-{n:05d}-of-{count:05d}{suffix}" for n in range(1, count + 1)]
    if not names:
        return [first]
    if first.name != names[0]:
        raise UsageError(
            f"{first}: is part {int(match['number'])} of {count} of a split model",
            f"give the first part: {first.with_name(names[0])}",
        )
    paths = [first.with_name(name) for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise PipelineError(
            f"{first}: {len(missing)} of its {count} parts are missing: {', '.join(missing[:3])}",
            "put all parts into the same folder",
        )
    return paths
