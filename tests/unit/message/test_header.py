"""The header: written once, read back as it was, and never a reason to fail."""

from __future__ import annotations

import json
from typing import Any

import pytest

from celery_idempotent.core.records import MessageKey
from celery_idempotent.message.header import HEADER, Header

TRACE = f"00-{'a' * 32}-{'b' * 16}-01"
SENT = Header("order:1", "shop.charge", "0b51", "f" * 64, holds=2)


@pytest.mark.parametrize(
    "header",
    [
        SENT,
        Header("order:1", "shop.charge", "0b51"),
        Header("order:1", "shop.charge", "0b51", copied=True, original_task_id="0b50", worker_lost_retries=2),
        Header("ключ:1", "задача", "0b51"),
        Header("0b51", "shop.charge", "0b51", copied=True, call="again:1"),
    ],
)
def test_it_survives_the_wire(header: Header) -> None:
    assert Header.read(json.loads(json.dumps(header.write(None)))) == header


def test_it_leaves_other_headers_as_they_are() -> None:
    headers = {"trace": "t-1", HEADER: "somebody's"}
    assert SENT.write(headers) == {"trace": "t-1", HEADER: SENT.write(None)[HEADER]}
    assert headers == {"trace": "t-1", HEADER: "somebody's"}, "the caller's headers are not changed"


def test_it_carries_no_more_than_it_must() -> None:
    assert Header("m", "t", "i").write({}) == {HEADER: {"message_id": "m", "task": "t", "task_id": "i"}}


GOOD: dict[str, Any] = {"message_id": "m", "task": "t", "task_id": "i"}


@pytest.mark.parametrize(
    "headers",
    [
        None,
        {},
        {"other": GOOD},
        "text",
        {HEADER: None},
        {HEADER: "m"},
        {HEADER: ["m", "t", "i"]},
        {HEADER: {}},
        *({HEADER: {key: value for key, value in GOOD.items() if key != missing}} for missing in GOOD),
        *({HEADER: {**GOOD, wrong: 5}} for wrong in GOOD),
        *({HEADER: {**GOOD, wrong: None}} for wrong in GOOD),
    ],
    ids=repr,
)
def test_malformed_fields_count_as_absent(headers: Any) -> None:
    assert Header.read(headers) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("fingerprint", wrong) for wrong in (5, None)),
        *(("holds", wrong) for wrong in ("many", -1, None)),
        *(("first", wrong) for wrong in (5, None)),
        *(("lost", wrong) for wrong in ("many", -1, None)),
    ],
)
def test_a_detail_that_is_malformed_is_left_out(key: str, value: object) -> None:
    assert Header.read({HEADER: {**GOOD, key: value}}) == Header("m", "t", "i")


def test_a_later_versions_details_do_no_harm() -> None:
    assert Header.read({HEADER: {**GOOD, "colour": "red"}}) == Header("m", "t", "i")


@pytest.mark.parametrize(
    ("task_name", "task_id", "belongs"),
    [
        ("shop.charge", "0b51", True),
        ("shop.charge", "other", False),
        ("shop.refund", "0b51", False),
        ("shop.charge", None, False),
    ],
)
def test_it_belongs_to_its_own_task_and_celery_id_only(task_name: str, task_id: str | None, belongs: bool) -> None:
    assert SENT.belongs_to(task_name, task_id) is belongs


class TestTheNextMarker:
    """Made of the one before: what is not named goes along."""

    KEY = MessageKey("m", "t")

    def test_of_a_copy_says_whose_it_is(self) -> None:
        copy = Header.new(self.KEY, "copy", "f", trace=TRACE).copy_of("first")
        assert copy == Header("m", "t", "copy", "f", copied=True, original_task_id="first", trace=TRACE)
        assert (copy.key, copy.row_of_its_own, copy.original_id) == (self.KEY, MessageKey("copy", "t"), "first")

    @pytest.mark.parametrize(("lost", "count"), [(False, 1), (True, 2)])
    def test_of_a_retry_keeps_whose_calls_it_makes(self, lost: bool, count: int) -> None:
        before = Header(
            "m", "t", "i", "f", holds=3, copied=True, original_task_id="first", worker_lost_retries=1, trace=TRACE
        )
        assert before.next_attempt(lost=lost) == Header(
            "m", "t", "i", "f", original_task_id="first", worker_lost_retries=count, trace=TRACE
        )

    def test_of_a_delivery_is_as_it_was_sent(self) -> None:
        sent = Header(
            "m", "t", "i", "f", holds=3, copied=True, original_task_id="first", worker_lost_retries=1, trace=TRACE
        )
        assert Header.delivered(self.KEY, "i", sent.write(None)) == sent

    def test_of_a_delivery_with_another_messages_header_has_no_history(self) -> None:
        sent = Header("other", "t", "other", "f", original_task_id="first", worker_lost_retries=1, trace=TRACE)
        assert Header.delivered(self.KEY, "i", sent.write(None)) == Header("m", "t", "i", "f")

    def test_of_a_delivery_with_another_tasks_header_is_none(self) -> None:
        assert Header.delivered(self.KEY, "i", Header("m", "other", "i").write(None)) is None
