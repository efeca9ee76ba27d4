"""From an empty clone with empty caches to the first answer of the demo, over the sum of its parts.

    .venv/bin/python benchmarks/first_answer.py [model=…]

One clone runs `./doitw serve model=demo` and asks it; another runs the steps by themselves, one
after the other. The caches of the pipeline, ccache, pip and npm are empty in both. Takes half an
hour on two cores, and the network's time.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import REPOSITORY, free_port, post

CACHES = ("LLAMA_PIPELINE_CACHE", "CCACHE_DIR", "PIP_CACHE_DIR", "npm_config_cache")
PATIENCE = 3 * 3600.0


class Clone:
    """A fresh clone in `folder`, whose caches are empty folders beside it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "llama-pipeline"
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, self.path], check=True)
        own = {name: str(folder / name) for name in CACHES}
        drop = ("VIRTUAL_ENV", "LLAMA_PIPELINE_HOME", "PYTHONDONTWRITEBYTECODE")
        self.env = {k: v for k, v in os.environ.items() if k not in drop} | own
        self.log = folder / "log"

    def run(self, *words: str) -> float:
        """Seconds that a command takes."""
        start = time.monotonic()
        with self.log.open("ab") as log:
            done = subprocess.run(
                ["./doitw", *words], cwd=self.path, env=self.env, stdout=log, stderr=log
            )
        if done.returncode:
            sys.exit(f"{' '.join(words)} failed:\n{self.log.read_text()[-3000:]}")
        return time.monotonic() - start

    def serve(self, model: str) -> float:
        """Seconds from the start to the first answer."""
        port = free_port()
        start = time.monotonic()
        command = ["./doitw", "serve", model, f"port={port}"]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, cwd=self.path, env=self.env, stdout=log, stderr=log)
        try:
            while not answers(f"http://127.0.0.1:{port}"):
                if process.poll() is not None or time.monotonic() - start > PATIENCE:
                    sys.exit(f"there is no answer:\n{self.log.read_text()[-3000:]}")
                time.sleep(0.05)
            return time.monotonic() - start
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def answers(url: str) -> bool:
    """Whether a chat message is answered there."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    try:
        return bool(post(f"{url}/v1/chat/completions", body)["choices"])
    except OSError:
        return False


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "model=demo"
    folder = Path(tempfile.mkdtemp(prefix="first-answer-"))
    try:
        for name in ("whole", "parts"):
            (folder / name).mkdir()
        whole = Clone(folder / "whole").serve(model)
        print(f"from an empty clone to the first answer  {whole:7.1f} s", flush=True)
        clone = Clone(folder / "parts")
        steps = (["--version"], ["source"], ["build_ui"], ["build_bins"], ["prepare", model])
        parts = {" ".join(words): clone.run(*words) for words in steps}
        parts[f"serve {model}"] = clone.serve(model)
        for name, seconds in parts.items():
            print(f"  {name:<38} {seconds:7.1f} s")
        total = sum(parts.values())
        print(f"the parts together                       {total:7.1f} s, ratio {whole / total:.2f}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
