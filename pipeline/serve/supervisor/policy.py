"""What follows when a server has ended. Nothing here has an effect."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.serve.logfile import LONGEST
from pipeline.serve.server import Server
from pipeline.serve.stopping import how

from .state import EXITED, FAILED, PAUSING


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The supervisor's own times, in seconds, and the size of its logs."""

    tick: float = 0.2  # between two looks at what is wanted and what has ended
    probe_every: float = 60.0
    steady_after: float = 60.0  # ready for so long, a server starts anew at 0 failures
    longest_pause: float = 60.0
    log_bytes: int = LONGEST  # then a new log is begun


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a server ended."""

    status: int | None = None  # its exit status; None: it never was, or could not be ended
    why: str = ""  # that we ended it, or did not start it; empty: it ended by itself
    was_ready: bool = False
    was_steady: bool = False  # it was ready for long enough


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the instance is now: pausing for `pause` seconds, exited or failed."""

    state: str
    reason: str
    failures: int  # in a row
    pause: float = 0.0


def decide(instance: Server, end: End, failures: int, pace: Timing) -> Decision:
    """What follows. Each further restart in a row waits twice as long, up to a bound."""
    failures = 0 if end.was_steady else failures
    reason, well = told(end), not end.why and end.was_ready and end.status == 0
    if well and instance.restart != "always":
        return Decision(state=EXITED, reason=reason, failures=failures)
    if instance.restart == "never":
        return Decision(state=FAILED, reason=f"{reason}; restart = never", failures=failures)
    if failures >= instance.max_restarts:
        reason += f"; given up after {failures} restarts in a row"
        return Decision(state=FAILED, reason=reason, failures=failures)
    most = max(pace.longest_pause, instance.restart_pause)
    pause = min(most, instance.restart_pause * 2.0 ** min(failures, 60))
    return Decision(state=PAUSING, reason=reason, failures=failures + 1, pause=pause)


def told(end: End) -> str:
    """The end in words: a failed start, a crash, stuck, or an end of its own."""
    if end.why:
        return end.why
    status = how(end.status) if end.status is not None else "no status"
    if not end.was_ready:
        return f"failed start: {status} before it was ready"
    return f"ended: {status}" if end.status == 0 else f"crash: {status} after it was ready"
