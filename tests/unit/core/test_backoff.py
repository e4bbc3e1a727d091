"""Pauses between attempts."""

from __future__ import annotations

import pytest

from celery_idempotent.core.backoff import Backoff


def test_each_pause_is_twice_as_long_up_to_the_longest() -> None:
    backoff = Backoff(0.5, longest=3.0)
    assert [backoff.pause(failures) for failures in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_a_first_pause_is_never_longer_than_the_longest() -> None:
    assert Backoff(5.0, longest=1.0).pause(1) == 1.0


@pytest.mark.parametrize("longest", [60.0, float("inf")])
def test_any_number_of_failures_has_a_pause(longest: float) -> None:
    assert 60.0 <= Backoff(1.0, longest).pause(10**9) <= longest


def test_random_pauses_differ_and_stay_below_the_pause() -> None:
    backoff = Backoff(1.0, longest=4.0)
    pauses = [backoff.random_pause(9) for _ in range(100)]
    assert len(set(pauses)) > 90
    assert all(0.0 <= pause <= 4.0 for pause in pauses)
    assert max(pauses) > 2.0
