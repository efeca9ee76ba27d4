"""What is on disk is looked at once in a run, however often it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, Doit, wait_for

# doit, which prints in the end how often it opened each file of receipts, made the chain, and held
# the programs against their receipts.
COUNTING = """
import atexit, collections, json, pathlib, sys
opened = collections.Counter()

def count(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".state.json"):
        opened[str(arguments[0])] += 1

def entered(frame, event, _):
    code = frame.f_code
    for file, name in (("models/chain.py", "chain"), ("bins/binaries.py", "is_current")):
        if event == "call" and code.co_name == name:
            # not a method of that name, in whatever folder the checkout is
            if pathlib.PurePath(code.co_filename).parts[-2:] == tuple(file.split("/")):
                opened[name] += 1

sys.addaudithook(count)
sys.setprofile(entered)
atexit.register(lambda: print(json.dumps(opened), file=sys.stderr))
from doit.__main__ import main
sys.exit(main())
"""


@pytest.mark.build
def test_plan_reads_each_receipt_once_and_makes_one_chain(demo: Doit) -> None:
    bins = next((demo.home / "bins").glob("*-cpu/.state.json"))
    model = next((demo.home / "models").glob("source/demo__*/.state.json"))
    receipts = (bins, *demo.home.glob("models/*/*/.state.json"))
    newest = max(file.stat().st_mtime for file in receipts)
    wait_for(lambda: time.time() > newest + 3)  # a file that was just written is read each time
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, "plan", "model=demo-embed", "format=json"],
        cwd=REPOSITORY,
        env=demo.env,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    opened = json.loads(done.stderr.splitlines()[-1])
    assert {str(bins), str(model), "chain", "is_current"} <= opened.keys()
    assert set(opened.values()) == {1}, opened
