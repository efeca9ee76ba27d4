"""The runtime image: its size by layer, and from start to ready over the bare server in it.

    .venv/bin/python benchmarks/image.py [rounds=5]

The image is the tests' own, on a base of debootstrap, with the programs in bins/; built and run by
Docker's engine, or by buildah where that is not installed.
A profile is served by the entry point, with an empty /data each time; the bare server is the
same llama-server with the same arguments, in the same container without the entry point. Ready is
the first 200 on /health. Needs root, Debian's packages, and a test run before it (for the model).
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from common import REPOSITORY
from conftest import free_port, with_programs
from engines import Buildah, Docker, choose
from fakes import tiny_llama
from images import Machine, Running, build, checkout

from pipeline.core.text import size, table
from pipeline.serve import health
from pipeline.serve.server import Server

TAG = "localhost/llama-pipeline:measured"


def main() -> None:
    named = dict(word.split("=", 1) for word in sys.argv[1:])
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        gguf, archive = make(folder)
        context = checkout(folder / "context" / "project", archive)
        engine = choose()
        try:
            packed = context / "bins" / "packages" / archive.name
            build(engine, context, packed, "runtime", TAG, folder)
            print(layers(engine, folder))
            measure(engine, gguf, folder, int(named.get("rounds", 5)))
        finally:
            engine("rmi", TAG, check=False)
            engine.close()


def make(folder: Path) -> tuple[Path, Path]:
    """A tiny chat model, and an archive of the programs in `bins/`."""
    tiny_llama.make(folder / "tiny")
    doit = with_programs(REPOSITORY / "bins", folder / "home")
    doit("prepare", f"model={folder / 'tiny'}", "quant=q8_0")
    made = doit("package", "backend=cpu", "portable=0").out.splitlines()
    shared = folder / "shared"
    shared.mkdir(mode=0o755)
    gguf = shared / "tiny.gguf"
    gguf.write_bytes(next((doit.home / "models").rglob("*.gguf")).read_bytes())
    return gguf, next(Path(line) for line in made if line.endswith(".tar.gz"))


def layers(engine: Docker | Buildah, folder: Path) -> str:
    """Each step of the Dockerfile that adds something, and the whole, unpacked."""
    if isinstance(engine, Docker):
        output = engine("history", "--no-trunc", "--human=false", "--format", "{{json .}}", TAG)
        steps = [json.loads(line) for line in reversed(output.splitlines())]
        sized = [(int(step["Size"]), step["CreatedBy"]) for step in steps if int(step["Size"])]
    else:
        sized = _pushed(engine, folder / "pushed")
    rows = [(size(sized[0][0]), "the base"), *((size(n), said(step)) for n, step in sized[1:])]
    return table([*rows, (size(sum(n for n, _ in sized)), "in all, unpacked")])


def _pushed(engine: Buildah, pushed: Path) -> list[tuple[int, str]]:
    engine("push", "--quiet", "--disable-compression", TAG, f"dir:{pushed}")
    manifest = json.loads((pushed / "manifest.json").read_text())
    config = json.loads((pushed / manifest["config"]["digest"].partition(":")[2]).read_text())
    steps = [x.get("created_by", "") for x in config["history"] if not x.get("empty_layer")]
    return [(layer["size"], x) for layer, x in zip(manifest["layers"], steps, strict=True)]


def said(step: str) -> str:
    """The step in short."""
    step = re.sub(r"^\|\d+ .*?/bin/sh -c |^/bin/sh -c (#\(nop\) )?", "", step)
    return " ".join(re.sub(r"(dir|file):[0-9a-f]+ in", "", step).split())[:70]


def measure(engine: Docker | Buildah, gguf: Path, folder: Path, rounds: int) -> None:
    """Start the same server both ways in turn; print the medians and their ratio."""
    port = free_port()
    registry = gguf.with_name("profiles.yaml")
    profile = f"gguf_path: {gguf}, port: {port}, ctx_size: 256"
    registry.write_text(f"profiles:\n  tiny:\n    llamacpp: {{{profile}}}\n")
    env = {"LLM_PROFILE_NAME": "tiny", "LLM_PROFILES_CONFIG_PATH": str(registry)}
    ways: dict[str, list[float]] = {"entry point": [], "llama-server": []}
    for number in range(rounds + 1):
        home = folder / f"data {number}"
        home.mkdir()
        home.chmod(0o777)
        machine = Machine(gguf.parent, home, image=TAG, engine=engine)
        plan = json.loads(machine("plan", "profile=tiny", "format=json", name="doit", **env).out)[0]
        by_hand = functools.partial(machine.running, *plan["cmd"], name=plan["executable"])
        for way, start in (
            ("entry point", functools.partial(machine.running, **env)),
            ("llama-server", by_hand),
        ):
            seconds = until_ready(start, port)
            if number:  # the first round warms the disk cache
                ways[way].append(seconds)
    ours, plain = (statistics.median(ways[way]) for way in ways)
    print(f"entry point   {ours:.2f} s to ready (median of {rounds}, alternating, empty /data)")
    print(f"llama-server  {plain:.2f} s in the same container")
    print(f"difference    {ours - plain:.2f} s, ratio {ours / plain:.2f}")


def until_ready(start: Callable[[], AbstractContextManager[Running]], port: int) -> float:
    """Seconds from the start to the first 200."""
    server = Server(name="", executable="", cmd=(), folder="", log_file="", port=port)
    began = time.perf_counter()
    with start() as running:
        while not health.is_ready(server):
            if running.process.poll() is not None:
                sys.exit(f"it ended by itself:\n{running.err}")
            time.sleep(0.005)
        seconds = time.perf_counter() - began
    while health.is_ready(server):
        time.sleep(0.05)
    return seconds


if __name__ == "__main__":
    main()
