"""Check files in processes of bounded memory and time:

    python bounded_reads.py MEMORY SECONDS [MODULE.NAME=VALUE …]

A path a line on the standard input; for each a line of JSON on the standard output. What MODULE of
`pipeline.models` calls NAME can be replaced, to see what happens without it.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.core.errors import PipelineError
from pipeline.models import gguf, resolve, safetensors


def check(path: Path) -> None:
    if path.is_dir():
        resolve.check_folder(path, frozenset())
    elif path.suffix == ".gguf":
        gguf.read(path)
    else:
        safetensors.read(path)


def outcome(path: Path) -> dict[str, Any]:
    try:
        check(path)
    except PipelineError as error:
        return {"refused": error.message}
    except BaseException as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    return {}


def bounded(path: Path, memory: int, seconds: int) -> dict[str, Any]:
    """`refused` with a message, `failed` with a reason, or neither."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor, not of the clock
        with os.fdopen(writing, "w") as pipe:
            json.dump(outcome(path), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"failed": f"ended by {signal.Signals(os.WTERMSIG(status)).name}"}
    return dict(json.loads(answer))


def replace(settings: Iterable[str]) -> None:
    """Set each `MODULE.NAME=VALUE`."""
    for text in settings:
        name, _, value = text.partition("=")
        module, _, attribute = name.partition(".")
        home = importlib.import_module(f"pipeline.models.{module}")
        assert hasattr(home, attribute), name
        setattr(home, attribute, ast.literal_eval(value))


def main() -> None:
    memory, seconds, *replaced = sys.argv[1:]
    replace(replaced)
    for line in sys.stdin:
        answer = bounded(Path(line.rstrip("\n")), int(memory), int(seconds))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
