"""What a mix loses over what the plain quant loses, at no more bytes.

    .venv/bin/python benchmarks/mix.py MODEL.gguf [QUANT]

MODEL is an unquantized GGUF, QUANT the plain type (q4_k_m). Both are made from it in a new home. Of
a language model it prints the KL divergence from the original on the text for tests, where a mix is
chosen by another one; of an embedding model how far embeddings turn, 1 - cosine.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from pipeline.bins.compile import source
from pipeline.core.paths import Home
from pipeline.models import divergence, gguf, texts

REPOSITORY = Path(__file__).resolve().parents[1]
DOIT = [sys.executable, "-m", "pipeline"]  # as ./doitw does
CHUNKS = 24  # of 512 tokens
TEXTS = 64
MIB = 1 << 20


def main() -> None:
    model, quant = Path(sys.argv[1]).resolve(), (sys.argv[2:] or ["q4_k_m"])[0]
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        home = Home(top / "home")
        home.root.mkdir()
        (home.root / "bins").symlink_to(REPOSITORY / "bins")
        plain = prepared(home, model, quant)
        # MiB with three digits, rounded down: the mix has no more bytes than the plain quant.
        most = math.floor(plain.stat().st_size * 1000 / MIB) / 1000
        mixed = prepared(home, model, f"{most:.3f}MiB")
        text = texts.save(source.find(Home(REPOSITORY)).folder, "test", home)
        lost = turned if gguf.read(model).is_encoder else diverged
        before, after = lost(home, model, text, [plain, mixed])
        for name, file, loss in ((quant, plain, before), ("mix", mixed, after)):
            print(f"{name:<8} {file.stat().st_size:>12} bytes  {loss:.6f}")
        print(f"the mix loses {after / before:.2f} of what {quant} loses")


def prepared(home: Home, model: Path, quant: str) -> Path:
    """The quant of the model, made."""
    env = {**os.environ, "LLAMA_PIPELINE_HOME": str(home.root)}
    words = [f"model={model}", f"quant={quant}"]
    subprocess.run([*DOIT, "prepare", *words], cwd=REPOSITORY, env=env, check=True)
    command = [*DOIT, "plan", *words, "format=json"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, check=True, stdout=subprocess.PIPE)
    return Path(json.loads(done.stdout)["file"])


def diverged(home: Home, model: Path, text: Path, quants: list[Path]) -> list[float]:
    """The KL divergence of each quant, in nats a token."""
    tool = divergence.Perplexity(program=program("llama-perplexity"), logs=home.root)
    group = divergence.ChunkGroup(base=home.root / "answers", text=home.root / "text.txt")
    divergence.write_base(tool, model, group, text.read_text("utf-8"), CHUNKS)
    return [divergence.mean(tool, quant, group) for quant in quants]


def turned(home: Home, model: Path, text: Path, quants: list[Path]) -> list[float]:
    """1 - the mean cosine between the embeddings of each quant and of the model."""
    parts = [part for part in text.read_text("utf-8").split("\n\n") if 40 < len(part) < 400]
    asked = parts[:: max(1, len(parts) // TEXTS)][:TEXTS]
    exact = embedded(home, model, asked)
    return [
        1 - sum(map(cosine, exact, embedded(home, quant, asked))) / len(asked) for quant in quants
    ]


def embedded(home: Home, model: Path, asked: list[str]) -> list[list[float]]:
    """The embeddings of texts by llama-server."""
    env = {**os.environ, "LLAMA_PIPELINE_HOME": str(home.root)}
    command = [*DOIT, "serve", f"model={model}", f"port={free_port()}", "format=json"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout
            url = json.loads(server.stdout.readline())["url"]
            body = json.dumps({"input": asked}).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/embeddings", body, headers)
            with urllib.request.urlopen(request, timeout=600) as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]
            return [each["embedding"] for each in sorted(found, key=lambda each: each["index"])]
        finally:
            server.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def program(name: str) -> Path:
    return next(path for path in (REPOSITORY / "bins").glob(f"*/{name}*") if path.stem == name)


if __name__ == "__main__":
    main()
