"""Recognize, by its first bytes, a file that is not the model or part of one that it should be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from pipeline.core.errors import PipelineError
from pipeline.core.text import printable
from pipeline.core.text import size as shown_size

START = 1024  # bytes that tell what a file is
MAX_SIDE_FILE = 256 * 1024 * 1024  # bytes; the largest known tokenizer.json has some 30 MB

LFS = "run `git lfs install` and `git lfs pull` in its folder, or download the file itself"
PAGE = "download the file itself: on the hub its address has /resolve/ in it, not /blob/"
UNPACK = "unpack it, and pass the model in it"
OLD = "llama.cpp has not read such files since August 2023: get the model as GGUF"
PICKLED = "loading it runs code, so it is not used: get the model as safetensors or GGUF"

# What an unfinished download or a clone without its large files leaves in place of any file.
PLACEHOLDERS = (
    (rb"version https://git-lfs|version https://hawser", "is a Git LFS pointer, not the file", LFS),
    (rb"# xet version", "is a Xet pointer, not the file", LFS),
    (rb"[./]*(\.git/annex|annex)/objects/", "is a git-annex pointer", "run `git annex get` on it"),
    (rb"(?i)\s*(?>(?:<!--.*?-->\s*)*)<(!doctype )?html", "is a web page (HTML)", PAGE),
    (rb"(?i)\s*<\?xml|\s*<error>", "is XML, which a server sends for an error", PAGE),
    (rb"\0{512}", "begins with zeros: its download never finished", "download it again"),
)
# Whole files of other kinds; the first match is the nearest.
OTHERS = (
    (rb"(?s)GGUF\0\0\0[\x01-\x07]", "is a big-endian GGUF, for other processors",
     "get the little-endian one, or convert it with llama.cpp's gguf-py (gguf_convert_endian)"),
    (rb"GGUF\x01\0\0\0", "is a GGUF of version 1, which llama.cpp no longer reads",
     "get a newer conversion of the model"),
    (rb"lmgg|ggml", "is an old GGML file, or one of whisper.cpp", OLD),
    (rb"fmgg|ggmf", "is an old GGML file (GGMF)", OLD),
    (rb"tjgg|ggjt", "is an old GGML file (GGJT)", OLD),
    (rb"algg|ggla", "is an old LoRA adapter (GGLA)", OLD),
    (rb"(?s)PK\x03\x04.{26}[^\0]*data\.pkl", "is a PyTorch checkpoint (pickled)", PICKLED),
    (rb"\x80[\x02-\x05]", "is a pickled checkpoint", PICKLED),
    (rb"PK\x03\x04.*\.np[yz]|\x93NUMPY", "is a NumPy file", "get the model as safetensors or GGUF"),
    (rb"PK\x03\x04", "is a zip archive", UNPACK),
    (rb"(?s).{257}ustar", "is a tar archive", UNPACK),
    (rb"\x1f\x8b|BZh[1-9]|\xfd7zXZ|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18", "is compressed", UNPACK),
    (rb"7z\xbc\xaf|Rar!", "is a 7z or RAR archive", UNPACK),
    (rb"MZqFpD|jartsr", "is a llamafile: a program with a model in it",
     "unpack the .gguf in it with `unzip`"),
    (rb"MZ|\x7fELF|#!", "is a program", "pass the model itself"),
    (rb"\x89HDF", "is a Keras or HDF5 file", "get the model as safetensors or GGUF"),
    (rb"(?s).{4}TFL3", "is a TensorFlow Lite model", "get the model as safetensors or GGUF"),
    (rb"(?s)\x08[\x01-\x14](\x12|\x1a|\x22|\x3a|\x42)", "is an ONNX model",
     "get the model as safetensors or GGUF"),
    (rb"(?s)(?!GGUF).{5}\0{3}\{", "is a safetensors file",
     "name it *.safetensors, and pass the folder that holds it and config.json"),
    (rb"\s*[{\[]", "is JSON, as a server sends it for an error", "download the file again"),
)  # fmt: skip


class ForeignFile(PipelineError):
    """A file is of another kind than its name says."""


def require_no_placeholder(data: bytes, where: str) -> None:
    """Raise PipelineError where something stands in the place of a file that begins with `data`."""
    if kind := _first(PLACEHOLDERS, data[:START]):
        raise PipelineError(f"{where}: {kind[0]}", kind[1])


def foreign(start: bytes) -> tuple[str, str] | None:
    """What a file that begins with `start` is instead of a GGUF or safetensors, and the way out;
    None: nothing that is known."""
    return _first((*PLACEHOLDERS, *OTHERS), start)


def _first(table: Sequence[tuple[bytes, str, str]], start: bytes) -> tuple[str, str] | None:
    if not start:
        return "is empty", "download it again"
    return next(((what, hint) for form, what, hint in table if re.match(form, start)), None)


def _require_finished(path: Path) -> None:
    """Raise PipelineError where aria2 has not finished a file, which has its full size at once."""
    control = path.with_name(f"{path.name}.aria2")
    if control.exists():
        raise ForeignFile(
            f"{path}: aria2 has not finished it ({control.name} is beside it)",
            "let it finish: `aria2c -c` with the same address",
        )


def require_real(path: Path) -> None:
    """Raise PipelineError where something stands in the place of a file beside the weights."""
    with path.open("rb") as file:
        start = file.read(START)
    if start or path.suffix == ".json":  # others may be empty
        require_no_placeholder(start, str(path))


def require_small(name: str, size: int, most: int = MAX_SIDE_FILE) -> None:
    """Raise PipelineError where a file beside the weights is too large to be read."""
    if size > most:
        raise PipelineError(f"{name}: has {shown_size(size)}, which is too large for such a file")


class Readable(Struct, frozen=True, kw_only=True):
    """A file of `size` bytes that may be anywhere; `read(start, stop)` gets the bytes between."""

    name: str
    size: int
    read: Callable[[int, int], bytes]

    def get(self, start: int, stop: int) -> bytes:
        """Exactly these bytes. Raises PipelineError where fewer or more came."""
        data = self.read(start, stop) if stop > start else b""
        if len(data) != stop - start:
            raise PipelineError(
                f"{self.name}: {stop - start} bytes were requested and {len(data)} received",
                "run the same command again",
            )
        return data

    def whole(self) -> bytes:
        """All of a small file. Raises PipelineError for a large one."""
        require_small(self.name, self.size)
        return self.get(0, self.size)


def buffered(file: Readable, first: int) -> Readable:
    """The same file, whose bytes are kept from its start on: `first` of them are read at once, then
    twice as many each time, so that a long header takes few requests."""
    data = b""

    def read(start: int, stop: int) -> bytes:
        nonlocal data
        if stop > len(data):
            to = min(file.size, max(stop, first, 2 * len(data)))
            data += file.get(len(data), to)
        return data[start:stop]

    return Readable(name=file.name, size=file.size, read=read)


def local(path: Path, name: str = "") -> Readable:
    """A file on this machine; its name is the path by default. Raises PipelineError where it cannot
    be read, or aria2 has not finished it."""
    _require_finished(path)

    @contextmanager
    def explained() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PipelineError(f"{path}: cannot be read: {error.strerror}") from None

    def read(start: int, stop: int) -> bytes:
        with explained(), path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    with explained():
        return Readable(name=name or str(path), size=path.stat().st_size, read=read)


def shown(value: object) -> str:
    """A value from a file, for a message: short, and without what a terminal would interpret."""
    return printable(str(value)[:80])
