"""Waiting for a condition."""

from __future__ import annotations

import pytest

from tests.support.waiting import wait_until


def test_the_first_true_answer_is_returned() -> None:
    answers = iter([None, 0, "", "yes", "later"])

    assert wait_until(lambda: next(answers), interval=0.0) == "yes"


def test_a_true_answer_counts_even_without_time_to_wait() -> None:
    assert wait_until(lambda: "yes", timeout=0.0) == "yes"


def test_time_up_says_what_was_waited_for_and_the_last_answer() -> None:
    with pytest.raises(AssertionError, match=r"waited 0 s in vain for: the ship \(last answer: \[\]\)"):
        wait_until(list, timeout=0.0, describe=lambda: "the ship")


def test_an_error_of_the_condition_ends_the_wait() -> None:
    def broken() -> bool:
        raise OSError("no such thing")

    with pytest.raises(OSError, match="no such thing"):
        wait_until(broken)
