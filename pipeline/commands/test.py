"""The project's own tests, in this environment."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline import bootstrap
from pipeline.core import capacity, process
from pipeline.core.errors import PipelineError
from pipeline.core.paths import REPOSITORY
from pipeline.core.store.publish import require_space

# Bytes that all tests together have on disk at a time; what passed is removed.
SPACE = 10_000_000_000


def run(words: Sequence[str]) -> None:
    """pytest with these words, once what the tests need is installed. Raises PipelineError."""
    try:
        bootstrap.install("test")
    except bootstrap.BootstrapError as error:
        raise PipelineError(error.message, error.hint) from None
    if not words:
        require_space(Path(tempfile.gettempdir()), SPACE, "TMPDIR")
    argv = [sys.executable, "-m", "pytest", *side_by_side(words), *words]
    # Some systems' images set it; then each worker, and each doit, would compile all of it.
    env = {key: os.environ[key] for key in os.environ if key != "PYTHONDONTWRITEBYTECODE"}
    status = process.attached(argv, cwd=REPOSITORY, env=env)
    if status:
        raise PipelineError(f"pytest ended with {status}")


def side_by_side(words: Sequence[str]) -> list[str]:
    """pytest's options for several workers, where all tests are meant or a selection by mark. Most
    of them wait for other programs most of the time: more workers than processors."""
    if words and words[0] != "-m":
        return []
    workers = str(2 * capacity.processors() + 1)
    return ["-n", workers, "--dist", "loadgroup", "--no-loadscope-reorder"]
