"""Seeds of what chance decides in a test: each is printed, and TEST_SEED=… repeats it."""

from __future__ import annotations

import os
import random

PREFIX = "TEST_SEED="


def new_seed() -> int:
    """A seed, printed; the one of the variable TEST_SEED where that is set."""
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(1, 2**31))
    print(f"{PREFIX}{seed}", flush=True)
    return seed


def dice() -> random.Random:
    """Chance by a new seed."""
    return random.Random(new_seed())
