"""What a child reports of a copy that did not run, and the event that the worker sends."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from celery.exceptions import Ignore

from celery_idempotent.core.records import MessageKey
from celery_idempotent.worker.events import EVENTS, DuplicateIgnored, announce

KEY = MessageKey("order:1", "charge")


class Request:
    """A worker's request, as far as events are concerned."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def send_event(self, type_: str, **fields: Any) -> None:
        self.sent.append((type_, fields))


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (DuplicateIgnored("done", KEY, "skipped", running=False), ("task-skipped", {})),
        (DuplicateIgnored("runs", KEY, "skipped", running=True), ("idempotent-skipped", {})),
        (DuplicateIgnored("runs", KEY, "held", running=False, countdown=2.5), ("task-held", {"countdown": 2.5})),
        (DuplicateIgnored("runs", KEY, "held", running=True, countdown=0.0), ("idempotent-held", {"countdown": 0.0})),
    ],
)
def test_a_pickled_duplicate_makes_its_one_event(error: DuplicateIgnored, event: tuple[str, dict[str, Any]]) -> None:
    request = Request()

    announce(request, pickle.loads(pickle.dumps(error)))

    type_, fields = event
    assert request.sent == [(type_, {"message_id": "order:1", "name": "charge", **fields})]
    assert EVENTS[type_] == error.fate


def test_it_is_a_message_to_be_ignored_and_says_why() -> None:
    error = DuplicateIgnored("charge[order:1] is a duplicate", KEY, "skipped", running=False)

    assert isinstance(error, Ignore)
    assert str(error) == "charge[order:1] is a duplicate"


def test_other_errors_make_no_event() -> None:
    request = Request()

    announce(request, Ignore("the body's own"))
    announce(request, ValueError("failed"))

    assert request.sent == []
