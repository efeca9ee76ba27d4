"""A kill before each call that changes a file: the next run ends right, and repeats and leaves
nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import traced
from cut_commands import ALL, ALWAYS, Command, Parts
from cut_commands import parts as parts
from cut_documents import DOCUMENTS
from cut_worlds import Whole, World
from figures import Figure
from seeds import dice

pytestmark = [pytest.mark.build]


def kill(world: World, whole: Whole, number: int) -> bool:
    """Kill the command before that call, and run it again; whether it was killed."""
    print("killed before", whole.calls[number - 1])
    cut = world.run("-k", str(number))
    world.require_sound(whole)
    again = world.run_again()
    world.require_right(whole)
    if not cut.was_killed:
        assert cut.status == 0, cut.err
        return False
    repeated = {*cut.steps[:-1]} & {*again.steps}
    assert not repeated, f"finished, and done again: {repeated}"
    assert "waiting for it" not in again.err, "a lock was left"
    return True


@pytest.mark.parametrize("command", ALWAYS, ids=lambda command: command.__name__)
def test_killed_at_some_call(
    command: Command, parts: Parts, tmp_path: Path, figure: Figure
) -> None:
    kill_at_some(command, parts, tmp_path, figure, 3)


@pytest.mark.trust
@pytest.mark.slow
@pytest.mark.parametrize("command", [*ALL, *DOCUMENTS], ids=lambda command: command.__name__)
def test_killed_at_every_call(
    command: Command, parts: Parts, tmp_path: Path, figure: Figure
) -> None:
    kill_at_some(command, parts, tmp_path, figure)


@pytest.mark.trust
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("command", [*ALL, *DOCUMENTS], ids=lambda command: command.__name__)
def test_killed_at_all_calls(
    command: Command, parts: Parts, tmp_path: Path, figure: Figure
) -> None:
    """Where a try takes seconds and some calls are drawn else."""
    kill_at_some(command, parts, tmp_path, figure, 0)


def kill_at_some(
    command: Command, parts: Parts, folder: Path, figure: Figure, most: int | None = None
) -> None:
    """Kill the command at `most` calls, or with 0 at all that change anything, but only at some
    within a file that is written; by default at those that its world allows time for."""
    with command(parts, folder / "w") as world:
        if most == 0 and not world.most_kills:
            pytest.skip("test_killed_at_every_call tries all")
        whole = world.whole_run()
        chance = dice()
        points = traced.kill_points(whole.calls, chance)
        if most == 0:
            points = traced.fewer_writes(points, whole.calls, chance)
        elif most := world.most_kills if most is None else most:
            points = sorted(chance.sample(points, min(most, len(points))))
        killed = sum(kill(world, whole, number) for number in points)
        world.require_no_process()
    assert killed > len(points) // 2
    figure("commands killed", 1)
    figure("kills survived", killed)
    figure("bytes lost", 0)  # else an assertion has failed
