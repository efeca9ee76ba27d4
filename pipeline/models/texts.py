"""Prose from llama.cpp's pinned tree: a text to compute importance matrices from, and another
to measure quality on.

Which documents is pinned by their sha256, so that a figure can be compared with one that was
measured elsewhere. They are split by whole documents: a quant that was tuned on one text is
measured on another.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Literal
from unicodedata import category

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import publish

Use = Literal["calibration", "test"]
NAMES = {"calibration": "llama.cpp-calibration.txt", "test": "llama.cpp-test.txt"}
ORIGIN = "prose of llama.cpp's documents and comments, pinned by sha256"
VERSION = 1  # of how prose is told from the rest
LEAST_WORDS = 12  # of a paragraph: less is a heading, or an item of a list
LEAST_LETTERS = 40  # the same in scripts that put no blanks between words
PLAIN = 0.9  # of a paragraph: letters, blanks and commas; less is code or a table
COMMENT = re.compile(r"/\*(.*?)\*/", re.S)


def prose(document: str, *, is_code: bool = False) -> list[str]:
    """The paragraphs of a document in Markdown, or of the comments in C, each on one line."""
    blocks = COMMENT.findall(document) if is_code else [document]
    paragraphs = (
        " ".join(part.split()) for block in blocks for part in re.split(r"\n\s*\n", block)
    )
    return [paragraph for paragraph in paragraphs if _is_prose(paragraph)]


def _is_prose(paragraph: str) -> bool:
    plain = sum(letter.isalpha() or letter in " ,.'" for letter in paragraph)
    kinds = [category(letter)[0] for letter in paragraph if not letter.isascii()]
    marks = kinds.count("M")  # vowels, in some scripts
    if kinds.count("L") + marks >= LEAST_LETTERS:
        return plain + marks + kinds.count("P") >= PLAIN * len(paragraph)
    is_long = len(paragraph.split(maxsplit=LEAST_WORDS)) >= LEAST_WORDS
    return is_long and plain >= PLAIN * len(paragraph)


def read(tree: Path, use: Use) -> str:
    """The text for this use from llama.cpp's source in `tree`, a blank line between paragraphs.
    Raises PipelineError where a document is missing or is not the pinned one."""
    paragraphs: dict[str, None] = {}  # without those that a document repeats
    for name, digest in pins().llama_cpp_texts[use].items():
        try:
            data = (tree / name).read_bytes().replace(b"\r\n", b"\n")  # as git may check it out
        except OSError as error:
            raise PipelineError(
                f"{tree / name}: cannot be read: {error.strerror}",
                "pass text=PATH, a text of yours",
            ) from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise PipelineError(
                f"{tree / name}: is not the pinned document: another text gives other figures",
                "pass text=PATH, a text of yours, or use the pinned llama.cpp",
            )
        paragraphs |= dict.fromkeys(prose(data.decode(), is_code=name.endswith(".h")))
    return "\n\n".join(paragraphs) + "\n"


def save(tree: Path, use: Use, home: Home) -> Path:
    """The same text as a file in `home`. Raises PipelineError."""
    target = home.run / "texts" / NAMES[use]
    data = read(tree, use).encode()
    with publish.disk_errors(home.run):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.is_file() and target.read_bytes() == data):
            publish.publish_beside(target, data)
    return target


def identity(use: Use) -> str:
    """A hash that changes whenever the text for this use does; the documents need not be here."""
    pinned = json.dumps(pins().llama_cpp_texts[use], sort_keys=True)
    return f"sha256:{hashlib.sha256(pinned.encode()).hexdigest()}"
