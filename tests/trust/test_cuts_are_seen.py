"""What kills and failing disks prove is worth something: without the rename, the flush of an error
or the clearing of leftovers the harness notices."""

from __future__ import annotations

from errno import ENOSPC
from pathlib import Path

import pytest
import traced
from cut_commands import Command, Parts, fetch
from cut_commands import parts as parts
from seeds import dice
from test_failing_disk import fail, points
from test_kill_everywhere import kill

pytestmark = [pytest.mark.build]

IN_PLACE = """
import shutil
from pipeline.core.store import artifacts
def write_in_place(made, target):
    data = made.read_bytes()
    with target.open("wb", buffering=0) as file:
        for at in range(0, len(data), 200_000):
            file.write(data[at:at + 200_000])
    made.unlink()
artifacts.publish_file = write_in_place
"""
LEFT = """
from pipeline.commands import leftovers
leftovers.clear = lambda home: None
"""
SWALLOWED = """
import contextlib
from pipeline.core.store import receipts
publish_text = receipts.publish_text
def try_to_publish(path, text):
    with contextlib.suppress(OSError):
        publish_text(path, text)
receipts.publish_text = try_to_publish
"""


@pytest.mark.parametrize(
    ("command", "patch", "message"),
    [
        pytest.param(
            *(fetch, IN_PLACE, "neither the old one nor the new one"),
            marks=pytest.mark.trust,
            id="in place",
        ),
        pytest.param(fetch, LEFT, "left behind", id="left"),
    ],
)
def test_a_kill_is_noticed(
    command: Command, patch: str, message: str, parts: Parts, tmp_path: Path
) -> None:
    with command(parts, tmp_path / "w") as world:
        world.patch = patch
        whole = world.whole_run()
        with pytest.raises(AssertionError, match=message):
            for number in reversed(traced.kill_points(whole.calls, dice())):
                kill(world, whole, number)


def test_a_swallowed_error_is_noticed(parts: Parts, tmp_path: Path) -> None:
    with fetch(parts, tmp_path / "w") as world:
        world.patch = SWALLOWED
        whole = world.whole_run()
        tries = [
            (number, kind)
            for call, number, kind in points(whole.calls, [ENOSPC], dice())
            if call.path.endswith("..state.json.part")
        ]
        with pytest.raises(AssertionError):
            for number, kind in tries:
                fail(world, whole, number, kind)
