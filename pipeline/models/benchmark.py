"""llama-bench: how fast a model runs, and whether it runs at all."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.process import outcome

from . import gguf, tools

COPIES = 2  # of the weights: as read, and repacked for the processor
PROMPT, GENERATED = 256, 32  # tokens
SECONDS = 600


def speed(
    program: Path, model: Path, prompt: int = PROMPT, generated: int = GENERATED
) -> dict[str, float]:
    """Tokens per second of `reading` a prompt and, unless the model only embeds, of `writing`.

    Raises PipelineError where it does not run.
    """
    generated = 0 if gguf.read(model).is_encoder else generated
    files = gguf.shards(model)
    weights = sum(path.stat().st_size for path in files)
    words = [str(program), "-m", str(model), "-p", str(prompt), "-n", str(generated)]
    status, out, err = outcome(
        [*words, "-r", "1", "-o", "json"],
        timeout=SECONDS,
        env=tools.env(),
        sandbox=tools.sandbox(program, read=files, weights=weights, copies=COPIES),
    )
    try:
        rows = json.loads(out) if status == 0 else []
        speeds = {"writing" if row["n_gen"] else "reading": float(row["avg_ts"]) for row in rows}
    except (ValueError, KeyError, TypeError):
        speeds = {}
    if not speeds:
        last = (err.strip() or out.strip()).splitlines()[-1:]
        reason = f": {last[0]}" if last else ""
        raise PipelineError(f"{model.name}: {program.name} ends with status {status}{reason}")
    return speeds


def trial(program: Path, model: Path) -> str:
    """Run a token or two; why that fails, empty where it does not."""
    try:
        speed(program, model, prompt=1, generated=1)
    except PipelineError as error:
        return error.message
    return ""
