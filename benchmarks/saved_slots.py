"""Time to the first token of a long conversation that comes back after its model was unloaded: with
its saved slots over without.

    .venv/bin/python benchmarks/saved_slots.py [rounds] [tokens]

The demo is prepared first. In each round two configurations, one of which saves no slots, have the
same conversation of about so many tokens, are unloaded and loaded by name, and are asked once more.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from common import doit, free_port, request

FILE = """
[master]
saved_slots = "{size}"
[gateway]
enable = true
port = {gateway}
[instance.chat.control]
start = "demand"
[instance.chat.model]
ref = "demo"
[instance.chat.server]
port = {port}
ctx_size = 8192
"""


def first_token(port: int, messages: list[Any]) -> tuple[float, int]:
    """Seconds until the first one, and the tokens of the prompt that were computed."""
    body = {"model": "chat", "messages": messages, "max_tokens": 4, "stream": True}
    question = request(f"http://127.0.0.1:{port}/v1/chat/completions", body)
    start, seconds, computed = time.perf_counter(), 0.0, 0
    with urllib.request.urlopen(question, timeout=3600) as reply:
        for line in reply:
            event = line.removeprefix(b"data: ").strip()
            if not event.startswith(b"{"):
                continue
            chunk = json.loads(event)
            if not seconds and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                seconds = time.perf_counter() - start
            computed = chunk.get("timings", {}).get("prompt_n", computed)
    return seconds, computed


def measure(folder: Path, size: str, tokens: int) -> tuple[float, int]:
    """`first_token` of a conversation that comes back."""
    gateway = free_port()
    file = folder / f"slots {size}.toml"
    file.write_text(FILE.format(size=size, gateway=gateway, port=free_port()), encoding="utf-8")
    words = " ".join(f"number {n}" for n in range(tokens // 4))  # four tokens each
    conversation = [{"role": "user", "content": words}]
    doit("up", f"config={file}")
    try:
        first_token(gateway, conversation)
        doit("unload", f"config={file}", "name=chat")
        doit("load", f"config={file}", "name=chat")
        more = [{"role": "assistant", "content": "Go on."}, {"role": "user", "content": "And?"}]
        return first_token(gateway, conversation + more)
    finally:
        doit("down", f"config={file}")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 4000
    doit("prepare", "model=demo")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            (without, all_of_it), (saved, rest) = (
                measure(Path(folder), size, tokens) for size in ("0GiB", "4GiB")
            )
            ratios.append(saved / without)
            print(
                f"without {without:6.2f} s ({all_of_it} tokens computed), "
                f"saved {saved:6.2f} s ({rest}), ratio {ratios[-1]:.3f}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
