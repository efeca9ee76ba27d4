"""`doit build_bins` where everything stands, over a doit with one task that has nothing to do.

    .venv/bin/python benchmarks/rerun.py [rounds]

The programs are built first. Both are started in turn, with the same Python.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOIT = [sys.executable, "-m", "doit"]
OURS = [sys.executable, "-m", "pipeline", "build_bins"]  # as ./doitw does
LIMIT = 0.1  # seconds over doit's own
NOTHING = """
def task_nothing():
    return {"actions": ["false"], "uptodate": [True]}
"""


def seconds(command: list[str], folder: Path) -> float:
    """Of one run, which must find everything up to date."""
    # Users' Python keeps its compiled modules; an inherited setting may forbid that.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if any(line.startswith(".  ") for line in (done.stdout + done.stderr).splitlines()):
        sys.exit(f"something was made:\n{done.stdout}{done.stderr}")
    return taken


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    subprocess.run(OURS, cwd=REPOSITORY, check=True)
    ours, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "dodo.py").write_text(NOTHING, encoding="utf-8")
        for number in range(rounds + 1):
            pair = seconds(OURS, REPOSITORY), seconds([*DOIT, "nothing"], Path(folder))
            if number:  # the first round warms the disk cache
                ours.append(pair[0])
                bare.append(pair[1])
    one, other = statistics.median(ours), statistics.median(bare)
    print(f"doit build_bins  {one * 1000:.0f} ms (median of {rounds}, alternating)")
    print(f"doit's own no-op {other * 1000:.0f} ms")
    print(f"difference       {(one - other) * 1000:.0f} ms, ratio {one / other:.2f}")
    if one - other > LIMIT:
        sys.exit(f"a rerun may take {LIMIT} s more than doit's own")


if __name__ == "__main__":
    main()
