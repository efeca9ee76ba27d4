"""Several things at once: all are done, the first failure is told, nothing waits for the rest."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.core.parallel import Background, for_each


@pytest.mark.parametrize("at_once", [1, 3, 50])
def test_all_are_done_and_no_more_than_so_many_at_once(at_once: int) -> None:
    lock, running, most, done = threading.Lock(), 0, 0, []

    def work(number: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
            done.append(number)

    for_each(work, range(20), at_once)
    assert sorted(done) == list(range(20))
    assert most <= at_once


def test_nothing_to_do() -> None:
    for_each(lambda item: 1 / 0, [], 4)


def test_a_failure_is_told_while_another_still_waits() -> None:
    hold = threading.Event()

    def work(number: int) -> None:
        if number:
            raise ValueError(number)
        hold.wait(120)

    start = time.monotonic()
    with pytest.raises(ValueError, match="1"):
        for_each(work, [0, 1], 2)
    assert time.monotonic() - start < 60
    hold.set()


def test_work_in_the_background_is_waited_for_as_often_as_one_likes() -> None:
    begun, hold = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        hold.wait(10)

    background = Background(work)
    assert begun.wait(10)
    background.check()
    hold.set()
    background.wait()
    background.wait()
    background.check()


def test_a_failure_in_the_background_reaches_who_waits() -> None:
    background = Background(lambda: 1 / 0)
    for ask in (background.wait, background.check, background.wait):
        with pytest.raises(ZeroDivisionError):
            ask()
