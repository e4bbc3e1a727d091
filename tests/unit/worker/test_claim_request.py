"""What is known of a claim whose answer did not come."""

from __future__ import annotations

from dataclasses import replace

import pytest

from celery_idempotent import SQLStore, StoreUnavailableError
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, NotClaimed, Row
from celery_idempotent.worker.claim_request import ClaimAnswer, ClaimRequest
from celery_idempotent.worker.delivery import worker_label

KEY = MessageKey("m", "task")
OWN = worker_label("host")


@pytest.fixture
def claimed() -> tuple[Claimed, Row]:
    """Return a claim, and its row."""
    store = SQLStore("sqlite://")
    answer = store.claim(NewMessage(KEY, "task-id"), worker=OWN, lease=60.0, grace=0.0)
    row = store.find(KEY)
    store.close()
    assert isinstance(answer, Claimed)
    assert row is not None
    return answer, row


def answer_after(request: ClaimRequest, row: Row) -> ClaimAnswer:
    return request.ask(lambda: NotClaimed(row))


@pytest.mark.parametrize("unsent", [True, False])
def test_only_a_request_that_may_have_arrived_leaves_a_claim(claimed: tuple[Claimed, Row], unsent: bool) -> None:
    request = ClaimRequest("host")
    silence = StoreUnavailableError("gone")
    silence.unsent = unsent

    with pytest.raises(StoreUnavailableError), request.noting_silence():
        raise silence

    answer = answer_after(request, claimed[1])
    assert (answer.outcome_unknown, answer.is_own(claimed[1]), answer.granted) == (not unsent,) * 3


def test_a_claim_that_was_noted_is_found_again(claimed: tuple[Claimed, Row]) -> None:
    request = ClaimRequest("host")
    assert request.ask(lambda: claimed[0]).granted
    assert not answer_after(request, claimed[1]).granted
    request.note_claim()
    assert answer_after(request, claimed[1]).granted


def test_somebody_elses_claim_is_not_ours(claimed: tuple[Claimed, Row]) -> None:
    request = ClaimRequest("host")
    request.note_claim()
    row = replace(claimed[1], worker="other:1")
    assert not answer_after(request, row).is_own(row)
    assert not answer_after(request, row).granted
