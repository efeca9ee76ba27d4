"""How much of pipeline/ a command walks through: files, lines, imports, and calls across files.

    .venv/bin/python benchmarks/calls.py [CHECKOUT] list
    .venv/bin/python benchmarks/calls.py [CHECKOUT] plan model=demo

Two checkouts side by side show what a change of the layout has cost or saved. The command runs in
this process and is traced; what it prints goes to stderr. `serve` and `up` are stopped when their
servers are ready. The figures do not depend on the machine.
"""

from __future__ import annotations

import ast
import collections
import inspect
import json
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

CORE = ("load", "chain", "target")  # functions whose calls are counted by name


def size(folder: Path) -> dict[str, Any]:
    """Files, lines, imports across folders, and class names that stand twice, of pipeline/."""
    files = sorted((folder / "pipeline").rglob("*.py"))
    edges, classes, lines = 0, collections.Counter[str](), 0
    for file in files:
        text = file.read_text(encoding="utf-8")
        lines += text.count("\n")
        package = ".".join(file.parent.relative_to(folder).parts)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                classes[node.name] += 1
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                is_ours = node.module.startswith("pipeline")
                edges += is_ours and not node.module.startswith(package)
    return {
        "files": len(files),
        "lines": lines,
        "imports across folders": edges,
        "class names twice": sum(1 for count in classes.values() if count > 1),
    }


class Trace:
    """What a run enters of the checkout's pipeline/."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder / "pipeline") + os.sep
        self.files: set[str] = set()
        self.across = self.back = 0
        self.calls: collections.Counter[str] = collections.Counter()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(self.root):
            return
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a module or the body of a class
            return
        self.calls[f"{Path(file).stem}.{name}"] += 1
        caller = frame.f_back
        while caller and not caller.f_code.co_filename.startswith(self.root):
            caller = caller.f_back
        if caller and caller.f_code.co_filename != file:
            self.across += 1
            self.back += file in self.files
        self.files.add(file)


def traced(folder: Path, words: list[str]) -> dict[str, Any]:
    """Run the command in `folder`."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["doit", *words]
    trace = Trace(folder)
    if words[0] in ("serve", "up"):
        threading.Timer(12, os.kill, (os.getpid(), signal.SIGINT)).start()
    out = os.dup(1)
    os.dup2(2, 1)
    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        runpy.run_module("pipeline", run_name="__main__")
    except SystemExit:
        pass
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.stdout.flush()
        os.dup2(out, 1)
    loads = {name: count for name, count in trace.calls.items() if name.endswith(CORE)}
    return {
        "files entered": len(trace.files),
        "calls across files": trace.across,
        "of them back": trace.back,
        "calls": dict(sorted(loads.items())),
    }


def main() -> None:
    words = sys.argv[1:]
    folder = Path(__file__).resolve().parents[1]
    if words and Path(words[0]).is_dir():
        folder = Path(words.pop(0)).resolve()
    told = size(folder) | (traced(folder, words) if words else {})
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
