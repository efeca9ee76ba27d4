"""What each tensor of a model loses in each type: a sample of its rows, quantized by llama-quantize
itself and made numbers again, compared with what they were.

The sample is a GGUF with the model's metadata and tensors, but a few rows of each tensor: what
llama-quantize does to a row does not depend on the others.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import cycle
from math import prod
from operator import mul, sub
from pathlib import Path
from typing import TypeAlias

from msgspec import Struct

from pipeline.core.errors import PipelineError
from pipeline.core.process import outcome
from pipeline.core.progress import Update
from pipeline.core.store.publish import require_disk

from . import contents, gguf_format, tools
from .gguf_format import ARRAY, SCALARS, STRING, TensorInfo, padded
from .quants import TENSOR_TYPES, row_bytes

Numbers: TypeAlias = "memoryview[float]"
Weights = Mapping[str, Sequence[float]]  # of a matrix: for each column, expert after expert

SAMPLE = 32_768  # elements of a tensor that are tried, in whole rows, the same of each expert
SECONDS = 600  # for one type of a sample
COPIES = 8  # of the sample in memory: as read, as numbers, and quantized
F32 = TENSOR_TYPES["f32"][0]
# Of the whole file, and not of the sample.
LEFT_OUT = ("split.", "general.alignment")
SUMS = ".in_sum2"  # a matrix in GGUF: the sums of squares of what a tensor's columns are fed with


class TensorTable(Struct, frozen=True, kw_only=True):
    """The metadata of a GGUF as they are in the file, and its tensors. `data` is where their bytes
    begin."""

    file: Path
    pairs: Sequence[bytes]
    tensors: Mapping[str, TensorInfo]
    data: int


def read(file: Path) -> TensorTable:
    """The table of tensors of a GGUF, or of one part of a split one. Raises PipelineError."""
    readable = contents.local(file)
    reader = gguf_format.Reader(readable)
    pairs = []
    try:
        metadata = gguf_format.metadata(reader)
        tensors = {each.name: each for each in gguf_format.tensors(reader, metadata)}
        data = padded(reader.at, metadata.alignment)
        reader = gguf_format.Reader(readable)
        gguf_format.start(reader)
        for _ in range(reader.scalar("Q")):
            begin = reader.at
            key = reader.text().decode("utf-8", "replace")
            _skip(reader)
            if not key.startswith(LEFT_OUT):
                pairs.append(readable.get(begin, reader.at))
    except gguf_format.Broken as error:
        raise PipelineError(f"{file}: is not a usable GGUF: {error}") from None
    return TensorTable(file=file, pairs=pairs, tensors=tensors, data=data)


def _skip(reader: gguf_format.Reader) -> None:
    """Skip the value of a pair, that was checked before."""
    kind = reader.scalar("I")
    if kind == ARRAY:
        reader.array()
    elif kind == STRING:
        reader.value()
    else:
        reader.scalar(SCALARS[kind])


def write_sample(parts: Sequence[Path], names: Collection[str], target: Path) -> None:
    """Write the sample of a model's tensors `names`; `parts` are its files. Raises
    PipelineError."""
    tables = [read(part) for part in parts]
    table, rows, offset = [], list[Iterator[bytes]](), 0
    for source in tables:
        for tensor in source.tensors.values():
            if tensor.name not in names:
                continue
            length, height, *experts = tensor.shape
            depth = prod(experts)
            kept = min(height, max(1, SAMPLE // (length * depth)))
            shape = [length, kept, *experts]
            name = tensor.name.encode()
            table.append(
                struct.pack("<Q", len(name))
                + name
                + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.kind, offset)
            )
            rows.append(_rows(source, tensor, height, kept, depth))
            offset += padded(row_bytes(tensor.kind, length) * kept * depth)
    pairs = tables[0].pairs
    head = gguf_format.MAGIC + struct.pack("<IQQ", 3, len(table), len(pairs))
    start = b"".join((head, *pairs, *table))
    with target.open("wb") as file:
        file.write(start.ljust(padded(len(start)), b"\0"))
        for each in rows:
            data = b"".join(each)
            file.write(data.ljust(padded(len(data)), b"\0"))


def _rows(
    source: TensorTable, tensor: TensorInfo, height: int, kept: int, depth: int
) -> Iterator[bytes]:
    """Rows at equal distances, of each expert."""
    width = row_bytes(tensor.kind, tensor.row)
    with source.file.open("rb") as file:
        for expert in range(depth):
            for n in range(kept):
                row = expert * height + (2 * n + 1) * height // (2 * kept)
                file.seek(source.data + tensor.offset + row * width)
                yield file.read(width)


def measure(
    program: Path,
    sample: Path,
    types: Mapping[str, Collection[str]],
    matrix: Path,
    weights: Weights,
    scratch: Path,
    update: Update,
) -> dict[str, dict[str, float]]:
    """By tensor and type the share of a tensor's output that quantizing it makes wrong: squared,
    weighed by the matrix, 0 for none. `types` says which tensors each type is tried on. `scratch`
    is a folder for files as large as the sample.

    Raises PipelineError.
    """
    plain = scratch / "plain.gguf"
    _quantize(program, [str(sample)], plain, "F32")
    exact = _numbers(plain)
    shapes = {each.name: each.shape for each in read(sample).tensors.values()}
    errors: dict[str, dict[str, float]] = {name: {} for name in exact}
    for number, (kind, names) in enumerate(types.items()):
        made, back = scratch / "made.gguf", scratch / "back.gguf"
        list_file = scratch / "types.txt"
        list_file.write_text(type_list(dict.fromkeys(names, kind)) + "weight=f32\n", "ascii")
        options = ["--tensor-type-file", str(list_file), "--imatrix", str(matrix)]
        _quantize(program, [*options, str(sample)], made, "Q8_0", [list_file, matrix])
        _quantize(program, ["--allow-requantize", str(made)], back, "F32")
        numbers = _numbers(back)
        for name in names:
            row, _, *experts = shapes[name]
            errors[name][kind] = error(
                exact[name], numbers[name], weights.get(name, ()), row, prod(experts)
            )
        update(number + 1, len(types))
    return errors


def type_list(types: Mapping[str, str]) -> str:
    """The lines of llama-quantize's --tensor-type-file for tensors and their types. A pattern is
    made lower case there, so that a capital has to be any letter."""
    lines = []
    for name, kind in types.items():
        pattern = re.sub("[A-Z]", ".", re.sub(r"[^\w-]", lambda match: f"\\{match[0]}", name))
        lines.append(f"^{pattern}$={kind}\n")
    return "".join(lines)


def _quantize(
    program: Path, words: Sequence[str], made: Path, quant: str, read: Sequence[Path] = ()
) -> None:
    source = Path(words[-1])
    size = source.stat().st_size
    status, out, err = outcome(
        [str(program), *words, str(made), quant],
        timeout=SECONDS,
        env=tools.env(),
        sandbox=tools.sandbox(
            program,
            read=[source, *read],
            write=[made],
            weights=size,
            copies=COPIES,
        ),
    )
    if status:
        require_disk(made.parent, out + err)
        last = "\n".join((out + err).strip().splitlines()[-3:])
        raise PipelineError(
            f"llama-quantize fails on a sample of the model ({status}):\n{last}", _again(made)
        )


def _again(file: Path) -> str:
    """The next step where a program left nothing usable, though the disk can be written to."""
    return f"run the same command again; else see whether the disk of {file.parent} is failing"


def _numbers(file: Path) -> dict[str, Numbers]:
    """The tensors of a GGUF that are in 32-bit numbers."""
    try:
        table = read(file)
    except PipelineError as error:  # llama-quantize does not notice every failed write
        require_disk(file.parent)
        raise PipelineError(error.message, _again(file)) from None
    data = memoryview(file.read_bytes())[table.data :]
    numbers: dict[str, Numbers] = {}
    for each in table.tensors.values():
        if each.kind == F32:
            numbers[each.name] = data[each.offset : each.stop].cast("f")
    return numbers


def error(
    exact: Numbers, made: Numbers, weights: Sequence[float], row: int, depth: int = 1
) -> float:
    """The weighed sum of squared differences, over that of the squared numbers. `row` is the length
    of a row, `depth` how many experts there are, each with `row` weights; none: all are equal."""
    wrong = whole = 0.0
    part = len(exact) // depth
    for expert in range(depth):
        columns = weights[expert * row : (expert + 1) * row] or (1.0,)
        a = exact[expert * part : (expert + 1) * part]
        difference = list(map(sub, a, made[expert * part : (expert + 1) * part]))
        wrong += sum(map(mul, map(mul, difference, difference), cycle(columns)))
        whole += sum(map(mul, map(mul, a, a), cycle(columns)))
    return wrong / whole if whole else 0.0


def weights(matrix: Path) -> dict[str, Sequence[float]]:
    """What an importance matrix says of each tensor: a weight for each column, of each expert.
    Raises PipelineError."""
    if not gguf_format.is_gguf(matrix):
        return _of_older_format(matrix)
    found = _numbers(matrix)
    return {n.removesuffix(SUMS): v.tolist() for n, v in found.items() if n.endswith(SUMS)}


def _of_older_format(matrix: Path) -> dict[str, Sequence[float]]:
    """As `weights`, of a matrix that is not a GGUF: a count, then name, calls, values of each."""
    data, at = matrix.read_bytes(), 4
    found: dict[str, Sequence[float]] = {}
    try:
        for _ in range(struct.unpack_from("<i", data)[0]):
            (length,) = struct.unpack_from("<i", data, at)
            name = data[at + 4 : at + 4 + length].decode()
            (count,) = struct.unpack_from("<i", data, at + 8 + length)
            at += 12 + length
            found[name] = struct.unpack_from(f"<{count}f", data, at)
            at += 4 * count
    except (struct.error, UnicodeDecodeError):
        raise PipelineError(
            f"imatrix={matrix}: cannot be read", "pass one that llama-imatrix wrote"
        ) from None
    return found
