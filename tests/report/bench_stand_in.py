"""A stand-in for llama-bench: a real program, which does what a test says for some options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fakes.raw_gguf import TEXT, raw, text

SPEEDS = """\
[
  {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 100, "samples_ts": [ 90, 110 ]},
  {"n_prompt": 0, "n_gen": 128, "n_depth": 0, "avg_ts": 10, "samples_ts": [ 9, 10, 11 ]}
]
"""
SAME = f"echo '{SPEEDS}'"  # the sandbox lets it start no other program


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
