"""How a body ended is read in one place."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, states
from celery.exceptions import Ignore, Reject, Retry

from celery_idempotent.core.records import NoResultReason
from celery_idempotent.worker.body_end import (
    Completed,
    Failed,
    Ignored,
    Released,
    Retried,
    end_as_seen,
    end_by_error,
    end_by_value,
)

RETRY = Retry("again")
WITH_SIGNATURE = Retry("again", sig=Celery(set_as_current=False).signature("task"))
REJECT = Reject("poison", requeue=False)


@pytest.mark.parametrize("value", [None, 0, [], RETRY])
def test_a_value_completes(value: Any) -> None:
    assert end_by_value(value, eager=True) == Completed(value)


def test_an_eager_retry_that_is_returned_is_one() -> None:
    assert end_by_value(WITH_SIGNATURE, eager=True) == Retried(WITH_SIGNATURE)
    assert end_by_value(WITH_SIGNATURE, eager=False) == Completed(WITH_SIGNATURE)


@pytest.mark.parametrize(
    ("error", "replacing", "end"),
    [
        (RETRY, False, Retried(RETRY)),
        (Ignore(), False, Ignored(NoResultReason.IGNORED)),
        (Ignore(), True, Ignored(NoResultReason.REPLACED)),
        (Reject("later", requeue=True), False, Released()),
        (ValueError("no"), False, Failed("ValueError: no")),
    ],
    ids=repr,
)
def test_an_error_has_its_end(error: Exception, replacing: bool, end: object) -> None:
    assert end_by_error(error, replacing=replacing, rejections=0) == end


def test_a_rejection_counts_those_before_it() -> None:
    first, third = (end_by_error(REJECT, replacing=False, rejections=rejections) for rejections in (0, 2))
    assert isinstance(first, Failed)
    assert isinstance(third, Failed)
    assert first != third


@pytest.mark.parametrize(
    ("state", "outcome", "end"),
    [
        (states.SUCCESS, 5, Completed(5, dispatched=True)),
        (states.RETRY, RETRY, Retried(RETRY)),
        (states.IGNORED, None, Ignored(NoResultReason.IGNORED)),
        (states.REJECTED, REJECT, end_by_error(REJECT, replacing=False, rejections=0)),
        (states.FAILURE, ValueError("no"), Failed("ValueError: no")),
    ],
)
def test_each_celery_state_has_its_end(state: str, outcome: Any, end: object) -> None:
    assert end_as_seen(state, outcome, replacing=False, rejections=0) == end
