"""A disk that is full, failing or read-only from any call on: one message with the next step,
nothing half published, nothing lost; with a healthy disk the next run ends right."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from errno import EDQUOT, EIO, ENOSPC, EROFS
from itertools import cycle, islice
from pathlib import Path

import pytest
import traced
from cut_commands import ALL, ALWAYS, Command, Parts
from cut_commands import parts as parts
from cut_documents import DOCUMENTS
from cut_worlds import Whole, World
from figures import Figure
from seeds import dice
from traced import Call

pytestmark = [pytest.mark.build]

# What takes room, or may find no room for what was written before.
ROOM = (
    *("open", "openat", "creat", "write", "pwrite64", "writev", "pwritev", "sendfile"),
    *("copy_file_range", "ftruncate", "fallocate", "mkdir", "mkdirat", "symlink", "symlinkat"),
    *("link", "linkat", "rename", "renameat", "renameat2", "fsync", "fdatasync"),
)
CHANGES = (*ROOM, "unlink", "unlinkat", "rmdir", "chmod", "fchmod", "fchmodat", "utimensat")
# Which calls fail, and whether all later ones do: a disk stays full or read-only.
KINDS = {ENOSPC: (ROOM, True), EIO: (CHANGES, False), EROFS: (CHANGES, True), EDQUOT: (ROOM, True)}
# What the message says; of an error that is over, a program that met it need not tell.
SAID = {
    ENOSPC: "disk full|No space left on device",
    EIO: "",
    EROFS: "Read-only file system",
    EDQUOT: "[Dd]isk quota exceeded",
}


def points(
    calls: Sequence[Call], kinds: Sequence[int], chance: random.Random
) -> list[tuple[Call, int, int]]:
    """Each call that is to fail, by its number among those that can fail so, with one of the errors
    after another."""
    numbers, turn, made = dict.fromkeys(KINDS, 0), cycle(kinds), []
    chosen = {call.n for call in traced.fail_points(calls, chance)}
    for call in calls:
        for kind, (names, _) in KINDS.items():
            numbers[kind] += call.call in names
        if call.n in chosen:
            able = (kind for kind in islice(turn, len(KINDS)) if call.call in KINDS[kind][0])
            if (kind := next(able, None)) is not None:
                made.append((call, numbers[kind], kind))
    return made


def fail(world: World, whole: Whole, number: int, kind: int) -> None:
    """Have the call fail, and see what the run makes of that, and the next one."""
    names, stays = KINDS[kind]
    options = ["-c", ",".join(names), "-f", str(number), "-e", str(kind), *["-o"] * stays]
    run = world.run(*options)
    said = f"call {number}, {os.strerror(kind)}: status {run.status}\n{run.out}\n{run.err}"
    printed = (run.out + run.err).splitlines()
    assert not any(line.startswith("Traceback") for line in printed), (
        said
    )  # a program's is indented
    world.require_sound(whole)
    if run.status:
        assert run.status == 1, said
        errors = [line for line in run.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "hint: " in run.err, said
        message = run.err.partition("error: ")[2]
        assert str(world.top) in message and re.search(SAID[kind], message), said
    else:  # such as a cache that cannot be written
        world.require_done(whole, world.listing())
    world.run_again()
    world.require_right(whole)


def fail_at_some(
    command: Command, parts: Parts, folder: Path, figure: Figure, most: int | None = None
) -> None:
    """Fail the command at `most` calls, or at all with 0; by default at those that its world allows
    time for."""
    with command(parts, folder / "w") as world:
        if most == 0 and not world.most_fails:
            pytest.skip("test_any_call_fails tries all")
        whole = world.whole_run()
        chance = dice()
        tries = points(whole.calls, chance.sample([*KINDS], len(KINDS)), chance)
        if most := world.most_fails if most is None else most:
            tries = chance.sample(tries, min(most, len(tries)))
        for _, number, kind in tries:
            fail(world, whole, number, kind)
        world.require_no_process()
    figure("commands on a failing disk", 1)
    figure("calls failed", len(tries))
    figure("bytes lost", 0)  # else an assertion has failed


@pytest.mark.parametrize("command", ALWAYS, ids=lambda command: command.__name__)
def test_some_calls_fail(command: Command, parts: Parts, tmp_path: Path, figure: Figure) -> None:
    fail_at_some(command, parts, tmp_path, figure, 3)


@pytest.mark.trust
@pytest.mark.slow
@pytest.mark.parametrize("command", [*ALL, *DOCUMENTS], ids=lambda command: command.__name__)
def test_any_call_fails(command: Command, parts: Parts, tmp_path: Path, figure: Figure) -> None:
    fail_at_some(command, parts, tmp_path, figure)


@pytest.mark.trust
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("command", [*ALL, *DOCUMENTS], ids=lambda command: command.__name__)
def test_all_calls_fail(command: Command, parts: Parts, tmp_path: Path, figure: Figure) -> None:
    """Where a try takes seconds and some calls are drawn else."""
    fail_at_some(command, parts, tmp_path, figure, 0)
