"""Which CUDA compiles for which card, and runs with which driver."""

from __future__ import annotations

from .lacks import numbers

# Toolkit's major version: the lowest compute capability it compiles for, and the lowest driver
# that runs what it made (NVIDIA's release notes of CUDA, "minor version compatibility").
LOWEST_CAPABILITY = {11: (3, 5), 12: (5, 0), 13: (7, 5)}
LOWEST_DRIVER = {11: 450, 12: 525, 13: 580}
# The first toolkit that knows a capability.
FIRST_TOOLKIT: dict[tuple[int, ...], tuple[int, int]] = {
    (8, 0): (11, 0),
    (8, 6): (11, 1),
    (8, 7): (11, 4),
    (8, 9): (11, 8),
    (9, 0): (11, 8),
    (10, 0): (12, 8),
    (12, 0): (12, 8),
    (10, 3): (12, 9),
    (12, 1): (12, 9),
    (11, 0): (13, 0),
}


def newest(driver: str) -> tuple[int, int] | None:
    """The newest CUDA whose programs a driver runs: every minor version of a major one; None where
    the driver is not known."""
    number = (numbers(driver) or (0,))[0]
    majors = [major for major, lowest in LOWEST_DRIVER.items() if number >= lowest]
    return (max(majors), 99) if majors else None
