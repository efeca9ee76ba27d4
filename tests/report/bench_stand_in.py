"""A stand-in for llama-bench: a real program, which does what a test says for some options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fakes.raw_gguf import TEXT, raw, text


def speeds(prompt: float, decode: float, threads: int = 2) -> str:
    """A script that prints these speeds, as three samples each. The sandbox lets it start no other
    program."""
    rows = [
        {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "n_threads": threads},
        {"n_prompt": 0, "n_gen": 128, "n_depth": 0, "n_threads": threads},
    ]
    for row, speed in zip(rows, (prompt, decode), strict=True):
        row["samples_ts"] = [speed * each for each in (0.99, 1, 1.01)]  # type: ignore[assignment]
    return f"echo '{json.dumps(rows)}'"


SAME = speeds(100, 10)


def write(folder: Path, cases: Mapping[str, str], usual: str = SAME) -> Path:
    """A program in `folder` that runs, as a shell script, the value of the first of `cases` whose
    key stands among its words, such as `-t 3`; without any, `usual`."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "llama-bench"
    branches = "\n".join(f'*" {words} "*)\n{script}\n;;' for words, script in cases.items())
    program.write_text(f'#!/bin/sh\ncase " $* " in\n{branches}\n*)\n{usual}\n;;\nesac\n')
    program.chmod(0o755)
    return program


def model(path: Path, architecture: str = "llama") -> Path:
    """The header of a model without tensors."""
    path.write_bytes(raw(("general.architecture", TEXT, text(architecture))))
    return path
