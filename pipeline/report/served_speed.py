"""How long llama-server itself takes for requests that no search has seen."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from pipeline.serve import health, supervise
from pipeline.serve.server import Server

SECONDS = 600.0  # for one request
GENERATED = 48  # tokens
ADDED = 16  # tokens that a server puts around a prompt, at most
LEAST, ENDLESS = 8, 1_000_000  # letters of a prompt, and tokens of a context that is not known

PROMPTS = (
    "Explain to a new colleague why a database keeps a log of the changes that it is about to make "
    "before it makes them, what would be lost without it when the power fails, and how the log is "
    "used when the machine starts again. Begin with an example of two accounts and a transfer.",
    "def parse(line):\n    name, _, value = line.partition('=')\n    return name.strip(), "
    "value.strip()\n\n\ndef parse_file(path):\n    with open(path, encoding='utf-8') as lines:\n"
    "        return dict(parse(line) for line in lines if line.strip())\n\n\n# Write tests for "
    "both functions: an empty file, a comment, a value with a second equals sign.\n",
    "The ferry left the harbour at half past six, an hour late, with eleven passengers and a crate "
    "of lemons that nobody had asked for. By noon the wind had turned, the captain had stopped "
    "answering the radio, and the youngest of the passengers began to keep a list of everything "
    "that the others said about the island. The list is all that is left of that day. It begins:",
    "Summarize in three sentences: A heat pump moves heat instead of making it. A fluid evaporates "
    "outside at a low pressure, takes up heat from the air, is compressed, gives the heat to the "
    "water of the heating, and expands again. Each unit of electricity moves three to four units "
    "of heat, fewer when it is cold outside, because the compressor then has to work against a "
    "larger difference. Old radiators need hotter water, which costs efficiency; larger ones or "
    "better insulation allow cooler water. Noise, the place of the outer unit and the electrical "
    "connection are what installers ask about first.",
)


def seconds(server: Server, env: Mapping[str, str]) -> list[float]:
    """Start `server`, and time one request after the other, once each is warm: seconds for each of
    PROMPTS. Raises PipelineError where it does not start, or does not answer."""
    with supervise.beside(server, env=env) as require_running:
        most = longest(server)
        prompts = [prompt[:most] for prompt in PROMPTS]
        ask(server, prompts[0])
        times = []
        for prompt in prompts:
            require_running()
            began = time.perf_counter()
            ask(server, prompt)
            times.append(time.perf_counter() - began)
    return times


def longest(server: Server) -> int:
    """How many letters of a prompt the server has room for, whatever its tokenizer makes of them: a
    token has one at least."""
    is_chat = server.kind not in ("embedding", "rerank")
    at_once = () if is_chat else ("--batch-size", "--ubatch-size")  # a text is read in one batch
    sizes = [int(size) for name in at_once if (size := server.argument(name)).isdecimal()]
    with suppress(OSError, ValueError, KeyError, TypeError):
        _, answer = health.ask(server, "/props", timeout=SECONDS)
        sizes.append(int(json.loads(answer)["default_generation_settings"]["n_ctx"]))
    room = min(filter(None, sizes), default=ENDLESS) - ADDED - (GENERATED if is_chat else 0)
    return max(LEAST, room // (2 if server.kind == "rerank" else 1))  # it reads a query, too


def ask(server: Server, prompt: str) -> None:
    """One request of the kind that the server is for. Raises PipelineError."""
    path, body = request(server.kind, prompt)
    health.require_answer(server, path, body, timeout=SECONDS)


def request(kind: str, prompt: str) -> tuple[str, dict[str, object]]:
    """The path and the body of a request to a server of this kind."""
    if kind == "embedding":
        return "/v1/embeddings", {"input": prompt}
    if kind == "rerank":
        return "/v1/rerank", {"query": prompt[:80], "documents": [prompt]}
    options = {"n_predict": GENERATED, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    return "/completion", {"prompt": prompt, **options}


def ratios(names: Sequence[str], measure: Callable[[str], Sequence[float]]) -> dict[str, float]:
    """How many times as fast each server answers as the first one; `measure(name)` starts one and
    returns the seconds of its requests. Each is started early and late, so that a drift favours
    none of them."""
    times: dict[str, list[Sequence[float]]] = {name: [] for name in names}
    for name in (*names, *reversed(names)):
        times[name].append(measure(name))
    best = {name: [min(pair) for pair in zip(*each, strict=True)] for name, each in times.items()}
    first = best[names[0]]
    return {
        name: statistics.geometric_mean(a / b for a, b in zip(first, own, strict=True))
        for name, own in best.items()
    }
