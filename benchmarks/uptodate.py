"""The up-to-date check of a 40 GB model over that of a 4 MB one: the same, or it hashes.

    .venv/bin/python benchmarks/uptodate.py [rounds]

Both are sparse copies of the demonstration model's result, with a receipt of their own; what is
timed is `doit prepare` finding nothing to do.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from common import REPOSITORY, doit, medians, plan

MODEL = ("model=demo-embed", "quant=q8_0")
SMALL, LARGE = 4 * 1000**2, 40 * 1000**3


def inflate(home: Path, size: int) -> None:
    """Make the result `size` bytes long, most of them a hole, and its receipt say so."""
    (result,) = (home / "models" / "gguf").rglob("model.q8_0.gguf")
    os.truncate(result, size)
    receipt = result.with_name(".state.json")
    data = json.loads(receipt.read_text(encoding="utf-8"))
    entry = data["artifacts"][result.name]
    entry |= {"size": size, "mtime_ns": result.stat().st_mtime_ns, "sha256": "0" * 64}
    receipt.write_text(json.dumps(data), encoding="utf-8")


def check(home: Path) -> float:
    """Seconds of one run, which must find everything up to date."""
    start = time.perf_counter()
    done = doit("prepare", *MODEL, home=home)
    seconds = time.perf_counter() - start
    if "\n.  " in "\n" + done.stderr:
        sys.exit(f"something was made:\n{done.stderr}")
    return seconds


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    doit("prepare", *MODEL)
    made = Path(plan(*MODEL)["file"]).parent
    with tempfile.TemporaryDirectory() as top:
        homes = []
        for name, size in (("small", SMALL), ("large", LARGE)):
            home = Path(top) / name
            (home / "bins").mkdir(parents=True)
            for folder in (REPOSITORY / "bins").iterdir():
                if not folder.name.startswith("."):
                    shutil.copytree(folder, home / "bins" / folder.name)
            shutil.copytree(made, home / "models" / "gguf" / made.name)
            inflate(home, size)
            homes.append(home)
        small, large = medians(rounds, *(partial(check, home) for home in homes))
    print(f" 4 MB   {small * 1000:.0f} ms to find nothing to do (median of {rounds}, alternating)")
    print(f"40 GB   {large * 1000:.0f} ms, ratio {large / small:.2f}")


if __name__ == "__main__":
    main()
