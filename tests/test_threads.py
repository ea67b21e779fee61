"""Threads of a sweep: several calls at once, answered in order, and the first error when what was begun has ended."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from entropy_core.errors import CheckpointError
from entropy_core.pipeline.threads import Abandoned, Threads


def test_calls_are_made_at_the_same_time_and_answered_in_order():
    with ThreadPoolExecutor(1):
        threads, inside, most = Threads(3), [], []

        def call(number: int) -> int:
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)
            return number

        assert threads.all([partial(call, number) for number in range(7)]) == list(range(7))
    assert max(most) == 3


def test_the_first_error_is_raised_when_what_was_begun_has_ended():
    threads, ended = Threads(2), []

    def fail() -> None:
        raise CheckpointError("it is broken")

    def part() -> None:
        time.sleep(0.1)
        ended.append("the first stage")
        threads.go_on()
        ended.append("the second stage")

    with pytest.raises(CheckpointError, match="it is broken"):
        threads.all([part, partial(threads.all, [fail, fail])])
    assert ended == ["the first stage"]
    threads.go_on()  # it can be used again
    with pytest.raises(CheckpointError):
        threads.all([fail, part, part])
    with pytest.raises(Abandoned):
        threads._failed = True
        threads.go_on()
