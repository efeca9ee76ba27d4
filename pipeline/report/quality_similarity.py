"""How far a quant's embeddings, or a reranker's scores, are from those of the unquantized model, by
llama-server's endpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, TypeVar

from msgspec import DecodeError, Meta, Struct, json

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.progress import bar
from pipeline.core.text import plural
from pipeline.models import texts
from pipeline.models.divergence import Piece, plain_name
from pipeline.serve import health
from pipeline.serve.server import Server

from .quality_statistics import cosine, spearman

# Of a text: the smallest models read 512 tokens, a query and a document together, and in some
# scripts each letter is one.
LETTERS, BYTES = 600, 720
QUERY_WORDS, QUERY_LETTERS = 10, 250
DOCUMENTS = 16  # that are ranked for a query
TIMEOUT = 600.0  # seconds for an answer


class Embedding(Struct):
    embedding: list[float | None]


class EmbeddingAnswer(Struct):
    """The answer of /v1/embeddings."""

    data: Annotated[list[Embedding], Meta(min_length=1)]


class Score(Struct):
    index: int
    relevance_score: float | None


class RankingAnswer(Struct):
    """The answer of /v1/rerank."""

    results: list[Score]


Answer = TypeVar("Answer", EmbeddingAnswer, RankingAnswer)
Serving = Callable[[Path], AbstractContextManager[Server]]


def passages(text: str) -> list[str]:
    """The texts to compare: the beginnings of the paragraphs."""
    beginnings = (paragraph[:LETTERS].encode()[:BYTES] for paragraph in texts.prose(text))
    return [each.decode(errors="ignore") for each in beginnings]


def require_enough(text: str, name: str, documents: int) -> None:
    """Raise UsageError where the text has not so many passages."""
    if (count := len(passages(text))) < documents:
        raise UsageError(
            f"{name}: has {plural(count, 'paragraph')} of prose, {documents} needed at least",
            "pass a text=PATH of prose, with empty lines between its paragraphs",
        )


def embeddings(serving: Serving, model: Path, inputs: Sequence[str]) -> list[list[float]]:
    """A vector for each text. Raises PipelineError."""
    vectors = []
    with serving(model) as server, bar(f"measuring {plain_name(model)}") as update:
        for number, text in enumerate(inputs, start=1):
            answer = _post(server, "/v1/embeddings", {"input": text}, EmbeddingAnswer)
            vectors.append(_numbers(answer.data[0].embedding))
            update(number, len(inputs))
    return vectors


def scores(serving: Serving, model: Path, groups: Sequence[Sequence[str]]) -> list[list[float]]:
    """For each group of documents the score of each, for a query that the first one begins with.
    Raises PipelineError."""
    rows = []
    with serving(model) as server, bar(f"measuring {plain_name(model)}") as update:
        for number, documents in enumerate(groups, start=1):
            query = " ".join(documents[0].split()[:QUERY_WORDS])[:QUERY_LETTERS]
            body = {"query": query, "documents": list(documents)}
            answer = _post(server, "/v1/rerank", body, RankingAnswer)
            by_index = {row.index: row.relevance_score for row in answer.results}
            rows.append(_numbers([by_index.get(index) for index in range(len(documents))]))
            update(number, len(groups))
    return rows


def compare_embeddings(
    one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]
) -> list[Piece]:
    """The cosine similarity of each pair of vectors."""
    pairs = zip(one, other, strict=True)
    return [Piece({"cosine": _finite(cosine(a, b))}, {}) for a, b in pairs]


def compare_scores(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> list[Piece]:
    """The rank correlation of each pair of rows."""
    pairs = zip(one, other, strict=True)
    return [
        Piece({"rank": spearman(a, b) if all(map(math.isfinite, [*a, *b])) else math.inf}, {})
        for a, b in pairs
    ]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _numbers(values: Sequence[float | None]) -> list[float]:
    """JSON has no NaN: llama-server writes null."""
    return [math.nan if value is None else float(value) for value in values]


def _post(server: Server, path: str, body: Mapping[str, object], kind: type[Answer]) -> Answer:
    """The answer of the server. Raises PipelineError."""
    text = health.require_answer(server, path, body, timeout=TIMEOUT)
    try:
        return json.decode(text, type=kind)
    except DecodeError as error:
        raise PipelineError(f"{server.name}: {path}: {error}") from None
