"""safetensors to GGUF, with llama.cpp's own converter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import artifacts
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.process import last_lines, run
from pipeline.core.progress import bar
from pipeline.core.publish import remove
from pipeline.core.receipts import Recipe

from . import converter, gguf
from .resolve import Resolved, slug

BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One conversion. `script` is the converter; `keep` is false for a step on the way."""

    resolved: Resolved
    target: Path
    outtype: str
    script: Path
    recipe: Recipe
    keep: bool

    @property
    def need(self) -> int:
        """About how many bytes the result takes."""
        source = BITS.get(self.resolved.precision, 16.0)
        return int(self.resolved.bytes * BITS[self.outtype] / source * 1.02)


def argv(conversion: Conversion, python: Path, folder: Path, made: Path) -> list[str]:
    """The converter's command line. The name is given, so that folders do not shape the bytes."""
    return [
        *(str(python), str(conversion.script), str(folder), "--outfile", str(made)),
        *("--outtype", conversion.outtype.lower(), f"--model-name={conversion.resolved.name}"),
    ]


@contextmanager
def _staged(conversion: Conversion, made: Path) -> Iterator[Path]:
    """A folder with the converter's input. It is named after the model, whose metadata the
    converter takes from there."""
    resolved = conversion.resolved
    top = made.with_name(f"{made.name}.in")
    remove(top)  # a killed run's
    try:
        folder = top / slug(resolved.name)
        files = {file.name: resolved.folder / file.name for file in resolved.files}
        converter.stage(files, folder)
        yield folder
    finally:
        remove(top)


def make(conversion: Conversion, home: Home, *, force: bool = False) -> None:
    """Have the GGUF. Raises PipelineError."""

    def maker(made: Path) -> None:
        resolved = conversion.resolved
        log = home.logs / f"convert-{resolved.slug}-{conversion.outtype.lower()}.log"
        with (
            _staged(conversion, made) as folder,
            bar(f"converting {resolved.name} to {conversion.outtype}") as update,
        ):
            full: list[str] = []

            def watch(line: str) -> None:
                percent = re.match(r"Writing:\s+(\d+)%", line)
                if percent:
                    update(int(percent[1]), 100)
                if "No space left" in line:
                    full.append(line)

            command = argv(conversion, converter.python(home), folder, made)
            status = run(command, log=log, env=converter.environment(), on_line=watch)
        if status:
            raise PipelineError(
                f"{resolved.name} could not be converted (status {status}):\n{last_lines(log)}",
                "the disk is full: free some space" if full else f"the whole log is {log}",
            )
        gguf.read(made)

    artifacts.make(
        conversion.target,
        conversion.recipe,
        maker,
        need=conversion.need,
        source=conversion.resolved.source,
        keep=conversion.keep,
        force=force,
    )
