"""What a quant lost: measured against the unquantized model, kept, and held against a limit.

What was measured is kept under the digests of both models, of the text and of the program, piece by
piece, so that a second run prints at once and a larger sample goes on where the last one ended.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from msgspec import Struct, convert, to_builtins

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.store import json_file, publish
from pipeline.core.store.locks import is_held, only_one
from pipeline.core.text import plural
from pipeline.models import divergence, gguf
from pipeline.models.divergence import Piece
from pipeline.models.gguf import Header

from . import quality_similarity as similarity
from .figures import Estimate, Quality
from .quality_similarity import Serving
from .quality_statistics import Verdict, estimate, verdict

SCHEMA = 1  # of what is kept
FIRST = 16  # pieces for a first verdict; twice as many each time that there is none
GROWTH = 4  # times the pieces that a report takes: the most for a verdict
ENOUGH = 0.75  # of the pieces that were asked for: how many a text has is known once it is read

Kind = Literal["language", "embedding", "rerank"]


class Measured(Struct, frozen=True, kw_only=True):
    """A model file, with the digest under which figures of it are kept."""

    path: Path
    digest: str


class Sample(Struct, frozen=True, kw_only=True):
    """What is known of a quant: the figures of each piece of text, in order. `offset` is where the
    next piece begins, `is_all`: the text has no more."""

    pieces: tuple[Piece, ...] = ()
    offset: int = 0
    is_all: bool = False

    @property
    def count(self) -> int:
        return len(self.pieces)

    def figure(self, name: str) -> Estimate | None:
        """A figure with its error; None where it is not measured."""
        values = [piece.values[name] for piece in self.pieces if name in piece.values]
        if not values:
            return None
        squares = [piece.errors.get(name, 0.0) ** 2 for piece in self.pieces]
        return estimate(values, math.sqrt(sum(squares)) / len(squares))


class Limit(Struct, frozen=True):
    """What a figure must keep to: at most, or at least, so much."""

    name: str  # of the variable
    value: float
    figure: str

    @property
    def is_upper(self) -> bool:
        return self.name.startswith("max")

    def verdict(self, sample: Sample) -> Verdict:
        """Of what was measured so far."""
        figure = sample.figure(self.figure)
        if figure is None:
            return Verdict.UNDECIDED
        return verdict(figure, self.value, sample.count, is_upper=self.is_upper)


class Setup(Struct, frozen=True, kw_only=True):
    """How models are compared: with which program, on which text. `text` reads it, for it need not
    be there where all is known; `text_digest` is its identity."""

    home: Home
    kind: Kind
    program_digest: str
    text: Callable[[], str]
    text_digest: str
    text_name: str
    perplexity: divergence.Perplexity | None = None  # for language models
    serving: Serving | None = None  # for all others

    @property
    def documents(self) -> int:
        """How many passages make a piece, where models are measured on passages."""
        return similarity.DOCUMENTS if self.kind == "rerank" else 1

    def file(self, base: str, quant: str) -> Path:
        """Where the sample of a quant is kept; both are given by their digests."""
        about = [SCHEMA, self.kind, base, quant, self.program_digest, self.text_digest]
        about.append(self.perplexity.ctx_size if self.perplexity else 0)
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
        return self.home.run / "quality" / f"{key}.json"

    def known(self, base: str, quant: str) -> Sample:
        """What was measured before."""
        return json_file.read(self.file(base, quant), _sample) or Sample()


def _sample(data: object) -> Sample:
    sample = convert(data, Sample)
    for piece in sample.pieces:
        if not piece.values:
            raise ValueError("a piece without figures")
    return sample


def kind_of(header: Header) -> Kind:
    """What a model is for, by its header."""
    if header.pooling == "rank":
        return "rerank"
    return "embedding" if header.is_encoder or header.pooling != "none" else "language"


Wanted = Callable[[Sample], int]


def report_wants(chunks: int) -> Wanted:
    """A function that returns how many more pieces a report of `chunks` needs."""

    def more(sample: Sample) -> int:
        is_enough = sample.is_all or sample.count >= ENOUGH * chunks
        return 0 if is_enough else chunks - sample.count

    return more


def verdict_wants(limit: Limit, chunks: int) -> Wanted:
    """A function that returns how many more pieces a verdict needs: more and more, to a bound."""

    def more(sample: Sample) -> int:
        most, count = GROWTH * chunks, sample.count
        if sample.is_all or count >= ENOUGH * most:
            return 0
        if count and limit.verdict(sample) is not Verdict.UNDECIDED:
            return 0
        return min(max(FIRST, 2 * count), most) - count

    return more


def require_room(setup: Setup, header: Header, wants: Wanted) -> None:
    """Raise PipelineError where the disk has no room for what an unquantized model with this header
    answers to the first group of pieces: known before any quant is made."""
    if setup.perplexity:
        size = setup.perplexity.ctx_size
        count = min(wants(Sample()), divergence.group_size(header.vocabulary, size))
        folder = setup.home.run
        with publish.disk_errors(folder):
            publish.require_space(folder, count * divergence.chunk_bytes(header.vocabulary, size))


def measure(
    setup: Setup, base: Measured, quants: Mapping[str, Measured], wants: Wanted
) -> dict[str, Sample]:
    """Measure each quant against `base` until `wants` needs no more. Raises PipelineError."""
    place = setup.home.run / "quality" / f"base-{base.digest.rpartition(':')[2][:16]}"
    notice = f"another run is comparing quants with {base.path.name}; waiting for it"
    with publish.disk_errors(setup.home.run), only_one(place, notice):
        for file in left_behind(setup.home, place):
            publish.remove(file)
        samples = {name: setup.known(base.digest, each.digest) for name, each in quants.items()}
        text = ""
        while waiting := {name: more for name in quants if (more := wants(samples[name]))}:
            # Those that know least go first, and read the same files.
            offset = min(samples[name].offset for name in waiting)
            now = {n: quants[n].path for n in waiting if samples[n].offset == offset}
            text = text or setup.text()
            start = Start(offset, max(waiting[name] for name in now))
            reading = _read(setup, place, base.path, now, text, start)
            for name in now:
                samples[name] = Sample(
                    pieces=(*samples[name].pieces, *reading.pieces[name]),
                    offset=reading.offset,
                    is_all=reading.is_all,
                )
                digest = quants[name].digest
                # `of` is not read here: by it `prune` finds what no model on disk is of.
                value = {"of": digest, **to_builtins(samples[name])}
                json_file.write(setup.file(base.digest, digest), value)
        return samples


class Start(Struct, frozen=True):
    """Where in the text a group begins, and of how many pieces it is, at most."""

    offset: int
    count: int


def left_behind(home: Home, own: Path | None = None) -> Iterator[Path]:
    """What killed runs left of groups of chunks; `own` is the place whose lock is held here."""
    folder = home.run / "quality"
    for file in (*folder.glob("base-*.logits"), *folder.glob("base-*.txt")):
        owner = file.with_suffix("")
        if owner == own or not is_held(owner):
            yield file


def of_quants(home: Home) -> Iterator[tuple[Path, str]]:
    """The kept samples, each with the digest of the quant that it is of; empty where it does not
    say."""
    for path in sorted((home.run / "quality").glob("*.json")):
        yield path, json_file.read(path, lambda data: str(data["of"])) or ""


class Reading(Struct, frozen=True):
    """A group of pieces of each quant, where the text goes on, and whether it has no more."""

    pieces: Mapping[str, list[Piece]]
    offset: int
    is_all: bool


def _read(
    setup: Setup, place: Path, base: Path, quants: Mapping[str, Path], text: str, start: Start
) -> Reading:
    """Compare the quants with `base` on a group of pieces. Raises PipelineError."""
    if setup.perplexity:
        return _chunks(setup, setup.perplexity, place, base, quants, text, start)
    return _passages(setup, base, quants, text, start)


def _chunks(
    setup: Setup,
    tool: divergence.Perplexity,
    place: Path,
    base: Path,
    quants: Mapping[str, Path],
    text: str,
    start: Start,
) -> Reading:
    most = divergence.group_size(gguf.read(base).vocabulary, tool.ctx_size)
    count = max(2, min(start.count, most))
    part = divergence.part_of(text, start.offset, count * tool.ctx_size)
    end = start.offset + len(part)
    group = divergence.ChunkGroup(base=place.with_suffix(".logits"), text=place.with_suffix(".txt"))
    try:
        divergence.write_base(tool, base, group, part, count)
        pieces = {name: divergence.compare(tool, path, group) for name, path in quants.items()}
        return Reading(pieces, end, end == len(text))
    except UsageError as error:
        if start.offset:  # what is left of the text is too short for a chunk
            return Reading({name: [] for name in quants}, end, True)
        raise UsageError(f"{setup.text_name}: {error.message}", "pass a longer text=PATH") from None
    finally:
        divergence.discard(group)


def _passages(
    setup: Setup, base: Path, quants: Mapping[str, Path], text: str, start: Start
) -> Reading:
    """The offset counts passages here."""
    serving, passages = setup.serving, similarity.passages(text)
    if serving is None:
        raise ValueError("models of this kind are measured by a server")
    size = setup.documents
    starts = range(start.offset, len(passages) - size + 1, size)[: start.count]
    if not start.offset:
        similarity.require_enough(text, setup.text_name, size)
    groups = [passages[first : first + size] for first in starts]
    if setup.kind == "rerank":
        rows = similarity.scores(serving, base, groups)
        pieces = {
            name: similarity.compare_scores(rows, similarity.scores(serving, path, groups))
            for name, path in quants.items()
        }
    else:
        inputs = [group[0] for group in groups]
        rows = similarity.embeddings(serving, base, inputs)
        pieces = {
            name: similarity.compare_embeddings(rows, similarity.embeddings(serving, path, inputs))
            for name, path in quants.items()
        }
    end = start.offset + size * len(starts)
    return Reading(pieces, end, end + size > len(passages))


def quality(setup: Setup, sample: Sample, quant: str, size: int, bits_per_weight: float) -> Quality:
    """The figures of a quant of `size` bytes."""
    ratio = sample.figure("log_ratio")
    scored = divergence.scored(setup.perplexity.ctx_size) if setup.perplexity else 1
    value = math.exp(ratio.value) if ratio else 0.0
    return Quality(
        quant=quant,
        bytes=size,
        bits_per_weight=bits_per_weight,
        kld=sample.figure("kld"),
        ppl_ratio=Estimate(value, value * ratio.error) if ratio else None,
        same_top=sample.figure("same_top"),
        cosine=sample.figure("cosine"),
        rank=sample.figure("rank"),
        samples=scored * sample.count,
    )


def require(limit: Limit, sample: Sample, name: str, next_step: str) -> None:
    """Print what was measured. Raises PipelineError where a quant does not keep to the limit."""
    result, figure = limit.verdict(sample), sample.figure(limit.figure)
    bound = "at most" if limit.is_upper else "at least"
    measured = shown(figure) if figure else "not measured"
    words = f"{name}: {limit.figure} {measured}, allowed is {bound} {limit.value:g}"
    if result is Verdict.PASSED:
        log.info(words)
        return
    if result is Verdict.FAILED:
        raise PipelineError(f"{words} ({limit.name})", next_step)
    more = "a longer text=PATH" if sample.is_all else "more chunks="
    raise PipelineError(
        f"{words} ({limit.name}): undecided after {plural(sample.count, 'piece')} of the text",
        f"pass {more}, another {limit.name}=, or {next_step}",
    )


def shown(figure: Estimate) -> str:
    """A figure and its error, with as many digits as the error has meaning."""
    if not math.isfinite(figure.value):
        return "not a number"
    digits = 4
    if not math.isfinite(figure.error):  # of a single piece
        return f"{figure.value:.{digits}f} ± ?"
    if figure.error > 0:
        digits = min(6, max(2, -math.floor(math.log10(figure.error))))
    return f"{figure.value:.{digits}f} ± {figure.error:.{digits}f}"
