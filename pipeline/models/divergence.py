"""How far a quant's predictions are from those of the unquantized model, by llama-perplexity.

The unquantized model writes the probabilities of every token of its vocabulary, for each token of
the second half of a chunk: 134 MB a chunk of 512 tokens for 262,144 tokens. So the text is read in
groups of chunks: once all quants have read a group's file, it is removed.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.process import last_lines, run
from pipeline.core.progress import bar
from pipeline.core.store.publish import disk_errors, remove, require_disk, require_space

from . import gguf, tools
from .text_length import complaint, without_end

CTX_SIZE = 512  # tokens in a chunk, as in most published figures
GROUP_BYTES = 2 * 1024**3  # of a group's file
MOST_CHUNKS = 32  # in a group: what is printed for each chunk is a mean so far, with five digits
LETTERS = 5  # of a token, at most in the mean; what is too much of a text is not used
COPIES = 2  # of the weights: as read, and repacked for the processor
HEAD = struct.Struct("<8x4x4xi")  # of its file: a mark, context and vocabulary, chunks; then tokens
# llama-perplexity ends without waiting for the thread that prints: on a busy machine the last lines
# may be missing.
TRIES = 2
LEAST_LINES = 0.75  # of the chunks, after that
SILENCE = 3600  # seconds; a line is printed for each chunk

NUMBER = r"([-+.\w]+)"
PLUS_MINUS = rf"{NUMBER} ± +{NUMBER}"
# One line a chunk: perplexity, log of its ratio, divergence, difference of probabilities, same top.
CHUNK = re.compile(
    rf"^ *(\d+) +{PLUS_MINUS} +{PLUS_MINUS} +{PLUS_MINUS} +{PLUS_MINUS} % +{PLUS_MINUS} %"
)
# Each figure's group in CHUNK, which that of its error follows; the line that has its last mean
# with more digits; and the factor by which both are multiplied.
FIGURES = {
    "log_ratio": (4, rf"^Mean ln\(PPL\(Q\)/PPL\(base\)\) *: +{PLUS_MINUS}", 1.0),
    "kld": (6, rf"^Mean +KLD: +{PLUS_MINUS}", 1.0),
    "same_top": (10, rf"^Same top p: +{PLUS_MINUS} %", 0.01),  # is printed in percent
}


class Piece(Struct, frozen=True):
    """The figures of one piece of text, such as a chunk, by their names; and the error of each as
    the program has it."""

    values: Mapping[str, float]
    errors: Mapping[str, float]


class Perplexity(Struct, frozen=True, kw_only=True):
    """The program, and how it is run. `options` are llama.cpp's own, for threads and GPUs; a run
    takes `seconds` at most. Logs go to the folder `logs`."""

    program: Path
    logs: Path
    ctx_size: int = CTX_SIZE
    options: tuple[str, ...] = ()
    seconds: float | None = None
    shows_progress: bool = True

    def words(self, model: Path, base: Path) -> list[str]:
        """The part of the command line that both runs share."""
        return [
            *(str(self.program), "--model", str(model), "--ctx-size", str(self.ctx_size)),
            # one chunk after the other, so that each is printed while the next one is computed
            *("--batch-size", str(self.ctx_size)),
            *("--kl-divergence-base", str(base), *without_end(model), *self.options),
        ]


def scored(ctx_size: int) -> int:
    """How many tokens of a chunk are compared: those of its second half."""
    return ctx_size - 1 - ctx_size // 2


def chunk_bytes(vocabulary: int, ctx_size: int) -> int:
    """What a chunk takes in the file of the unquantized model: 16 bits for each token of the
    vocabulary, a scale and a minimum, for each token that is compared."""
    row = 2 * ((vocabulary + 1) // 2) + 4
    return scored(ctx_size) * row * 2


def group_size(vocabulary: int, ctx_size: int) -> int:
    """How many chunks are measured before the file of the unquantized model is removed."""
    return max(2, min(MOST_CHUNKS, GROUP_BYTES // chunk_bytes(vocabulary, ctx_size)))


def part_of(text: str, offset: int, tokens: int) -> str:
    """The text from `offset` up to a blank, long enough to hold so many tokens."""
    blank = text.find(" ", offset + tokens * LETTERS)
    return text[offset:blank] if blank >= 0 else text[offset:]


class ChunkGroup(Struct):
    """A group of chunks of the text, whose file lies in the folder of the runs."""

    base: Path
    text: Path
    chunks: int = 0


def write_base(tool: Perplexity, model: Path, group: ChunkGroup, text: str, most: int) -> None:
    """Have the unquantized model write its probabilities for the text, at most `most` chunks of it,
    and set how many there are. Raises PipelineError, UsageError where the text is too short."""
    vocabulary = gguf.read(model).vocabulary
    chunk_size = chunk_bytes(vocabulary, tool.ctx_size)
    with disk_errors(group.base.parent):
        require_space(group.base.parent, chunk_size * most)
        group.text.write_text(text, encoding="utf-8", newline="")
    words = [*tool.words(model, group.base), "--file", str(group.text), "--chunks", str(most)]
    output = _run(tool, words, model, group, r"\[(\d+)\]", most, writes=chunk_size * most)
    written = group.base.stat().st_size
    if why := complaint(output, written, tool.ctx_size):
        raise UsageError(why)
    with group.base.open("rb") as file:
        start = file.read(HEAD.size)
    group.chunks = HEAD.unpack(start)[0] if len(start) == HEAD.size else 0
    expected = HEAD.size + group.chunks * (4 * tool.ctx_size + chunk_size)
    if not group.chunks or written != expected:
        require_disk(group.base.parent)  # llama-perplexity prints nothing where it is full
        raise PipelineError(
            f"{model.name}: llama-perplexity wrote {written} bytes of probabilities, {expected} "
            f"were expected:\n{last_lines(_log(tool, model), 5)}",
            f"the whole log is {_log(tool, model)}",
        )


def compare(tool: Perplexity, model: Path, group: ChunkGroup) -> list[Piece]:
    """Compare `model` with the unquantized one on each chunk of the group; the last ones may be
    missing. Raises PipelineError."""
    words = [*tool.words(model, group.base), "--kl-divergence"]
    pieces: list[Piece] = []
    for _ in range(TRIES):
        output = _run(tool, words, model, group, r"^ *(\d+) +\S+ ±", group.chunks)
        pieces = max(pieces, parse(output), key=len)
        if len(pieces) == group.chunks:
            return pieces
    if len(pieces) < LEAST_LINES * group.chunks:
        raise PipelineError(
            f"{model.name}: llama-perplexity measured {len(pieces)} of {group.chunks} chunks:\n"
            f"{last_lines(_log(tool, model), 5)}",
            "run the same command again, when the machine is less busy; the whole log is "
            f"{_log(tool, model)}",
        )
    return pieces


def mean(tool: Perplexity, model: Path, group: ChunkGroup) -> float:
    """The mean divergence of `model` on the group, in nats a token. Raises PipelineError."""
    pieces = compare(tool, model, group)
    value = sum(piece.values["kld"] for piece in pieces) / len(pieces)
    if not math.isfinite(value):
        raise PipelineError(
            f"{model.name}: its divergence is not a number", f"the whole log is {_log(tool, model)}"
        )
    return max(0.0, value)


def discard(group: ChunkGroup) -> None:
    """Remove the files of a group."""
    remove(group.base)
    remove(group.text)


def parse(output: str) -> list[Piece]:
    """The mean of each chunk, from the running means that are printed.

    The logarithm of the perplexity's ratio and the divergence in nats, the same most probable token
    as a fraction. What is not a number is infinite.
    """
    rows = [line for line in map(CHUNK.match, output.splitlines()) if line]
    if not rows:
        return []
    values: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    for name, (group, total, scale) in FIGURES.items():
        means, error = [_number(row[group]) * scale for row in rows], rows[-1][group + 1]
        if precise := re.search(total, output, re.M):
            means[-1], error = _number(precise[1]) * scale, precise[2]
        values[name] = _differences(means)
        # of a single chunk: the printed one is that of the mean
        errors[name] = _number(error) * (scale * math.sqrt(len(rows)))
    chunks = zip(*values.values(), strict=True)
    return [Piece(dict(zip(values, chunk, strict=True)), errors) for chunk in chunks]


def _differences(means: Sequence[float]) -> list[float]:
    """The values of which these are the running means."""
    sums = [mean * count for count, mean in enumerate(means, start=1)]
    values = [after - before for before, after in zip([0.0, *sums], sums, strict=False)]
    return [value if math.isfinite(value) else math.inf for value in values]


def _number(text: str) -> float:
    """A number; infinite for what is none."""
    try:
        value = float(text)
    except ValueError:
        return math.inf
    return math.inf if math.isnan(value) else value


def plain_name(model: Path) -> str:
    """The name of a file, also of one that is being made."""
    return model.name.strip(".").removesuffix(".part")


def _log(tool: Perplexity, model: Path) -> Path:
    return tool.logs / f"perplexity-{model.parent.name}-{model.name.strip('.')}.log"


def _run(
    tool: Perplexity,
    words: Sequence[str],
    model: Path,
    group: ChunkGroup,
    counter: str,
    total: int,
    *,
    writes: int = 0,
) -> str:
    """Run llama-perplexity, which may write so many bytes; returns what it printed. Raises
    PipelineError."""
    lines: list[str] = []
    logits = 4 * gguf.read(model).vocabulary * tool.ctx_size
    sandbox = tools.sandbox(
        tool.program,
        model=model,
        read=[group.text] if writes else [group.base],
        write=[group.base] if writes else [],
        copies=COPIES,
        memory=tools.HEADER_MEMORY + 2 * logits,
    )
    sandbox = replace(sandbox, file_bytes=tools.GIB + writes)
    with bar(f"measuring {plain_name(model)}") if tool.shows_progress else nullcontext() as update:

        def watch(line: str) -> None:
            lines.append(line)
            if update and (done := re.findall(counter, line)):
                update(int(done[-1]), total)

        status = run(
            words,
            log=_log(tool, model),
            env=tools.env(),
            on_line=watch,
            patience=SILENCE,
            timeout=tool.seconds,
            sandbox=sandbox,
        )
    output = "\n".join(lines)
    if status and not complaint(output):
        require_disk(group.base.parent, output)
        raise PipelineError(
            f"{model.name}: llama-perplexity failed (status {status}):\n"
            f"{last_lines(_log(tool, model), 5)}",
            f"the whole log is {_log(tool, model)}",
        )
    return output
