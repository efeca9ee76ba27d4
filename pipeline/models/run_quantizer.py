"""Quantize tensors as the official converter converts them, straight into the final file.

Loaded by run_converter.py in the converter's own Python. The converter writes its header alone, to
HEADER. From that the other process, which started this one, has llama-quantize say in a dry run
what becomes of each tensor, and writes it to PLAN. The new header is made by llama.cpp's own gguf
functions, and every tensor goes through the function that llama-quantize calls itself, row by row
as there: so the bytes are those that it would have written. Those of the file that it would have
read are hashed, and the hash is left in RESULT.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

HEADER, PLAN, RESULT = "header.gguf", "plan.json", "result.json"
READY = "the header is written"  # a line of its own
DECLINED = 76  # exit status: this has to be done in two steps; the last line says why
ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT, the only one of llama-quantize
WAIT = 0.02  # seconds between two looks for the plan
PIECE = 1 << 18  # numbers that a thread takes at once
AHEAD = 1 << 28  # bytes of tensors that may wait while the next is converted
F32, F16, BF16 = 0, 1, 30  # of ggml_type
# Without their figures in the matrix ggml cannot make IQ2_XXS, IQ2_XS and IQ1_S, and llama-quantize
# refuses IQ3_XXS, IQ2_S, IQ1_M, and in one type of file Q2_K, but for these tensors.
NEED_FIGURES = (16, 17, 19)
WEIGHED = (*NEED_FIGURES, 18, 22, 29, 10)
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
OUTER = (*EMBEDDINGS, "output.weight")

# Result and arguments of what is called: `p` a pointer, `s` a text, `i` an int, `u` 32 bits without
# a sign, `l` an int64_t, `z` a size_t, `b` a bool.
FUNCTIONS = {
    **{"gguf_init_from_file": "ps*", "gguf_init_empty": "p", "gguf_set_kv": "-pp"},
    **{"gguf_set_val_u32": "-psu", "gguf_set_val_str": "-pss", "gguf_add_tensor": "-pp"},
    **{"gguf_set_tensor_type": "-psi", "gguf_get_meta_size": "zp", "gguf_get_meta_data": "-pp"},
    **{"gguf_find_tensor": "lps", "gguf_get_tensor_offset": "zpl", "gguf_get_tensor_size": "zpl"},
    **{"ggml_get_tensor": "pps", "ggml_row_size": "zil", "ggml_validate_row_data": "bipz"},
    **{"ggml_fp16_to_fp32_row": "-ppl", "ggml_bf16_to_fp32_row": "-ppl"},
    "ggml_fp32_to_bf16_row_ref": "-ppl",
    "ggml_quantize_chunk": "zipplllp",
}


class InitParams(ctypes.Structure):
    """struct gguf_init_params of gguf.h."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))


TYPES = {
    **{"p": ctypes.c_void_p, "s": ctypes.c_char_p, "i": ctypes.c_int, "u": ctypes.c_uint32},
    **{"l": ctypes.c_int64, "z": ctypes.c_size_t, "b": ctypes.c_bool, "*": InitParams, "-": None},
}


def load(path: str) -> ctypes.CDLL:
    """ggml's library, with the signatures of what is called."""
    library = ctypes.CDLL(path)
    for name, kinds in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, *function.argtypes = (TYPES[kind] for kind in kinds)
    return library


def decline(why: str) -> None:
    """End this: it has to be done in two steps."""
    print(why, flush=True)
    sys.exit(DECLINED)


class OutTensor:
    """A tensor of the final file: its types, row lengths and place."""

    def __init__(self, library: Any, out: int, name: str, info: Any, kind: int) -> None:
        number = library.gguf_find_tensor(out, name.encode())
        shape = [int(length) for length in reversed(info.shape)] or [1]  # a row's length first
        self.name, self.source, self.kind = name, int(info.dtype), kind
        self.row, self.rows = shape[0], shape[1] if len(shape) > 1 else 1
        self.experts = shape[2] if len(shape) > 2 else 1
        self.offset = library.gguf_get_tensor_offset(out, number)
        self.bytes = library.gguf_get_tensor_size(out, number)
        self.row_bytes = library.ggml_row_size(kind, self.row)
        self.source_row_bytes = library.ggml_row_size(self.source, self.row)
        if kind != self.source and (
            self.source not in (F32, F16, BF16) or self.bytes != self.row_bytes * self.all_rows
        ):
            decline(f"{name} is of the kind that llama-quantize treats in its own way")

    @property
    def all_rows(self) -> int:
        return self.rows * self.experts


class Quantizer:
    """Writes the final file `out`, a piece of a tensor in each of `threads`."""

    def __init__(self, library: Any, out: BinaryIO, data: int, threads: int) -> None:
        self.numpy = importlib.import_module("numpy")
        self.library, self.out, self.data = library, out, data
        self.writing = Lock()
        self.pool, self.hasher = ThreadPoolExecutor(threads), ThreadPoolExecutor(1)
        self.digest, self.hashed = hashlib.sha256(), 0
        self.waiting: deque[tuple[int, list[Future[None]]]] = deque()

    def close(self) -> None:
        for pool in (self.pool, self.hasher):
            pool.shutdown(cancel_futures=True)

    def hash(self, data: Any) -> Future[None]:
        """Hash what the converter would have written next."""
        self.hashed += len(data)
        return self.hasher.submit(self.digest.update, data)

    def add(self, tensor: OutTensor, array: Any, matrix: Any) -> None:
        """Quantize a tensor in the background. `array` is what the converter would have written,
        `matrix` the figures of each column, for each expert; None without."""
        data = memoryview(array).cast("B")
        futures = [self.hash(data)]
        if padding := -len(data) % ALIGNMENT:
            futures.append(self.hash(bytes(padding)))
        if tensor.kind == tensor.source:
            futures.append(self.pool.submit(self.copy, tensor, array, data))
        else:
            futures += [
                self.pool.submit(self.quantize, tensor, array, matrix, *piece)
                for piece in pieces(tensor)
            ]
        self.waiting.append((len(data), futures))

    def settle(self, most: int) -> None:
        """Wait until no more than so many bytes of tensors wait. Raises what has failed."""
        while self.waiting and sum(size for size, _ in self.waiting) > most:
            for future in self.waiting.popleft()[1]:
                future.result()

    def require_finite(self, tensor: OutTensor, kind: int, address: int, count: int) -> None:
        if not self.library.ggml_validate_row_data(kind, address, count):
            raise ValueError(f"tensor {tensor.name!r} has values that are no finite numbers")

    def copy(self, tensor: OutTensor, array: Any, data: memoryview) -> None:
        self.require_finite(tensor, tensor.kind, array.ctypes.data, len(data))
        self.write(tensor.offset, data)

    def quantize(self, tensor: OutTensor, array: Any, matrix: Any, first: int, count: int) -> None:
        """The rows from `first`, all of one expert."""
        library, numbers = self.library, count * tensor.row
        source = array.ctypes.data + first * tensor.source_row_bytes
        self.require_finite(tensor, tensor.source, source, count * tensor.source_row_bytes)
        floats = source
        if tensor.source != F32:
            widened = self.numpy.empty(numbers, "float32")
            floats = widened.ctypes.data
            f16 = tensor.source == F16
            widen = library.ggml_fp16_to_fp32_row if f16 else library.ggml_bf16_to_fp32_row
            widen(source, floats, numbers)
        made = self.numpy.empty(count * tensor.row_bytes, "uint8")
        expert = first // tensor.rows * tensor.row
        figures = None if matrix is None else matrix[expert : expert + tensor.row].ctypes.data
        library.ggml_quantize_chunk(
            tensor.kind, floats, made.ctypes.data, 0, count, tensor.row, figures
        )
        self.require_finite(tensor, tensor.kind, made.ctypes.data, len(made))
        self.write(tensor.offset + first * tensor.row_bytes, memoryview(made))

    def write(self, offset: int, data: memoryview) -> None:
        with self.writing:
            self.out.seek(self.data + offset)
            self.out.write(data)
            self.out.flush()


def pieces(tensor: OutTensor) -> Iterator[tuple[int, int]]:
    """The first row and the number of rows of each piece; none holds rows of two experts, since
    each has figures of its own."""
    step = max(1, PIECE // tensor.row)
    for expert in range(tensor.experts):
        start, stop = expert * tensor.rows, (expert + 1) * tensor.rows
        for first in range(start, stop, step):
            yield first, min(step, stop - first)


class Matrix:
    """An importance matrix as llama-imatrix writes it now: figures by the names of tensors."""

    def __init__(self, path: str) -> None:
        numpy, gguf = importlib.import_module("numpy"), importlib.import_module("gguf")
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: tensor.data.reshape(-1) for tensor in reader.tensors}
        self.figures: dict[str, Any] = {}
        for name, sums in tensors.items():
            stem = name.removesuffix(".in_sum2")
            if stem == name:
                continue
            counts = numpy.floor(tensors[f"{stem}.counts"].astype("float64") + 0.5)
            counts = counts.astype("float32")
            parts = sums.reshape(len(counts), -1)
            with numpy.errstate(divide="ignore", invalid="ignore"):
                scaled = numpy.where(counts[:, None] > 0, parts / counts[:, None], 1)
            self.figures[stem] = numpy.ascontiguousarray(scaled.reshape(-1), "float32")
        texts = reader.fields["imatrix.datasets"]
        # up to a zero, as C reads them
        self.datasets = [bytes(texts.parts[number]).partition(b"\0")[0] for number in texts.data]
        self.chunks = int(reader.fields["imatrix.chunk_count"].contents())

    def values(self, file: str) -> list[tuple[str, str | bytes | int]]:
        """What llama-quantize notes of it in the result, with the name that it has there."""
        values: list[tuple[str, str | bytes | int]] = [("file", file)]
        values += [("dataset", text) for text in self.datasets[:1]]
        values.append(("entries_count", len(self.figures)))
        return values + [("chunks_count", self.chunks)] * (self.chunks > 0)

    def of(self, tensor: OutTensor) -> Any:
        """The figures of a tensor; None where it has none, or they are for another shape."""
        figures = self.figures.get(tensor.name)
        if figures is not None and len(figures) == tensor.row * tensor.experts:
            return figures
        is_needed = tensor.kind in (NEED_FIGURES if tensor.name in OUTER else WEIGHED)
        if is_needed or (figures is not None and tensor.name not in EMBEDDINGS):
            decline(f"the importance matrix has no figures that fit {tensor.name}")
        return None


def read_matrix(path: str) -> Matrix | None:
    try:
        return Matrix(path)
    except (KeyError, IndexError, ValueError) as error:
        decline(f"the importance matrix is not as llama-imatrix writes it ({error!r})")
        return None


def new_header(library: Any, header: Path, plan: Mapping[str, Any], matrix: Matrix | None) -> int:
    """The context of the final file's header: as llama-quantize makes it of the one of the input,
    in its order."""
    tensors = ctypes.c_void_p()
    params = InitParams(True, ctypes.pointer(tensors))
    source = library.gguf_init_from_file(os.fsencode(header), params)
    if not source:
        decline("llama.cpp cannot read the header")
    out = library.gguf_init_empty()
    library.gguf_set_kv(out, source)
    version = importlib.import_module("gguf").GGML_QUANT_VERSION
    library.gguf_set_val_u32(out, b"general.quantization_version", version)
    library.gguf_set_val_u32(out, b"general.file_type", plan["file_type"])
    for name, value in matrix.values(plan["matrix_name"]) if matrix else ():
        key = f"quantize.imatrix.{name}".encode()
        if isinstance(value, int):
            library.gguf_set_val_u32(out, key, value)
        else:
            text = value if isinstance(value, bytes) else value.encode()
            library.gguf_set_val_str(out, key, text[:127])  # which its own record is long
    for name, _ in plan["types"]:
        library.gguf_add_tensor(out, library.ggml_get_tensor(tensors, name.encode()))
    for name, kind in plan["types"]:
        library.gguf_set_tensor_type(out, name.encode(), kind)
    return int(out)


def writer_of(folder: Path) -> Callable[..., None]:
    """A function in the place of GGUFWriter.write_tensors_to_file; `folder` has the files in which
    this process and the one that started it leave word for each other."""

    def write_tensors(writer: Any, *, progress: bool = False) -> None:
        if Path(writer.path) != folder / HEADER:
            decline("the converter writes more than one file")
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell(), writer.data_alignment)
        file.flush()
        infos = writer.tensors[0]
        if any(type(info.tensor).__name__ == "LazyChunkedTensor" for info in infos.values()):
            decline("the converter makes one of its tensors piece by piece")
        if writer.data_alignment != ALIGNMENT:
            decline(f"its alignment is {writer.data_alignment}")
        head = (folder / HEADER).read_bytes()
        print(READY, flush=True)
        while not (text := (folder / PLAN).read_text(encoding="utf-8")).endswith("\n"):
            time.sleep(WAIT)
        plan = json.loads(text)
        result = quantize_all(infos, head, folder / HEADER, plan)
        (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")

    return write_tensors


def round_faster(library: Any) -> None:
    """Have the converter round to BF16 by the C function that its own was copied from: numpy takes
    ten passes over the numbers, and as long as all the rest."""
    numpy, quants = importlib.import_module("numpy"), importlib.import_module("gguf.quants")

    def blocks(cls: Any, numbers: Any) -> Any:
        numbers = numpy.ascontiguousarray(numbers, "float32")
        made = numpy.empty(numbers.shape, "uint16")
        library.ggml_fp32_to_bf16_row_ref(numbers.ctypes.data, made.ctypes.data, made.size)
        return made.view("uint8")

    quants.BF16.quantize_blocks = classmethod(blocks)


def quantize_all(
    infos: Mapping[str, Any], head: bytes, header: Path, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the final file; returns the hash and the size of what is not written, its input."""
    library = load(plan["library"])
    round_faster(library)
    matrix = read_matrix(plan["matrix"]) if plan["matrix"] else None
    out = new_header(library, header, plan, matrix)
    kinds = dict(plan["types"])
    tensors = {n: OutTensor(library, out, n, info, kinds[n]) for n, info in infos.items()}
    figures = {
        name: matrix.of(tensor) if matrix and tensor.kind != tensor.source else None
        for name, tensor in tensors.items()
    }
    new_head = ctypes.create_string_buffer(library.gguf_get_meta_size(out))
    library.gguf_get_meta_data(out, new_head)
    numpy, gguf = importlib.import_module("numpy"), importlib.import_module("gguf")
    total, done = sum(info.nbytes for info in infos.values()), 0
    with Path(plan["out"]).open("r+b") as file:
        quantizer = Quantizer(library, file, len(new_head), plan["threads"])
        try:
            quantizer.hash(head)
            quantizer.write(-len(new_head), memoryview(new_head).cast("B"))
            for name, info in infos.items():
                quantizer.settle(AHEAD)
                array = gguf.LazyNumpyTensor.to_eager(info.tensor)
                info.tensor = None
                if array.nbytes != info.nbytes:
                    raise ValueError(f"tensor {name!r} has {array.nbytes} bytes, not {info.nbytes}")
                quantizer.add(tensors[name], numpy.ascontiguousarray(array), figures[name])
                done += array.nbytes
                del array
                print(f"Writing: {100 * done // total:3}%", flush=True)
            quantizer.settle(-1)
        finally:
            quantizer.close()
        end = max(tensor.offset + tensor.bytes for tensor in tensors.values())
        file.truncate(len(new_head) + end + -end % ALIGNMENT)
    return {"sha256": quantizer.digest.hexdigest(), "size": quantizer.hashed}
