"""GGUF to a smaller GGUF with llama-quantize: how big it becomes, by dry runs on its header, and
the importance matrix, which says which weights matter in use."""

from __future__ import annotations

import hashlib
import math
import re
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home, require_writable
from pipeline.core.process import last_lines, run
from pipeline.core.progress import bar
from pipeline.core.sandbox import strength
from pipeline.core.store import artifacts, json_file, receipts, stat_cache
from pipeline.core.store.receipts import Recipe

from . import contents, gguf, mix, quants, tensor_errors, texts, tools
from .convert import Conversion
from .gguf_format import MAGIC, padded
from .mix import TENSOR, dry_run
from .quants import NEED_IMATRIX, TENSOR_TYPES, Budget, row_bytes
from .resolve import Resolved

VERSION = "general.quantization_version"
ADDED = 45  # bytes, where it has to be added
# With an importance matrix llama-quantize chooses some types differently. A dry run does not use
# its values: one entry, `x`, with one value, in the older format.
MATRIX = struct.pack("<ii1siif", 1, 1, b"x", 1, 1, 1.0)
MIX_METHOD = 1  # of choosing a mix; another number makes every mix anew
COPIES = 4  # of the weights, at most: the largest tensor as read, as 32-bit numbers, and quantized
IMATRIX_COPIES = 2  # the same, of llama-imatrix: repacked for the processor, and buffers
IMATRIX_SILENCE = 3600  # seconds; it prints each chunk of 512 tokens, as many as the text has


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
        recipe = {"step": "quantize", **self._origin(home, tool, input)}
        if self.budget:
            types = self.chosen(home, tool, input)
            listed = tensor_errors.type_list(types) if types else ""
            recipe["mix"] = f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"
        return recipe

    def _origin(self, home: Home, tool: Mapping[str, Any], input: str) -> dict[str, Any]:
        matrix = self.imatrix and stat_cache.identity(home.run / "sha256.json", self.imatrix)
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
    program: Path,
    skeleton: Path,
    requested: Iterable[str],
    *,
    imatrix: bool = False,
    own_matrix: Path | None = None,
) -> dict[str, int]:
    """The file size in bytes of each requested quant made from `skeleton`, split or not, as one
    file; of a mix the most that it may have. Raises UsageError where there is no such mix.

    `imatrix`: as made with an importance matrix; types that need one always are. `own_matrix` is
    the user's, which may not know all tensors of a mix, or a text. A type that llama-quantize
    refuses for this model is left out.
    """
    first, *others = (gguf.read(path) for path in gguf.shards(skeleton))
    # The first part of a split one has the texts; the table of tensors is in all of them.
    start = first.data + sum(header.data for header in others)
    start += 0 if VERSION in first.values else ADDED
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        matrix = Path(folder) / "imatrix.dat"
        matrix.write_bytes(MATRIX)
        for quant in requested:
            if size := quants.budget(quant):
                weights = mix.look(program, skeleton)
                room = mix.require_possible(size, weights, weighed(own_matrix, skeleton))
                sizes[quant] = weights.file_bytes(room)
                continue
            is_weighed = imatrix or quant in NEED_IMATRIX
            output = dry_run(program, skeleton, quant, matrix if is_weighed else None)
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
    if matrix and not is_text(matrix):
        return tensor_errors.weights(matrix).__contains__
    return mix.weighed(gguf.read(source))


def tensor_bytes(output: str) -> int | None:
    """The size of the tensors by the output of a dry run; None where it has none, or a type that is
    not known here."""
    total = 0
    for _, shape, before, after in TENSOR.findall(output):
        kind = TENSOR_TYPES.get((after or before).lower())
        if kind is None:
            return None
        row, *rows = (int(number) for number in shape.split(","))
        total += padded(row_bytes(kind[0], row) * math.prod(rows))
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
    digest = quantization.input_identity(home, hashing=True)
    if digest is None:
        raise PipelineError(
            f"{quantization.input}: has no matching receipt", "run the same command again"
        )
    recipe = quantization.recipe(home, tool, digest)
    types = quantization.chosen(home, tool, digest) if quantization.budget else None
    need = 0
    if quantization.input.exists():
        sizes = quant_sizes(
            program,
            quantization.input,
            [quantization.quant],
            imatrix=bool(quantization.imatrix),
            own_matrix=quantization.imatrix,
        )
        need = sizes.get(quantization.quant, 0)
    name = f"{quantization.resolved.name} to {quantization.quant}"

    def maker(made: Path) -> None:
        quant = quantization.quant.lower()
        log = home.logs / f"quantize-{quantization.resolved.slug}-{quant}.log"

        matrix = matrix_made or quantization.imatrix
        if matrix and imatrix_program and not matrix_made:
            text, digest = matrix, recipe["imatrix"]
            matrix = quantization.target.with_name(f"imatrix-{digest.partition(':')[2][:12]}.gguf")
            make_imatrix(
                matrix,
                model=quantization.input,
                text=text,
                inputs={"input": recipe["input"], "text": digest, "tool": dict(tool)},
                program=imatrix_program,
                home=home,
            )

        with bar(f"quantizing {name}") as update, listed(types) as type_file:

            def watch(line: str) -> None:
                counter = re.match(r"\[\s*(\d+)/\s*(\d+)\]", line)
                if counter:
                    update(int(counter[1]), int(counter[2]))

            inputs = gguf.shards(quantization.input)
            weights = sum(path.stat().st_size for path in inputs)
            status = run(
                argv(quantization, program, made, matrix, type_file, mix.file_type(types or {})),
                log=log,
                env=tools.env(),
                cwd=matrix and matrix.parent,
                on_line=watch,
                timeout=tools.seconds("quantize", weights),
                sandbox=tools.sandbox(
                    program,
                    read=[*inputs, *filter(None, (matrix, type_file))],
                    write=[made],
                    weights=weights,
                    copies=COPIES,
                ),
            )
        if status:
            require_writable(made.parent)  # the program does not print that the disk is full
            raise PipelineError(
                f"quantizing {name} failed (status {status}):\n{last_lines(log, 5)}",
                f"the whole log is {log}",
            )
        gguf.read(made)  # the program does not notice a full disk, this does
        if check:
            check(made)

    artifacts.make(
        quantization.target,
        recipe,
        maker,
        need=need,
        source=quantization.resolved.source,
        force=force,
        sandbox=strength().name,
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


# Importance matrices


def is_text(path: Path) -> bool:
    """Whether a file starts as texts do: valid UTF-8 without a zero byte. A matrix does not."""
    with path.open("rb") as file:
        start = file.read(4096)
    try:
        start[:-4].decode()  # the last letter may be cut in two
    except UnicodeDecodeError:
        return False
    return b"\0" not in start


def require_imatrix(path: Path) -> None:
    """Raise PipelineError where a file is neither a matrix nor a text to compute one from."""
    contents.require_real(path)
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if not start:
        raise UsageError(f"imatrix={path}: is empty")
    if start == MAGIC and gguf.read(path).values.get("general.type") != "imatrix":
        raise UsageError(
            f"imatrix={path}: is a GGUF, and no importance matrix",
            "pass one that llama-imatrix wrote, or a text to compute it from",
        )


def make_imatrix(
    target: Path,
    *,
    model: Path,
    text: Path,
    inputs: Mapping[str, Any],
    program: Path,
    home: Home,
    options: Sequence[str] = (),
) -> None:
    """Make the matrix of `model` for `text`; the recipe names both by `inputs`. `options` are more
    of llama-imatrix's. Raises PipelineError."""

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
                    # a name alone, for it becomes a part of the matrix, and of what it is used for
                    *(str(program), "--model", str(model), "--file", f"./{text.name}"),
                    *("--output", str(made), "--output-format", "gguf"),
                    *options,
                ],
                log=log,
                env=tools.env(),
                cwd=text.parent,
                on_line=watch,
                patience=IMATRIX_SILENCE,
                sandbox=tools.sandbox(
                    program,
                    read=[*gguf.shards(model), text],
                    write=[made],
                    weights=sum(path.stat().st_size for path in gguf.shards(model)),
                    copies=IMATRIX_COPIES,
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
