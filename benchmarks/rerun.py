"""`doit build_bins` where everything stands, over a doit with one task that has nothing to do.

    .venv/bin/python benchmarks/rerun.py [rounds]

The programs are built first. Both are started in turn, with the same Python.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import DOIT, REPOSITORY, doit, environment, medians

LIMIT = 0.1  # seconds over doit's own
NOTHING = """
def task_nothing():
    return {"actions": ["false"], "uptodate": [True]}
"""


def seconds(command: list[str], folder: Path) -> float:
    """Of one run, which must find everything up to date."""
    env, start = environment(), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if any(line.startswith(".  ") for line in (done.stdout + done.stderr).splitlines()):
        sys.exit(f"something was made:\n{done.stdout}{done.stderr}")
    return taken


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    ours, doits = [*DOIT, "build_bins"], [sys.executable, "-m", "doit", "nothing"]
    doit("build_bins")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "dodo.py").write_text(NOTHING, encoding="utf-8")
        one, other = medians(
            rounds, lambda: seconds(ours, REPOSITORY), lambda: seconds(doits, Path(folder))
        )
    print(f"doit build_bins  {one * 1000:.0f} ms (median of {rounds}, alternating)")
    print(f"doit's own no-op {other * 1000:.0f} ms")
    print(f"difference       {(one - other) * 1000:.0f} ms, ratio {one / other:.2f}")
    if one - other > LIMIT:
        sys.exit(f"a rerun may take {LIMIT} s more than doit's own")


if __name__ == "__main__":
    main()
