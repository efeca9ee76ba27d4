"""Fuzz the readers of model files, guided by their coverage:

    python fuzz_headers.py TARGET [MODULE.NAME=VALUE …] -- OPTIONS OF LIBFUZZER

What MODULE of `pipeline.models` calls NAME can be replaced, to see what happens without it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.core.errors import PipelineError

with atheris.instrument_imports(include=["pipeline.models"]):
    import pipeline.models.checkpoint as checkpoint
    import pipeline.models.contents as contents
    import pipeline.models.gguf as gguf
    import pipeline.models.kinds as kinds
    import pipeline.models.safetensors as safetensors


def readable(data: bytes, size: int) -> contents.Readable:
    def read(start: int, stop: int) -> bytes:
        return data[start:stop].ljust(stop - start, b"\0")

    return contents.Readable(name="fuzzed", size=size, read=read)


def read_gguf(data: bytes) -> None:
    """A file of these bytes, and one that begins with them."""
    for size in (len(data), len(data) + (1 << 40)):
        try:
            header = gguf.parse(readable(data, size))
            kinds.require_model([header], "fuzzed")
        except PipelineError:
            continue
        assert len((header.quant, header.pooling, header.context_length)) == 3


def read_safetensors(data: bytes) -> None:
    """The JSON of a header; the data has the length that the header may want, or another."""
    head = len(data).to_bytes(8, "little") + data
    for size in (len(head), len(head) + 4, len(head) + 64):
        try:
            safetensors.head(readable(head, size))
        except PipelineError:
            continue


def read_index(data: bytes) -> None:
    try:
        names = checkpoint.weight_files({checkpoint.INDEX: 1, "a.safetensors": 1}, lambda: data, "")
    except PipelineError:
        return
    assert names == ["a.safetensors"]


def read_start(data: bytes) -> None:
    contents.foreign(data[: contents.START])


TARGETS = {
    "gguf": read_gguf,
    "safetensors": read_safetensors,
    "index": read_index,
    "start": read_start,
}


def main() -> None:
    from bounded_reads import replace  # loads what is to be instrumented first

    target, *words = sys.argv[1:]
    middle = words.index("--")
    replace(words[:middle])
    atheris.Setup([sys.argv[0], *words[middle + 1 :]], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
