"""What a GGUF's header says of the model: kind, context, quant, pooling, parts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field, to_builtins
from msgspec.structs import replace

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.store import stat_cache
from pipeline.core.text import size as shown_size

from . import contents, gguf_format
from .gguf_format import MAX_ARRAY, TEMPLATE, Broken, Newer, padded
from .quants import FILE_TYPES

MAX_CONTEXT = 1 << 30  # tokens; the longest have some millions

BLOCK = re.compile(r"(?:enc\.|dec\.)?blk\.(\d{1,4})\.")  # a layer's tensors
CLASSIFIERS = ("cls.output.weight", "cls.weight")  # with one output: of a reranker
PROJECTING = ("mm.", "resampler.", "adapter.")  # tensors, as llama.cpp's clip-impl.h names them
# Architectures that only embed, whatever else their metadata says.
ENCODERS = (
    *("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2"),
    *("jina-bert-v3", "eurobert", "gemma-embedding", "llama-embed", "t5encoder"),
)
WRITERS = ("dream", "llada", "llada-moe", "rnd1")  # diffusion: not causal, and write all the same
AGAIN = "download it again"
CACHE = "gguf.json"  # headers that were read, in the folder of `read_cached`
NEWER = (
    "a newer llama.cpp may have this type, which `upgrade` alone does not make known here: update "
    "this project (git pull), or use another quant; or the file is damaged"
)
ASSUMED_POOLING = "mean"  # that of most embedding models
POOLING = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}  # enum llama_pooling_type


class Header(Struct, frozen=True, kw_only=True):
    """The header of a GGUF. `size` is how many bytes the whole file must have at least,
    `data` where its tensors start, `vocabulary` how many tokens it knows (0: unknown).

    `widths` are those of a projector's last part, whose output has one of them. `values` holds
    the plain values and short arrays of numbers; the tokenizer's are left out. `blocks` are the
    numbers of the layers that have tensors, None where they are not known. `tokens_at` is where the
    first token's text starts, 0 where that is not known. `scores`: it has a classifier with one
    output.
    """

    tensors: int
    size: int
    data: int
    vocabulary: int = 0
    widths: list[int] = field(default_factory=list)
    blocks: list[int] | None = None
    tokens_at: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    scores: bool = False

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

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
        """How an embedding model pools, `none` for all others. The converter writes `rank` for the
        rerankers of one architecture alone."""
        if self.is_encoder and self._said_pooling == "none":
            return "rank" if self.scores else ASSUMED_POOLING
        return self._said_pooling

    @property
    def is_encoder(self) -> bool:
        """Whether it can only embed: it reads a text at once and writes none."""
        architecture = self.architecture
        is_causal = self.values.get(f"{architecture}.attention.causal", True)
        return architecture in ENCODERS or (is_causal is False and architecture not in WRITERS)

    @property
    def lacks_pooling(self) -> bool:
        """Whether it is not known how an encoder pools."""
        return self.is_encoder and self._said_pooling == "none" and not self.scores

    @property
    def _said_pooling(self) -> str:
        return POOLING.get(whole(self.values, f"{self.architecture}.pooling_type", 0), "none")

    @property
    def heads(self) -> int:
        """How many layers of the model draft tokens for it (multi-token prediction)."""
        return whole(self.values, f"{self.architecture}.nextn_predict_layers", 0)

    @property
    def has_chat_template(self) -> bool:
        return TEMPLATE in self.values

    @property
    def shards(self) -> int:
        """Into how many files the model is split; 1 for a whole one."""
        return max(1, whole(self.values, "split.count", 1))


def whole(values: Mapping[str, Any], key: str, default: int) -> int:
    """A value that should be a whole number; the default where it is not."""
    value = values.get(key, default)
    return value if isinstance(value, int) else default


def parse(
    file: contents.Readable, shapes: dict[str, list[int]] | None = None, *, is_whole: bool = True
) -> Header:
    """The header of a GGUF, of which no more is read. Adds each tensor's shape to `shapes`, with
    the length of a row first. `is_whole`: the file must be as long as its header says. Raises
    PipelineError."""
    reader = gguf_format.Reader(file)
    widths, blocks, end, scores = set[int](), set[int](), 0, False
    try:
        metadata = gguf_format.metadata(reader)
        for tensor in gguf_format.tensors(reader, metadata):
            end = tensor.stop
            if block := BLOCK.match(tensor.name):
                blocks.add(int(block[1]))
            if tensor.name.startswith(PROJECTING) and len(widths) < MAX_ARRAY:
                widths.update(tensor.shape)
            if tensor.name in CLASSIFIERS and math.prod(tensor.shape[1:]) == 1:
                scores = True
            if shapes is not None:
                shapes[tensor.name] = tensor.shape
    except Broken as error:
        start = file.get(0, min(file.size, contents.START))
        hint = NEWER if isinstance(error, Newer) else AGAIN
        what, hint = contents.foreign(start) or (f"is not a usable GGUF: {error}", hint)
        raise contents.ForeignFile(f"{file.name}: {what}", hint) from None
    data = padded(reader.at, metadata.alignment) if metadata.tensors else reader.at
    if is_whole and file.size < data + end:
        raise PipelineError(
            f"{file.name}: is cut short: it has {shown_size(file.size)} ({file.size} bytes), its "
            f"header needs {shown_size(data + end)} ({data + end} bytes)",
            "download or copy it again",
        )
    return Header(
        tensors=metadata.tensors,
        size=data + end,
        data=data,
        vocabulary=metadata.vocabulary,
        widths=sorted(widths),
        blocks=sorted(blocks),
        tokens_at=metadata.tokens_at,
        values=metadata.values,
        scores=scores,
    )


def read(path: Path, shapes: dict[str, list[int]] | None = None) -> Header:
    """As `parse`, of the file `path`. Raises PipelineError."""
    return parse(contents.local(path), shapes)


def tokens(path: Path, header: Header) -> Iterator[bytes]:
    """The texts of all tokens of the file `path`, whose header was just read."""
    reader = gguf_format.Reader(contents.local(path), header.tokens_at)
    return (reader.text() for _ in range(header.vocabulary))


def read_cached(path: Path, run: Path) -> Header:
    """As `read`, but from a file in the folder `run` while the stamp of `path` stays the same."""
    cache = run / CACHE
    known = stat_cache.recall(cache, path)
    if isinstance(known, dict) and known.keys() == {*Header.__struct_fields__}:
        return Header(**known)
    stamp = stat_cache.stamp(path) if path.exists() else [0, 0]
    header = read(path)
    values = dict(header.values)
    if header.has_chat_template:
        values[TEMPLATE] = ""  # only whether there is one matters
    header = replace(header, values=values)
    stat_cache.remember(cache, path, to_builtins(header), stamp)
    return header


SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.A | re.I)


def shards(first: Path) -> list[Path]:
    """All files of the model whose first file is `first`, in order; any other file alone. Raises
    PipelineError."""
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


def file_bytes(first: Path) -> int:
    """The size of a GGUF, all its parts together. Raises PipelineError where one is missing."""
    return sum(part.stat().st_size for part in shards(first))
