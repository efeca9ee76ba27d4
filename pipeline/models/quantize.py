"""GGUF to a smaller GGUF with llama-quantize, and how big it becomes, by dry runs on its header."""

from __future__ import annotations

import hashlib
import re
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.process import last_lines, run
from pipeline.core.progress import bar
from pipeline.core.sandbox import strength
from pipeline.core.store import artifacts, json_file, receipts, stat_cache
from pipeline.core.store.publish import require_disk
from pipeline.core.store.receipts import Recipe

from . import gguf, imatrix, mix, quants, tensor_errors, texts, tools
from .convert import Conversion, Unquantized
from .gguf_format import padded
from .mix import dry_run
from .quants import NEED_IMATRIX, TENSOR_TYPES, Budget
from .resolve import Resolved

VERSION = "general.quantization_version"
ADDED = 45  # bytes, where it has to be added
# With an importance matrix llama-quantize chooses some types differently. A dry run does not use
# its values: one entry, `x`, with one value, in the older format.
MATRIX = struct.pack("<ii1siif", 1, 1, b"x", 1, 1, 1.0)
MIX_METHOD = 1  # of choosing a mix; another number makes every mix anew
COPIES = 4  # of the weights, at most: the largest tensor as read, as 32-bit numbers, and quantized


class Quantization(Struct, frozen=True, kw_only=True):
    """One quantization, of what `conversion` makes or of the user's own file `input`."""

    resolved: Resolved
    target: Path
    input: Path
    conversion: Conversion | None
    quant: str
    imatrix: Path | None
    types: Mapping[str, str] | None = None  # those of a mix that a lock file pins

    @property
    def budget(self) -> Budget | None:
        """The size of a mix; None for any other quant."""
        return quants.budget(self.quant)

    @property
    def mix(self) -> Path:
        """The file with the types of a mix, tensor by tensor."""
        return self.target.with_name(f"mix.{self.quant.lower()}.json")

    def mix_recipe(self, home: Home, tool: Mapping[str, Any], input: str) -> Recipe:
        """What the choice of the types depends on; as `recipe`."""
        return {"step": "mix", "method": MIX_METHOD, **self._origin(home, tool, input)}

    def chosen(self, home: Home, tool: Mapping[str, Any], input: str) -> Mapping[str, str] | None:
        """The types of a mix by tensor, as pinned or as chosen before; None: not chosen yet."""
        if self.types is not None:
            return self.types
        status = receipts.status(self.mix, self.mix_recipe(home, tool, input))
        if status is not receipts.Status.CURRENT:
            return None
        return json_file.read(self.mix, types_in)

    def input_identity(self, home: Home, *, hashing: bool = False) -> str | None:
        """The digest of the input, whether or not it still exists; None where it is not known.

        The user's own files are hashed only with `hashing`.
        """
        source = Unquantized(path=self.input, conversion=self.conversion)
        digest = source.digest(home, hashing=hashing)
        return f"sha256:{digest}" if digest else None

    def require_input(self, home: Home) -> str:
        """The digest of the input. Raises PipelineError where it is not known."""
        if (digest := self.input_identity(home, hashing=True)) is None:
            raise PipelineError(
                f"{self.input}: has no matching receipt", "run the same command again"
            )
        return digest

    def recipe(self, home: Home, tool: Mapping[str, Any], input: str) -> Recipe:
        """What the result depends on; `input` is the input's digest."""
        recipe = {"step": "quantize", **self._origin(home, tool, input)}
        if self.budget:
            types = self.chosen(home, tool, input)
            listed = tensor_errors.type_list(types) if types else ""
            recipe["mix"] = f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"
        return recipe

    def _origin(self, home: Home, tool: Mapping[str, Any], input: str) -> dict[str, Any]:
        matrix = self.imatrix and stat_cache.identity(home.digests, self.imatrix)
        origin = {
            "input": input,
            "type": self.quant,
            "imatrix": matrix and f"sha256:{matrix}",
            "tool": dict(tool),
        }
        if self.budget and not matrix:
            origin["text"] = texts.identity("calibration")
        return origin


def types_in(mix: Mapping[str, Any]) -> dict[str, str]:
    """The type of each tensor, from the file of a mix."""
    return {str(name): str(kind) for name, kind in mix["types"].items()}


def argv(
    quantization: Quantization,
    program: Path,
    made: Path,
    matrix: Path | None = None,
    types: Path | None = None,
    quant: str = "",
) -> list[str]:
    """llama-quantize's command line, for the folder of the matrix: options first, then input,
    output and type. The name of the matrix becomes a part of the GGUF, where a path would tell of
    this machine, and make other bytes on each. `types` is a list of a mix's types by tensor, and
    `quant` what the file is called then."""
    options = ["--imatrix", f"./{matrix.name}"] if matrix else []
    options += ["--tensor-type-file", str(types)] if types else []
    quant = quant or quantization.quant
    return [str(program), *options, str(quantization.input), str(made), quant]


def quant_sizes(
    program: Path, skeleton: Path, requested: Iterable[str], matrix: Path | None = None
) -> dict[str, int]:
    """The file size in bytes of each requested quant made from `skeleton`, split or not, as one
    file; of a mix the most that it may have. Raises UsageError where there is no such mix.

    `matrix` is the user's importance matrix, which may not know all tensors of a mix, or a text;
    types that need one are made with one in any case. A type that llama-quantize refuses for this
    model is left out.
    """
    first, *others = (gguf.read(path) for path in gguf.shards(skeleton))
    # The first part of a split one has the texts; the table of tensors is in all of them.
    start = first.data + sum(header.data for header in others)
    start += 0 if VERSION in first.values else ADDED
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        any_matrix = Path(folder) / "imatrix.dat"
        any_matrix.write_bytes(MATRIX)
        for quant in requested:
            if size := quants.budget(quant):
                weights = mix.look(program, skeleton)
                room = mix.require_possible(size, weights, weighed(matrix, skeleton))
                sizes[quant] = weights.file_bytes(room)
                continue
            is_weighed = matrix is not None or quant in NEED_IMATRIX
            output = dry_run(program, skeleton, quant, any_matrix if is_weighed else None)
            tensors = tensor_bytes(output)
            if tensors is not None:
                sizes[quant] = padded(start) + tensors  # it keeps no other alignment
    return sizes


def require_possible(quantization: Quantization, source: Path, program: Path) -> None:
    """Raise UsageError where a mix of that size cannot be made of the GGUF `source`, which may be a
    skeleton, with the importance matrix that there is or will be. `program` is llama-quantize."""
    if quantization.budget:
        weights = mix.look(program, source)
        mix.require_possible(quantization.budget, weights, weighed(quantization.imatrix, source))


def weighed(matrix: Path | None, source: Path) -> Callable[[str], bool]:
    """Whether the importance matrix for the GGUF `source` knows a tensor: the user's, or the one
    that is computed."""
    if matrix and not imatrix.is_text(matrix):
        return tensor_errors.weights(matrix).__contains__
    return mix.weighed(gguf.read(source))


def tensor_bytes(output: str) -> int | None:
    """The size of the tensors by the output of a dry run; None where it has none, or a type that is
    not known here."""
    total = 0
    for tensor, kind in mix.tensors_of(output):
        if kind not in TENSOR_TYPES:
            return None
        total += tensor.bytes(kind)
    return total or None


def make(
    quantization: Quantization,
    home: Home,
    program: Path,
    tool: Mapping[str, Any],
    *,
    imatrix_program: Path | None = None,
    matrix_made: Path | None = None,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Make the quantized GGUF unless it is current. `imatrix_program` computes the matrix where a
    text is given instead; a mix takes `matrix_made`, and has been chosen. `check` looks at the
    result before it is published. Raises PipelineError."""
    digest, source = quantization.require_input(home), quantization.input
    types = quantization.chosen(home, tool, digest) if quantization.budget else None

    def maker(made: Path) -> None:
        matrix = matrix_made or quantization.imatrix
        if matrix and imatrix_program and not matrix_made:
            matrix = imatrix.make(
                quantization.target.parent,
                model=source,
                digest=digest,
                text=matrix,
                program=imatrix_program,
                tool=tool,
                home=home,
            )
        name = f"{quantization.resolved.name} to {quantization.quant}"
        file = f"quantize-{quantization.resolved.slug}-{quantization.quant.lower()}.log"
        with bar(f"quantizing {name}") as update, listed(types) as type_file:

            def watch(line: str) -> None:
                if counter := re.match(r"\[\s*(\d+)/\s*(\d+)\]", line):
                    update(int(counter[1]), int(counter[2]))

            run_program(
                argv(quantization, program, made, matrix, type_file, mix.file_type(types or {})),
                name,
                model=source,
                made=made,
                read=[file for file in (matrix, type_file) if file],
                log=home.logs / file,
                cwd=matrix and matrix.parent,
                on_line=watch,
            )
        tools.read_made(made)
        if check:
            check(made)

    artifacts.make(
        quantization.target,
        quantization.recipe(home, tool, digest),
        maker,
        need=_need(quantization, program) if source.exists() else 0,
        source=quantization.resolved.source,
        force=force,
        sandbox=strength().name,
    )


def _need(quantization: Quantization, program: Path) -> int:
    """The bytes of the result; 0 where llama-quantize refuses to make it."""
    quant = quantization.quant
    sizes = quant_sizes(program, quantization.input, [quant], quantization.imatrix)
    return sizes.get(quant, 0)


def run_program(
    argv: Sequence[str],
    name: str,
    *,
    model: Path,
    made: Path,
    read: Sequence[Path],
    log: Path,
    append: bool = False,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Run llama-quantize, which makes `made` of the GGUF `model` and reads `read` beside it; `name`
    says for messages what it makes. Raises PipelineError."""
    status = run(
        argv,
        log=log,
        append=append,
        env=tools.env(),
        cwd=cwd,
        on_line=on_line,
        timeout=tools.seconds("quantize", gguf.file_bytes(model)),
        sandbox=tools.sandbox(
            Path(argv[0]),
            model=model,
            read=read,
            write=[made],
            copies=COPIES,
        ),
    )
    if status:
        require_disk(made.parent, last_lines(log))
        raise PipelineError(
            f"quantizing {name} failed (status {status}):\n{last_lines(log, 5)}",
            f"the whole log is {log}",
        )


@contextmanager
def listed(types: Mapping[str, str] | None) -> Iterator[Path | None]:
    """A file with the types of a mix, as llama-quantize reads it; None without types."""
    if not types:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "types.txt"
        file.write_text(tensor_errors.type_list(types), "ascii")
        yield file
