"""The limit of writing: each token reads all weights that it uses once, and memory is only so fast.

The processor reads a buffer as large as these weights, so that caches help it as much.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from pathlib import Path

from pipeline.core import capacity
from pipeline.models import contents, gguf, gguf_format

SECONDS = 0.3  # for each number of threads
LARGEST = 4 * 1024**3  # bytes of the buffer; far more than any cache
LEAST = 1024 * 1024
PAGE = 4096
EXPERT = "_exps."  # in the names of tensors of which a token uses a few experts
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
PROJECTION = ("mm.", "v.", "a.")  # tensors of a projector, which writing does not use


def read_per_token(model: Path) -> int:
    """The bytes of weights that writing a token reads, by the headers of a GGUF: of the experts
    those that are used, and the embedding only where it is the output too. Raises PipelineError."""
    total = embedding = 0
    values: dict[str, object] = {}
    has_output = False
    for part in gguf.shards(model):
        reader = gguf_format.Reader(contents.local(part))
        metadata = gguf_format.metadata(reader)
        values = values or dict(metadata.values)
        share = _share(values)
        for tensor in gguf_format.tensors(reader, metadata):
            size = tensor.stop - tensor.offset
            has_output = has_output or tensor.name == OUTPUT
            if tensor.name == EMBEDDING:
                embedding = size
            elif not tensor.name.startswith(PROJECTION):
                total += round(size * share) if EXPERT in tensor.name else size
    return total if has_output else total + embedding


def _share(values: dict[str, object]) -> float:
    """The share of the experts that a token uses."""
    architecture = values.get("general.architecture")
    used = gguf.whole(values, f"{architecture}.expert_used_count", 0)
    count = gguf.whole(values, f"{architecture}.expert_count", 0)
    return used / count if 0 < used < count else 1.0


def measured(size: int) -> float:
    """Bytes a second that this machine's processors read from a buffer of `size` bytes, with as
    many threads as do it best; 0 where it has not enough memory for that."""
    size = max(LEAST, min(size, LARGEST))
    if size + LEAST > capacity.memory() // 2:
        return 0.0
    buffer = bytearray(size)
    buffer[::PAGE] = bytes(len(range(0, size, PAGE)))  # memory of its own, not the system's zeros
    count = capacity.processors()
    return max(_read(buffer, threads) for threads in sorted({1, (count + 1) // 2, count}))


def _read(buffer: bytearray, threads: int) -> float:
    """Bytes a second, in the fastest pass over the buffer."""
    library = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    search = library.memchr  # reads all of a buffer of zeros; other threads run meanwhile
    search.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    search.restype = ctypes.c_void_p
    start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    piece = len(buffer) // threads
    best, deadline = 0.0, time.perf_counter() + SECONDS
    passes = max(1, 64 * 1024 * 1024 // len(buffer))  # so that starting threads is not part of it

    def read(offset: int) -> None:
        for _ in range(passes):
            search(start + offset, 1, piece)

    while True:
        readers = [threading.Thread(target=read, args=(n * piece,)) for n in range(threads)]
        began = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best = max(best, piece * threads * passes / (time.perf_counter() - began))
        if time.perf_counter() > deadline:
            return best
