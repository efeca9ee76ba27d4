"""GGUF to a smaller GGUF, with llama-quantize."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.process import capture, last_lines, run
from pipeline.core.progress import bar
from pipeline.core.sandbox import strength
from pipeline.core.store import artifacts, receipts, stat_cache
from pipeline.core.store.receipts import Recipe

from . import gguf, imatrix, tools
from .convert import Conversion
from .resolve import Resolved

COPIES = 4  # of the weights, at most: the largest tensor as read, as 32-bit numbers, and quantized


class Quantization(Struct, frozen=True, kw_only=True):
    """One quantization, of what `conversion` makes or of the user's own file `input`."""

    resolved: Resolved
    target: Path
    input: Path
    conversion: Conversion | None
    quant: str
    imatrix: Path | None

    def input_identity(self, home: Home, *, hashing: bool = False) -> str | None:
        """The digest of the input, whether or not it still exists; None where it is not known.

        The user's own files are hashed only with `hashing`.
        """
        if self.conversion is None:
            lookup = stat_cache.identity if hashing else stat_cache.recall
            cache = home.run / "sha256.json"
            digests = [lookup(cache, path) for path in gguf.shards(self.input)]
        else:
            entry = receipts.load(self.input.parent).get(self.input.name)
            is_current = entry and entry.recipe == self.conversion.recipe
            digests = [entry.sha256 if entry and is_current else None]
        return None if None in digests else "sha256:" + "+".join(map(str, digests))

    def recipe(self, home: Home, tool: Mapping[str, Any], input: str) -> Recipe:
        """What the result depends on; `input` is the input's digest."""
        matrix = self.imatrix and stat_cache.identity(home.run / "sha256.json", self.imatrix)
        return {
            "step": "quantize",
            "input": input,
            "type": self.quant,
            "imatrix": matrix and f"sha256:{matrix}",
            "tool": dict(tool),
        }


def argv(
    quantization: Quantization, program: Path, made: Path, matrix: Path | None = None
) -> list[str]:
    """llama-quantize's command line: options first, then input, output and type."""
    options = ["--imatrix", str(matrix)] if matrix else []
    return [str(program), *options, str(quantization.input), str(made), quantization.quant]


def result_bytes(quantization: Quantization, program: Path) -> int:
    """The size of the result, by a dry run of llama-quantize."""
    command = argv(quantization, program, quantization.target)
    output = capture(
        [command[0], "--dry-run", *command[1:]],
        timeout=120,
        env=tools.env(),
        sandbox=tools.sandbox(program, read=gguf.shards(quantization.input)),
    )
    size = re.search(r"quant size\s*=\s*([\d.]+) MiB", output or "")
    # Plus the vocabulary and the table of tensors.
    return int(float(size[1]) * 1024 * 1024) + 32 * 1024 * 1024 if size else 0


def make(
    quantization: Quantization,
    home: Home,
    program: Path,
    tool: Mapping[str, Any],
    *,
    imatrix_program: Path | None = None,
    force: bool = False,
) -> None:
    """Make the quantized GGUF unless it is current. `imatrix_program` computes the matrix where a
    text is given instead. Raises PipelineError."""
    digest = quantization.input_identity(home, hashing=True)
    if digest is None:
        raise PipelineError(
            f"{quantization.input}: has no matching receipt", "run the same command again"
        )
    recipe = quantization.recipe(home, tool, digest)
    name = f"{quantization.resolved.name} to {quantization.quant}"

    def maker(made: Path) -> None:
        quant = quantization.quant.lower()
        log = home.logs / f"quantize-{quantization.resolved.slug}-{quant}.log"

        matrix = quantization.imatrix
        if matrix and imatrix_program:
            text, digest = matrix, recipe["imatrix"]
            matrix = quantization.target.with_name(f"imatrix-{digest.partition(':')[2][:12]}.gguf")
            imatrix.make(
                matrix,
                model=quantization.input,
                text=text,
                inputs={"input": recipe["input"], "text": digest, "tool": dict(tool)},
                program=imatrix_program,
                home=home,
            )

        with bar(f"quantizing {name}") as update:

            def watch(line: str) -> None:
                counter = re.match(r"\[\s*(\d+)/\s*(\d+)\]", line)
                if counter:
                    update(int(counter[1]), int(counter[2]))

            inputs = gguf.shards(quantization.input)
            weights = sum(path.stat().st_size for path in inputs)
            status = run(
                argv(quantization, program, made, matrix),
                log=log,
                env=tools.env(),
                on_line=watch,
                timeout=tools.seconds("quantize", weights),
                sandbox=tools.sandbox(
                    program,
                    read=[*inputs, *([matrix] if matrix else [])],
                    write=[made],
                    weights=weights,
                    copies=COPIES,
                ),
            )
        if status:
            raise PipelineError(
                f"quantizing {name} failed (status {status}):\n{last_lines(log, 5)}",
                f"the whole log is {log}",
            )
        gguf.read(made)  # the program does not notice a full disk, this does

    artifacts.make(
        quantization.target,
        recipe,
        maker,
        need=result_bytes(quantization, program) if quantization.input.exists() else 0,
        source=quantization.resolved.source,
        force=force,
        sandbox=strength().name,
    )
