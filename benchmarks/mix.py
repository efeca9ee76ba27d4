"""What a mix loses over what the plain quant loses, at no more bytes.

    .venv/bin/python benchmarks/mix.py MODEL.gguf [QUANT]

MODEL is an unquantized GGUF, QUANT the plain type (q4_k_m). Both are made from it in a new home. Of
a language model it prints the KL divergence from the original on the text for tests, where a mix is
chosen by another one; of an embedding model how far embeddings turn, 1 - cosine.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from common import DOIT, REPOSITORY, doit, environment, free_port, plan, post

from pipeline.bins.compile import source
from pipeline.core.paths import Home
from pipeline.models import divergence, gguf, texts

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
    words = (f"model={model}", f"quant={quant}")
    doit("prepare", *words, home=home.root)
    return Path(plan(*words, home=home.root)["file"])


def diverged(home: Home, model: Path, text: Path, quants: list[Path]) -> list[float]:
    """The KL divergence of each quant, in nats a token."""
    tool = divergence.Perplexity(program=program("llama-perplexity"), logs=home.root)
    group = divergence.ChunkGroup(base=home.root / "answers", text=home.root / "text.txt")
    divergence.write_base(tool, model, group, text.read_text("utf-8"), CHUNKS)
    return [divergence.mean(tool, quant, group) for quant in quants]


def turned(home: Home, model: Path, text: Path, quants: list[Path]) -> list[float]:
    """1 - the mean cosine between the embeddings of each quant and of the model."""
    parts = [part for part in text.read_text("utf-8").split("\n\n") if 40 < len(part) < 400]
    inputs = parts[:: max(1, len(parts) // TEXTS)][:TEXTS]
    exact = embedded(home, model, inputs)
    return [
        1 - sum(map(cosine, exact, embedded(home, quant, inputs))) / len(inputs) for quant in quants
    ]


def embedded(home: Home, model: Path, inputs: list[str]) -> list[list[float]]:
    """The embeddings of texts by llama-server."""
    env = environment(home.root)
    command = [*DOIT, "serve", f"model={model}", f"port={free_port()}", "format=json"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout
            url = json.loads(server.stdout.readline())["url"]
            rows = post(f"{url}/v1/embeddings", {"input": inputs})["data"]
            return [row["embedding"] for row in sorted(rows, key=lambda row: row["index"])]
        finally:
            server.terminate()


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def program(name: str) -> Path:
    return next(path for path in (REPOSITORY / "bins").glob(f"*/{name}*") if path.stem == name)


if __name__ == "__main__":
    main()
