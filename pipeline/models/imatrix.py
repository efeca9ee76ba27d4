"""An importance matrix computed from a text with llama-imatrix: which weights matter in use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.process import last_lines, run
from pipeline.core.progress import bar
from pipeline.core.sandbox import strength
from pipeline.core.store import artifacts

from . import contents, gguf, tools

COPIES = 2  # of the weights, at most: repacked for the processor, and buffers to compute in
SILENT_SECONDS = 3600  # it prints each chunk of 512 tokens; their number depends on the text


def is_text(path: Path) -> bool:
    """Whether a file starts as texts do: valid UTF-8 without a zero byte. A matrix does not."""
    with path.open("rb") as file:
        start = file.read(4096)
    try:
        start[:-4].decode()  # the last letter may be cut in two
    except UnicodeDecodeError:
        return False
    return b"\0" not in start


def require_usable(path: Path) -> None:
    """Raise PipelineError where a file is neither a matrix nor a text to compute one from."""
    contents.require_real(path)
    with path.open("rb") as file:
        start = file.read(len(gguf.MAGIC))
    if not start:
        raise UsageError(f"imatrix={path}: is empty")
    if start == gguf.MAGIC and gguf.read(path).values.get("general.type") != "imatrix":
        raise UsageError(
            f"imatrix={path}: is a GGUF, and no importance matrix",
            "pass one that llama-imatrix wrote, or a text to compute it from",
        )


def make(
    target: Path,
    *,
    model: Path,
    text: Path,
    inputs: Mapping[str, Any],
    program: Path,
    home: Home,
) -> None:
    """Make the matrix of `model` for `text`; the recipe names both by `inputs`. Raises
    PipelineError."""

    def maker(made: Path) -> None:
        log = home.logs / f"{target.parent.name}-{target.stem}.log"
        total = 0

        with bar(f"computing the importance matrix of {text.name}") as update:

            def watch(line: str) -> None:
                nonlocal total
                if chunks := re.search(r"computing over (\d+) chunks", line):
                    total = int(chunks[1])
                if done := re.findall(r"\[(\d+)\][\d.]+,", line):
                    update(int(done[-1]), total)

            status = run(
                [
                    *(str(program), "--model", str(model), "--file", str(text)),
                    *("--output", str(made), "--output-format", "gguf"),
                ],
                log=log,
                env=tools.env(),
                on_line=watch,
                patience=SILENT_SECONDS,
                sandbox=tools.sandbox(
                    program,
                    read=[*gguf.shards(model), text],
                    write=[made],
                    weights=sum(path.stat().st_size for path in gguf.shards(model)),
                    copies=COPIES,
                ),
            )
        if status or not made.stat().st_size:
            raise PipelineError(
                f"the importance matrix could not be computed from {text} (status {status}):\n"
                f"{last_lines(log, 5)}",
                f"the text must have some thousand words at least; the whole log is {log}",
            )
        gguf.read(made)

    artifacts.make(target, {"step": "imatrix", **inputs}, maker, sandbox=strength().name)
