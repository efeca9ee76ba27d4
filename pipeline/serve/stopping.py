"""Signals that ask to stop, and how a program ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.core import log
from pipeline.core.errors import PipelineError
from pipeline.core.process import WINDOWS, Argv, Process, shown, start_attached

# Errors after which another start would fail the same way: ours, llama-server's, argparse's,
# Python's, Pixi's.
HOPELESS = (
    r"cannot be started: (No such file|Permission denied|The system cannot find)"
    r"|is not an address: |error: invalid argument: |error while handling argument "
    r"|failed to load GGUF split|failed to open GGUF file .*No such file"
    r"|error: (unrecognized arguments|argument -|the following arguments are required)"
    r"|port \d+ is taken by \S+ of .*, which is up"
    # vLLM's own check of its options; what it has to download first may be there the next time
    r"|validation errors? for \w+Config\n.*Value error, .*(not supported|is greater than|must be)"
    r"|No module named |could not find pixi\.toml|unknown environment "
)
NOT_FOUND = (126, 127)  # exit statuses of a shell without the program
POLL_SECONDS = 0.05
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")


@contextmanager
def asked_to_stop(*names: str) -> Iterator[list[int]]:
    """A list that grows by one with each signal that asks to stop, while the block runs; `names`
    are those of the signals, by default STOP_SIGNALS."""
    stops: list[int] = []
    with handled(stops.append, *(names or STOP_SIGNALS)):
        yield stops


@contextmanager
def handled(handle: Callable[[int], None], *names: str) -> Iterator[None]:
    """Call `handle` with the number of each of these signals that comes while the block runs."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers = [number for number in numbers if number != signal.SIGHUP]  # how nohup works
    before = {x: signal.signal(x, lambda number, _: handle(number)) for x in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pass_on(process: Process, number: int) -> None:
    """Hand a signal that we got to a program on our terminal, which sends Ctrl-C and its own end
    to all of our group itself."""
    if WINDOWS:
        return
    with contextlib.suppress(ProcessLookupError):
        is_of_group = os.getpgid(process.pid) == os.getpgrp()
        from_terminal = number != signal.SIGTERM and os.isatty(0) and is_of_group
        if not from_terminal:
            process.send_signal(number)


def run_attached(
    words: Argv,
    *,
    name: str = "",
    env: Mapping[str, str],
    patience: float,
    folder: Path | None = None,
) -> None:
    """Run a program on our terminal to its end. It gets every signal that asks us to stop, and is
    killed `patience` seconds after the first. Raises PipelineError where it fails by itself; `name`
    is what the error calls it."""
    log.info(f"+ {shown(words)}")
    with asked_to_stop() as stops:
        process = start_attached(words, env=env, cwd=folder)
        status = stay([process], stops, patience=patience)
    if status and not stops:
        raise PipelineError(
            f"{name or Path(words[0]).name} ended with {status}", "its output is above"
        )


def stay(
    processes: Sequence[Process],
    stops: Sequence[int],
    *,
    patience: float = float("inf"),
    noticed: Callable[[int], bool] = lambda number: True,
) -> int:
    """Wait until these programs on our terminal have ended; the exit status of the first that
    failed, which ends the others. Each signal that is added to `stops` is passed on if `noticed`
    agrees; `patience` seconds after the first one they are killed."""
    handled = failed = 0
    deadline = float("inf")
    while running := [process for process in processes if process.poll() is None]:
        new = stops[handled:]
        handled += len(new)
        if signals := [number for number in new if noticed(number)]:
            deadline = min(deadline, time.monotonic() + patience)
        if not failed and (failed := _first_failure(processes)):
            signals.append(signal.SIGTERM)
        for process in running:
            for number in signals:
                pass_on(process, number)
            if time.monotonic() > deadline:
                process.kill()
        time.sleep(POLL_SECONDS)
    return failed or _first_failure(processes)


def _first_failure(processes: Sequence[Process]) -> int:
    return next((process.returncode for process in processes if process.returncode), 0)


def how(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


def is_hopeless(status: int | None, output: str) -> bool:
    """Whether a start that failed like this would fail again."""
    return status in NOT_FOUND or bool(re.search(HOPELESS, output))
