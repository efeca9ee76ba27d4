"""What follows an end: a table."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from supervisor_tools import stand_in

from pipeline.serve.server import Server
from pipeline.serve.stopping import is_hopeless
from pipeline.serve.supervisor.policy import Decision, End, Timing, decide
from pipeline.serve.supervisor.state import EXITED, FAILED, PAUSING

CRASH = End(status=-9, was_ready=True)
BROKEN = End(status=7)
STUCK = End(status=-9, was_ready=True, why="stuck: no token within 5 s")
WELL = End(status=0, was_ready=True)


@pytest.fixture
def instance(tmp_path: object) -> Server:
    return replace(stand_in(tmp_path, "a"), restart_pause=1.0, max_restarts=5)  # type: ignore[arg-type]


def verdict(instance: Server, end: End, failures: int = 0, **more: object) -> Decision:
    return decide(replace(instance, **more), end, failures, Timing())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("restart", "end", "state"),
    [
        ("on-failure", CRASH, PAUSING),
        ("on-failure", BROKEN, PAUSING),
        ("on-failure", STUCK, PAUSING),
        ("on-failure", WELL, EXITED),
        ("on-failure", End(status=0), PAUSING),  # it was to serve, and never did
        ("always", CRASH, PAUSING),
        ("always", WELL, PAUSING),
        ("never", CRASH, FAILED),
        ("never", BROKEN, FAILED),
        ("never", STUCK, FAILED),
        ("never", WELL, EXITED),
    ],
)
def test_what_follows(instance: Server, restart: str, end: End, state: str) -> None:
    assert verdict(instance, end, restart=restart).state == state


def test_pauses_double_up_to_a_bound(instance: Server) -> None:
    pauses = [verdict(instance, CRASH, n, max_restarts=99).pause for n in range(9)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert verdict(instance, CRASH, 98, max_restarts=99, restart_pause=0.5).pause == 60
    assert verdict(instance, CRASH, 3, restart_pause=90).pause == 90


def test_the_budget_ends(instance: Server) -> None:
    assert verdict(instance, CRASH, 4) == Decision(
        state=PAUSING,
        reason="crash: killed by SIGKILL after it was ready",
        failures=5,
        pause=16,
    )
    over = verdict(instance, BROKEN, 5)
    assert over.state == FAILED
    assert over.reason == (
        "failed start: exit status 7 before it was ready; given up after 5 restarts in a row"
    )
    assert verdict(instance, CRASH, 0, max_restarts=0).state == FAILED


def test_a_request_tries_a_failed_demand_model_again_after_growing_pauses(
    instance: Server,
) -> None:
    tries = [verdict(instance, BROKEN, n, start="demand", max_restarts=2) for n in range(1, 11)]
    assert [each.state for each in tries] == [PAUSING] + [FAILED] * 9
    assert [each.retry_after for each in tries[1:]] == [10, 20, 40, 80, 160, 300, 300, 300, 300]
    assert [each.failures for each in tries] == list(range(2, 12))
    assert tries[1].reason.endswith(
        "; given up after 2 restarts in a row; a request after 10 s tries again"
    )
    assert verdict(instance, BROKEN, 5).retry_after is None, "what `up` loads stays failed"
    assert verdict(instance, BROKEN, 5, start="demand", restart="never").retry_after is None
    hopeless = decide(replace(instance, start="demand"), End(status=127), 9, Timing())
    assert (hopeless.state, hopeless.retry_after) == (FAILED, None)


def test_a_good_end_uses_the_budget_where_it_is_restarted(instance: Server) -> None:
    assert verdict(instance, WELL, 4, restart="always").failures == 5
    over = verdict(instance, WELL, 5, restart="always")
    assert over.state == FAILED
    assert over.reason == "ended: exit status 0; given up after 5 restarts in a row"


def test_a_steady_server_starts_anew(instance: Server) -> None:
    steady = replace(CRASH, was_steady=True)
    assert verdict(instance, steady, 5) == verdict(instance, CRASH, 0)


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (CRASH, "crash: killed by SIGKILL after it was ready"),
        (replace(CRASH, status=3), "crash: exit status 3 after it was ready"),
        (WELL, "ended: exit status 0"),
        (BROKEN, "failed start: exit status 7 before it was ready"),
        (STUCK, "stuck: no token within 5 s"),
    ],
)
def test_the_end_in_words(instance: Server, end: End, text: str) -> None:
    assert verdict(instance, end).reason == text


# As vLLM 0.32 ends where it refuses its options.
REFUSED = (
    "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
    "  |   Value error,"
)


@pytest.mark.parametrize(
    ("line", "status", "hopeless"),
    [
        ("pixi: cannot be started: No such file or directory", None, True),
        ("host=x y: is not an address: Name or service not known", None, True),
        ("error: invalid argument: --nosuch", 1, True),
        ('error while handling argument "--parallel": invalid value', 1, True),
        ("gguf_init_from_file: failed to open GGUF file 'x' (No such file or directory)", 1, True),
        ("error loading model: failed to load GGUF split from x-00002-of-00003.gguf", 1, True),
        ("api_server.py: error: unrecognized arguments: --x", 2, True),
        ("api_server.py: error: argument --dtype: invalid choice: 'x'", 2, True),
        ("python: (ModuleNotFoundError: No module named 'vllm')", 1, True),
        (f"{REFUSED} Sleep mode is not supported on current platform.", 1, True),
        (f"{REFUSED} An error occurred while trying to connect to the hub.", 1, False),
        ("could not find pixi.toml or pyproject.toml with tool.pixi", 1, True),
        ("sh: pixi: not found", 127, True),
        ("error loading model: unable to allocate CUDA0 buffer", 1, False),
        ("the last words", 7, False),
    ],
)
def test_what_cannot_heal_is_not_tried_again(
    instance: Server, line: str, status: int | None, hopeless: bool
) -> None:
    assert is_hopeless(status, f"  | {line}") is hopeless
    always = replace(instance, restart="always")
    decision = decide(always, End(status=status), 0, Timing(), f"  | {line}")
    assert decision.state == (FAILED if hopeless else PAUSING)
    once_ready = decide(always, End(status=1, was_ready=True), 0, Timing(), f"  | {line}")
    assert once_ready.state == PAUSING
