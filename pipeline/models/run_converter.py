"""Run the official converter, with less to load; after HEADER only its result's header is written,
after ONE_PASS the tensors are quantized at once, by run_quantizer.py.

Started with the converter's own Python: this file, one of these or not (ONE_PASS is followed by a
folder), the converter's path, its words.
The converter's tensors are lazy: for a header, what is not written is mostly not read or computed
either. Some models are repacked at once all the same (NVFP4 checkpoints, the experts of DeepSeek
V4): there the memory is bounded, and the exit status is TOO_MUCH.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import Any

HEADER, ONE_PASS = "--header", "--one-pass"  # words of this program's own
QUANTIZER = Path(__file__).with_name("run_quantizer.py")
TOO_MUCH = 75  # EX_TEMPFAIL of sysexits.h
MOST_MEMORY = 2 * 1024**3  # bytes; a model of 70 billion weights takes 0.4


def write_no_tensors(writer: Any, *, progress: bool = False) -> None:
    """In the place of GGUFWriter.write_tensors_to_file: what comes before the first tensor."""
    writer.write_ti_data_to_file()
    for file in writer.fout:
        writer.write_padding(file, file.tell(), writer.data_alignment)


def hide_torch_from_transformers() -> None:
    """transformers is asked for tokenizers and configurations, which need no torch; loading what
    it has for torch takes a third of the time. The converter itself still has torch."""
    find = importlib.util.find_spec

    def without_torch(name: str, package: str | None = None) -> Any:
        return None if name in ("torch", "torchvision") else find(name, package)

    importlib.util.find_spec = without_torch
    try:
        importlib.import_module("transformers.utils").is_torch_available()  # which it remembers
    except (ImportError, AttributeError):
        pass  # of another version: then it is slower
    finally:
        importlib.util.find_spec = find


def load_torch() -> None:
    """Load what the converter loads first. No garbage is looked for meanwhile: there is none, and
    that would be done a hundred times."""
    gc.disable()
    with contextlib.suppress(ImportError):  # the converter says it
        importlib.import_module("torch")
    hide_torch_from_transformers()
    gc.freeze()
    gc.enable()


def bound_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        resource = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))


def main(words: list[str]) -> None:
    is_header, is_one_pass = words[0] == HEADER, words[0] == ONE_PASS
    script, *rest = words[is_header + 2 * is_one_pass :]
    # As Python itself and the converter have it: the gguf package of the same tree.
    folder = Path(script).parent
    sys.path[0] = str(folder)
    sys.path.insert(1, str(folder / "gguf-py"))
    if is_header:
        bound_memory()
        importlib.import_module("gguf").GGUFWriter.write_tensors_to_file = write_no_tensors
    if is_one_pass:
        write = runpy.run_path(str(QUANTIZER))["writer_of"](Path(words[1]))
        importlib.import_module("gguf").GGUFWriter.write_tensors_to_file = write
    load_torch()
    sys.argv = [script, *rest]
    try:
        runpy.run_path(script, run_name="__main__")
    except (MemoryError, RuntimeError) as error:  # numpy raises the one, torch the other
        if is_header and (isinstance(error, MemoryError) or "allocate memory" in str(error)):
            sys.exit(TOO_MUCH)
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # to take all that apart costs a tenth of a short conversion
