"""What follows when a server has ended: decisions without effects."""

from __future__ import annotations

from msgspec import Struct

from pipeline.serve.logfile import LONGEST
from pipeline.serve.placing import PATIENCE
from pipeline.serve.server import DEMAND, Server
from pipeline.serve.stopping import how, is_hopeless

from .state import EXITED, FAILED, PAUSING


class Timing(Struct, frozen=True, kw_only=True):
    """The supervisor's intervals, in seconds, and the size of its logs."""

    tick: float = 0.2  # between two checks of the desired state and the processes
    probe_every: float = 60.0
    steady_after: float = 60.0  # a server that was ready for so long has its failures forgotten
    longest_pause: float = 60.0
    first_retry: float = 10.0  # before a request loads a demand model again that has failed
    longest_retry: float = 300.0  # each further failure doubles that pause, up to this
    call: float = 60.0  # for a vLLM to fall asleep or to wake: 400 GB are copied in some 20 s
    log_bytes: int = LONGEST  # then a new log is begun
    patience: float = PATIENCE  # of a request, before others are held back for it


class End(Struct, frozen=True, kw_only=True):
    """How a server ended."""

    status: int | None = None  # its exit status; None: never started, or does not end
    why: str = ""  # why we ended or did not start it; empty: it ended by itself
    was_ready: bool = False
    was_steady: bool = False  # it was ready for long enough


class Decision(Struct, frozen=True, kw_only=True):
    """The server's next state: pausing for `pause` seconds, exited or failed."""

    state: str
    reason: str
    failures: int  # in a row
    pause: float = 0.0
    retry_after: float | None = None  # seconds until a request loads a failed server again


def decide(instance: Server, end: End, failures: int, timing: Timing, output: str = "") -> Decision:
    """The next state, where `output` are the last lines. Each restart in a row waits longer."""
    failures, retry_after = 0 if end.was_steady else failures, None
    reason, succeeded = describe(end), not end.why and end.was_ready and end.status == 0
    if succeeded and instance.restart != "always":
        return Decision(state=EXITED, reason=reason, failures=failures)
    if instance.restart == "never":
        reason += "; restart = never"
    elif not end.was_ready and is_hopeless(end.status, f"{reason}\n{output}"):
        reason += "; not tried again, for it would end the same way"
    elif failures < instance.max_restarts:
        pause = _doubled(instance.restart_pause, failures, timing.longest_pause)
        return Decision(state=PAUSING, reason=reason, failures=failures + 1, pause=pause)
    else:
        reason += f"; given up after {failures} restarts in a row"
        if instance.start == DEMAND:
            retries = failures - instance.max_restarts
            retry_after = _doubled(timing.first_retry, retries, timing.longest_retry)
            reason += f"; a request after {retry_after:g} s tries again"
    return Decision(state=FAILED, reason=reason, failures=failures + 1, retry_after=retry_after)


def _doubled(first: float, times: int, limit: float) -> float:
    """`first`, doubled so many times, up to a limit."""
    return min(max(limit, first), first * 2.0 ** min(times, 60))


def describe(end: End) -> str:
    """The end in words: a failed start, a crash, stuck, or a normal exit."""
    if end.why:
        return end.why
    status = how(end.status) if end.status is not None else "no status"
    if not end.was_ready:
        return f"failed start: {status} before it was ready"
    return f"ended: {status}" if end.status == 0 else f"crash: {status} after it was ready"
