"""safetensors to a quantized GGUF in one pass: no unquantized GGUF is written in between.

The converter writes its header first. llama-quantize says in a dry run on it which type each tensor
becomes; then run_quantizer.py, inside the converter, quantizes what the converter converts. The
result is that of the two steps, byte for byte, and so are its recipe and the receipt of the file in
between, which is hashed though it is never there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from pipeline.core import capacity, log
from pipeline.core.paths import Home
from pipeline.core.progress import bar
from pipeline.core.sandbox import strength
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.publish import require_space
from pipeline.core.store.receipts import Entry

from . import (
    contents,
    convert,
    converter,
    gguf,
    imatrix,
    kinds,
    mix,
    mix_file,
    quantize,
    quants,
    skeleton,
    staging,
    tools,
)
from .convert import Conversion
from .gguf_format import is_gguf, padded
from .quantize import Quantization
from .quants import TENSOR_TYPES
from .resolve import slug
from .run_converter import ONE_PASS, QUANTIZER
from .run_quantizer import DECLINED, HEADER, PLAN, READY, RESULT


class Declined(Exception):
    """It has to be done in two steps; the text says why."""


def obstacle(quantization: Quantization, *, has_library: bool, has_limit: bool = False) -> str:
    """Why a conversion and a quantization take two steps; empty where one pass does both.
    `has_library`: ggml's functions are there as a library, beside llama-quantize; `has_limit`: the
    quant is compared with the unquantized GGUF."""
    conversion, matrix = quantization.conversion, quantization.imatrix
    if conversion is None or conversion.target.exists():
        return "the unquantized GGUF is there"
    if conversion.keep:
        return "keep_f16=1 keeps the unquantized GGUF"
    if has_limit:
        return "max_kld= and min_cosine= compare the quant with the unquantized GGUF"
    if not has_library:
        return "there is no libggml-quantizer of the pinned llama.cpp beside llama-quantize"
    if quantization.budget and quantization.types is None:
        return "a mix is chosen with the unquantized GGUF"
    if quantization.budget and not matrix:
        return "the importance matrix of a mix is computed with the unquantized GGUF"
    if matrix and imatrix.is_text(matrix):
        return "imatrix= is a text, and the unquantized GGUF has to read it"
    if matrix and not is_gguf(matrix):
        return "imatrix= has the older format"
    return ""


def make(
    quantization: Quantization,
    conversion: Conversion,
    home: Home,
    program: Path,
    library: Path,
    tool: Mapping[str, Any],
    *,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> bool:
    """Make the quantized GGUF from safetensors unless it is current. `program` is llama-quantize;
    `check` looks at the header before any tensor is converted. False: the model takes two steps
    after all, which was said. Hold the lock of the unquantized GGUF. Raises PipelineError."""
    making = _Making(quantization, conversion, home, program, library, tool, force, check)
    try:
        artifacts.make(
            quantization.target,
            making.recipe,
            making,
            source=conversion.resolved.source,
            force=force,
            sandbox=strength().name,
        )
    except Declined as why:
        log.info(f"{making.title}: in two steps, converted and then quantized: {why}")
        return False
    return True


class _Making(Struct):
    """What `make` was asked for; called with the path of the file to write."""

    quantization: Quantization
    conversion: Conversion
    home: Home
    program: Path
    library: Path
    tool: Mapping[str, Any]
    force: bool
    check: Callable[[Path], None] | None
    title: str = ""
    recipe: dict[str, Any] = {}

    def __post_init__(self) -> None:
        made_from, tool = self.quantization, self.tool
        self.title = f"{self.conversion.resolved.name} to {made_from.quant}"
        # Of the input only the hash is made, and known once all of it was converted.
        digest = made_from.input_identity(self.home) or ""
        self.recipe = dict(made_from.recipe(self.home, tool, digest))

    def __call__(self, made: Path) -> None:
        made.touch()
        with (
            staging.workspace(made, slug(self.conversion.resolved.name)) as (folder, scratch),
            bar(f"converting and quantizing {self.title}") as update,
        ):
            result = self._convert(made, folder, scratch, convert.progress(update))
        tools.read_made(made)
        self.recipe["input"] = f"sha256:{result['sha256']}"
        if self.quantization.types is not None:
            mix_file.record(
                self.quantization, self.home, self.tool, self.recipe["input"], force=self.force
            )
        receipts.change(
            self.conversion.target,
            Entry(
                recipe=self.conversion.recipe,
                size=result["size"],
                mtime_ns=None,  # as of one that was removed
                sha256=result["sha256"],
                made_at=receipts.now(),
                seconds=0,
                source=self.conversion.resolved.source,
                keep=False,
                sandbox=strength().name,
            ),
        )

    def _convert(
        self, made: Path, folder: Path, scratch: Path, watch: Callable[[str], None]
    ) -> dict[str, Any]:
        """Run the converter; the size and the hash of the GGUF in between. Raises PipelineError,
        or Declined."""
        conversion, quant = self.conversion, self.quantization.quant
        # Not in `scratch`, where a hostile model could put a link in the place of a file.
        exchange = scratch.with_name(".exchange")
        exchange.mkdir()
        header, plan_file, result_file = (exchange / n for n in (HEADER, PLAN, RESULT))
        plan_file.touch()
        words = convert.argv(conversion, converter.installed(self.home).python, folder, header)
        log_file = self.home.logs / f"quantize-{conversion.resolved.slug}-{quant.lower()}.log"
        last = ""  # line, which says why where it declines

        def on_line(line: str) -> None:
            nonlocal last
            watch(line)
            last = line
            if line == READY:
                self._look(header)
                plan_file.write_text(json.dumps(self._plan(header, made)) + "\n", encoding="utf-8")

        matrix = self.quantization.imatrix
        status = convert.run_converter(
            conversion,
            self.home,
            [*words[:2], ONE_PASS, str(exchange), *words[2:]],
            folder,
            made,
            scratch,
            log=log_file,
            on_line=on_line,
            read=[QUANTIZER, self.library.parent, plan_file, *([matrix] if matrix else [])],
            write=[header, result_file],
            timeout=tools.seconds("quantize", conversion.resolved.bytes),
        )
        if status == DECLINED:
            raise Declined(last)
        if status:
            convert.require_whole_converter(self.home, log_file)
            raise convert.failed(conversion, status, log_file)
        result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
        return result

    def _look(self, header: Path) -> None:
        """The checks of a conversion. Raises PipelineError, or Declined without sparse files."""
        name = self.conversion.resolved.name
        start = gguf.parse(contents.local(header, name), is_whole=False)
        if not skeleton.extend_by_hole(header, padded(start.size)):
            raise Declined("this disk has no sparse files")
        kinds.require_model([start], name)
        if self.check:
            self.check(header)

    def _plan(self, header: Path, made: Path) -> dict[str, Any]:
        """What run_quantizer.py is told. Raises PipelineError where the disk has too little room,
        or Declined."""
        plan = planned(self.quantization, self.program, header)
        require_space(made.parent, plan.pop("bytes"))
        threads = capacity.processors()
        return plan | {"library": str(self.library), "out": str(made), "threads": threads}


def planned(quantization: Quantization, program: Path, header: Path) -> dict[str, Any]:
    """What becomes of each tensor, in the order of the final file, and its `bytes`. Raises
    Declined."""
    matrix, pinned = quantization.imatrix, quantization.types
    quant = mix.file_type(pinned) if pinned else quantization.quant
    with quantize.listed(pinned) as listed:
        output = mix.dry_run(program, header, quant, matrix, types=listed)
    types = [(tensor.name, kind) for tensor, kind in mix.tensors_of(output)]
    bytes_ = quantize.tensor_bytes(output)
    if bytes_ is None or len(types) != gguf.read(header).tensors:
        raise Declined("llama-quantize's dry run does not say what becomes of each tensor")
    return {
        "types": [(name, TENSOR_TYPES[kind][0]) for name, kind in types],
        "file_type": next(n for n, name in quants.FILE_TYPES.items() if name == quant),
        "matrix": str(matrix) if matrix else "",
        "matrix_name": f"./{matrix.name}" if matrix else "",
        "bytes": bytes_,
    }
