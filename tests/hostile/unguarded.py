"""The converter with defences taken out, one by one: what the canaries are proved with.

There is no such switch in the product.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from worlds import World

from pipeline.core.paths import Home
from pipeline.core.process import outcome
from pipeline.models import converter, resolve, staging

SECONDS = 240


@dataclass(frozen=True, kw_only=True)
class Defences:
    """`staged`: the input is laid out without code. `own_environment`: nothing of the user's.
    `sandboxed`: only input and output can be reached."""

    staged: bool = False
    own_environment: bool = False
    sandboxed: bool = False


def convert_with(defences: Defences, world: World, python: Path, script: Path) -> str:
    """Run the converter on the model, to its end; all that it printed."""
    target, scratch = world.top / "made.gguf", world.top / staging.SCRATCH
    scratch.mkdir()
    folder = world.model
    files = [path for path in folder.rglob("*") if path.is_file()]
    if defences.staged:
        resolved = resolve.folder(folder, Home(world.top / "home"), frozenset())
        files = [folder / file.name for file in resolved.files]
        staging.stage({f.name: folder / f.name for f in resolved.files}, world.top / "staged")
        folder = world.top / "staged"
    # No bytecode: the source would have to be unpacked again, while other tests read it.
    env = world.environ(os.environ) | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if defences.own_environment:
        env = converter.environment(python, scratch)
    sandbox = None
    if defences.sandboxed:
        sandbox = converter.sandbox(python, script, folder, files, target, scratch)
    with contextlib.chdir(world.cwd):
        status, out, err = outcome(
            [python, script, folder, "--outfile", target], timeout=SECONDS, env=env, sandbox=sandbox
        )
    shutil.rmtree(scratch)  # as the product does
    return f"{out}{err}\nstatus {status}"
