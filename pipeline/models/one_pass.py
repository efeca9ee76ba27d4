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
from .gguf_format import MAGIC, padded
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
    if matrix:
        with matrix.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        if imatrix.is_text(matrix):
            return "imatrix= is a text, and the unquantized GGUF has to read it"
        if not is_gguf:
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
    resolved, matrix = conversion.resolved, quantization.imatrix
    title = f"{resolved.name} to {quantization.quant}"
    log_file = home.logs / f"quantize-{resolved.slug}-{quantization.quant.lower()}.log"
    # Of the input only the hash is made, and known once all of it was converted.
    recipe = dict(quantization.recipe(home, tool, quantization.input_identity(home) or ""))

    def maker(made: Path) -> None:
        made.touch()
        with (
            staging.workspace(made, slug(resolved.name)) as (folder, scratch),
            bar(f"converting and quantizing {title}") as update,
        ):
            # Not in `scratch`, where a hostile model could put a link in the place of a file.
            exchange = scratch.with_name(".exchange")
            exchange.mkdir()
            header, plan_file, result_file = (exchange / n for n in (HEADER, PLAN, RESULT))
            plan_file.touch()
            watch = convert.progress(update)
            words = convert.argv(conversion, converter.installed(home).python, folder, header)
            declined = ""

            def on_line(line: str) -> None:
                nonlocal declined
                watch(line)
                declined = line  # the last one says why, where it declines
                if line == READY:
                    look(header)
                    plan = planned(quantization, program, header)
                    require_space(made.parent, plan.pop("bytes"))
                    threads = capacity.processors()
                    plan |= {"library": str(library), "out": str(made), "threads": threads}
                    plan_file.write_text(json.dumps(plan) + "\n", encoding="utf-8")

            status = convert.run_converter(
                conversion,
                home,
                [*words[:2], ONE_PASS, str(exchange), *words[2:]],
                folder,
                made,
                scratch,
                log=log_file,
                on_line=on_line,
                read=[QUANTIZER, library.parent, plan_file, *([matrix] if matrix else [])],
                write=[header, result_file],
                timeout=tools.seconds("quantize", resolved.bytes),
            )
            if status == DECLINED:
                raise Declined(declined)
            if status:
                convert.require_whole_converter(home, log_file)
                raise convert.failed(conversion, status, log_file)
            result = json.loads(result_file.read_text(encoding="utf-8"))
        tools.read_made(made)
        recipe["input"] = f"sha256:{result['sha256']}"
        if quantization.types is not None:
            mix_file.record(quantization, home, tool, recipe["input"], force=force)
        receipts.change(
            conversion.target,
            Entry(
                recipe=conversion.recipe,
                size=result["size"],
                mtime_ns=None,  # as of one that was removed
                sha256=result["sha256"],
                made_at=receipts.now(),
                seconds=0,
                source=resolved.source,
                keep=False,
                sandbox=strength().name,
            ),
        )

    def look(header: Path) -> None:
        """The checks of a conversion. Raises PipelineError, or Declined without sparse files."""
        start = gguf.parse(contents.local(header, resolved.name), is_whole=False)
        if not skeleton.extend_by_hole(header, padded(start.size)):
            raise Declined("this disk has no sparse files")
        kinds.require_model([start], resolved.name)
        if check:
            check(header)

    try:
        artifacts.make(
            quantization.target,
            recipe,
            maker,
            source=resolved.source,
            force=force,
            sandbox=strength().name,
        )
    except Declined as why:
        log.info(f"{title}: in two steps, converted and then quantized: {why}")
        return False
    return True


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
