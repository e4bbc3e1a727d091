"""The two decisions: every line of their tables by its name, and what holds for every row."""

from __future__ import annotations

import inspect
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_idempotent.core import decision
from celery_idempotent.core.decision import (
    AVAILABLE_GRACE,
    Call,
    CallAction,
    CallPolicy,
    Delivery,
    DeliveryAction,
    DeliveryDecision,
    DeliveryPolicy,
    decide_call,
    decide_delivery,
)
from celery_idempotent.core.records import MAY_HAVE_RUN, MessageKey, ProcessedStatus, Row, Status

NOW = datetime(2024, 6, 1, 12, tzinfo=UTC)
FIRST, OTHER = "first-task-id", "other-task-id"
ONE, TWO = "1" * 64, "2" * 64  # fingerprints


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def ahead(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def row(status: Status, processed_status: ProcessedStatus | None = None, **columns: Any) -> Row:
    return replace(
        Row(
            key=MessageKey("order:1", "shop.charge"),
            status=status,
            processed_status=processed_status,
            created_timestamp=ago(10),
            processed_timestamp=ago(1) if status is Status.DONE else None,
            task_id=FIRST,
            queue="celery",
            fingerprint=ONE,
            attempt=0,
            token=0 if status is Status.PENDING else 1,
            worker=None if status is Status.PENDING else "host:1",
            lease_expires_at=ahead(40) if status is Status.PROCESSING else None,
            available_at=None,
            published_at=ago(10),
            expires_at=None,
            duplicates=0,
            message=b"message",
            result=b"result" if processed_status is ProcessedStatus.SUCCESS else None,
            error="ValueError: no such card" if processed_status is ProcessedStatus.FAILURE else None,
            read_at=NOW,
            ran_task_id=None if status is Status.PENDING else FIRST,
        ),
        **columns,
    )


def pending(**columns: Any) -> Row:
    return row(Status.PENDING, **columns)


def processing(**columns: Any) -> Row:
    return row(Status.PROCESSING, **columns)


def recovery_point(**columns: Any) -> Row:
    return row(Status.PROCESSING, ProcessedStatus.SUCCESS, **columns)


def succeeded(**columns: Any) -> Row:
    return row(Status.DONE, ProcessedStatus.SUCCESS, **columns)


def failed(**columns: Any) -> Row:
    return row(Status.DONE, ProcessedStatus.FAILURE, **columns)


# -- what the producer does with a call --------------------------------------------------------------------------------

CALL = Call(fingerprint=ONE)
IN_CANVAS = Call(fingerprint=ONE, canvas=True)
OWN = Call(fingerprint=ONE, own=True)
SKIP_DUPLICATES = CallPolicy(on_duplicate="skip")
RAISE_DUPLICATES = CallPolicy(on_duplicate="raise")
RESUBMIT = CallPolicy(on_duplicate="raise", resubmit_failed=True)

CallCase = tuple[Row | None, Call, CallPolicy, CallAction]

#: The first table of docs/explanation/decisions.md; under each what it says of which rows.
CALLS: dict[str, list[CallCase]] = {
    "absent, or `expires_at` passed": [
        (None, CALL, SKIP_DUPLICATES, CallAction.RECORD),
        (None, CALL, RAISE_DUPLICATES, CallAction.RECORD),
        (None, IN_CANVAS, SKIP_DUPLICATES, CallAction.RECORD),
        (succeeded(expires_at=ago(1)), CALL, RAISE_DUPLICATES, CallAction.RECORD),
        (succeeded(expires_at=NOW), CALL, RAISE_DUPLICATES, CallAction.RECORD),
        (failed(expires_at=ago(1)), CALL, RAISE_DUPLICATES, CallAction.RECORD),
        (failed(expires_at=ago(1)), IN_CANVAS, RESUBMIT, CallAction.RECORD),
        # The id is free, so its former message does not count.
        (succeeded(expires_at=ago(1), fingerprint=TWO), CALL, RAISE_DUPLICATES, CallAction.RECORD),
    ],
    "there, same fingerprint, nothing else waits on this call": [
        *((there, CALL, SKIP_DUPLICATES, CallAction.RETURN_FIRST) for there in (pending(), processing(), succeeded())),
        *(
            (there, CALL, RAISE_DUPLICATES, CallAction.RAISE_DUPLICATE)
            for there in (pending(), processing(), succeeded())
        ),
        (recovery_point(), CALL, SKIP_DUPLICATES, CallAction.RETURN_FIRST),
        (failed(), CALL, SKIP_DUPLICATES, CallAction.RETURN_FIRST),
        (failed(), CALL, RAISE_DUPLICATES, CallAction.RAISE_DUPLICATE),
        (succeeded(expires_at=ahead(1)), CALL, RAISE_DUPLICATES, CallAction.RAISE_DUPLICATE),
        # Not compared on either side is the same.
        (succeeded(fingerprint=None), CALL, RAISE_DUPLICATES, CallAction.RAISE_DUPLICATE),
        (succeeded(), Call(fingerprint=None), RAISE_DUPLICATES, CallAction.RAISE_DUPLICATE),
        (succeeded(fingerprint=None), Call(fingerprint=None), SKIP_DUPLICATES, CallAction.RETURN_FIRST),
    ],
    "there, and the call is part of a chain, group or chord, or has `link` / `link_error`": [
        (there, IN_CANVAS, policy, CallAction.PUBLISH_COPY)
        for there in (pending(), processing(), recovery_point(), succeeded(), failed())
        for policy in (SKIP_DUPLICATES, RAISE_DUPLICATES)
    ],
    "`pending` for longer than a few minutes": [
        (
            pending(created_timestamp=ago(301), published_at=ago(301)),
            CALL,
            SKIP_DUPLICATES,
            CallAction.PUBLISH_AGAIN,
        ),
        (
            pending(created_timestamp=ago(301), published_at=ago(301)),
            CALL,
            RAISE_DUPLICATES,
            CallAction.PUBLISH_AGAIN,
        ),
        (pending(created_timestamp=ago(301), published_at=None), CALL, SKIP_DUPLICATES, CallAction.PUBLISH_AGAIN),
        (
            pending(created_timestamp=ago(61), published_at=ago(61)),
            CALL,
            CallPolicy(lost_after=60),
            CallAction.PUBLISH_AGAIN,
        ),
        # It may have run while the guard was off.
        (
            pending(created_timestamp=ago(301), published_at=ago(301), error=MAY_HAVE_RUN),
            CALL,
            SKIP_DUPLICATES,
            CallAction.RETURN_FIRST,
        ),
        # Not yet, not since its last publication, and not since its ETA.
        (
            pending(created_timestamp=ago(300), published_at=ago(300)),
            CALL,
            SKIP_DUPLICATES,
            CallAction.RETURN_FIRST,
        ),
        (pending(created_timestamp=ago(999), published_at=ago(5)), CALL, SKIP_DUPLICATES, CallAction.RETURN_FIRST),
        (
            pending(created_timestamp=ago(999), published_at=ago(999), available_at=ago(5)),
            CALL,
            SKIP_DUPLICATES,
            CallAction.RETURN_FIRST,
        ),
        (
            pending(created_timestamp=ago(999), published_at=ago(999), available_at=ahead(999)),
            CALL,
            RAISE_DUPLICATES,
            CallAction.RAISE_DUPLICATE,
        ),
        # Somebody has it: a long run is no loss.
        (
            processing(created_timestamp=ago(999), published_at=ago(999)),
            CALL,
            SKIP_DUPLICATES,
            CallAction.RETURN_FIRST,
        ),
    ],
    "done/failure with `resubmit_failed`": [
        (failed(), CALL, RESUBMIT, CallAction.RESUBMIT),
        (failed(), CALL, replace(RESUBMIT, on_duplicate="skip"), CallAction.RESUBMIT),
        (failed(fingerprint=None), CALL, RESUBMIT, CallAction.RESUBMIT),
        (succeeded(), CALL, RESUBMIT, CallAction.RAISE_DUPLICATE),
        (pending(), CALL, RESUBMIT, CallAction.RAISE_DUPLICATE),
        (processing(), CALL, RESUBMIT, CallAction.RAISE_DUPLICATE),
        (failed(), IN_CANVAS, RESUBMIT, CallAction.RESUBMIT),
    ],
    "there, other fingerprint": [
        (there, Call(fingerprint=TWO, canvas=canvas), policy, CallAction.RAISE_MISMATCH)
        for there in (
            pending(),
            pending(created_timestamp=ago(999), published_at=None),
            processing(),
            succeeded(),
            failed(),
        )
        for canvas in (False, True)
        for policy in (SKIP_DUPLICATES, RAISE_DUPLICATES, RESUBMIT)
    ],
    "the running task's own retry, replace or hold": [
        (there, call, policy, CallAction.TRANSITION)
        for there in (processing(), pending(), succeeded(), failed(), None)
        for call in (OWN, replace(OWN, canvas=True), replace(OWN, fingerprint=TWO))
        for policy in (SKIP_DUPLICATES, RAISE_DUPLICATES, RESUBMIT)
    ],
}


REPEATED = Call(fingerprint=ONE, repeated=True)

NEVER_BEGAN = {"worker": None, "ran_task_id": None, "token": 0}

#: What the code adds to the table, in its own words.
MORE_CALLS: dict[str, list[CallCase]] = {
    "done/failure, revoked or expired before its body ever began": [
        *(
            (failed(**NEVER_BEGAN, error=error), call, policy, CallAction.RESUBMIT)
            for error in ("revoked", "expired: it was not started in time")
            for call in (CALL, IN_CANVAS, replace(CALL, fingerprint=TWO))
            for policy in (SKIP_DUPLICATES, RAISE_DUPLICATES)
        ),
        (failed(error="revoked: it was terminated while it ran"), CALL, SKIP_DUPLICATES, CallAction.RETURN_FIRST),
        (failed(**NEVER_BEGAN, error="ValueError: no"), CALL, SKIP_DUPLICATES, CallAction.RETURN_FIRST),
        # A body that is run again does not undo a revoke of what it has sent.
        (failed(**NEVER_BEGAN, error="revoked"), Call(ONE, repeated=True), RESUBMIT, CallAction.RETURN_FIRST),
    ],
    "the same call, made by an earlier run of the body": [
        # The body that runs again is no duplicate, and has already made the call that failed.
        (there, REPEATED, policy, CallAction.RETURN_FIRST)
        for there in (
            pending(worker="host:1"),
            pending(error=MAY_HAVE_RUN),
            processing(),
            recovery_point(),
            succeeded(),
            failed(),
        )
        for policy in (SKIP_DUPLICATES, RAISE_DUPLICATES, RESUBMIT)
    ],
    "the same call, never claimed": [
        (pending(), REPEATED, policy, CallAction.PUBLISH_AGAIN)
        for policy in (SKIP_DUPLICATES, RAISE_DUPLICATES, RESUBMIT)
    ],
    "the same call, in a canvas that this run has built again": [
        (there, replace(REPEATED, canvas=True), policy, CallAction.PUBLISH_COPY)
        for there in (pending(), processing(), succeeded(), failed())
        for policy in (SKIP_DUPLICATES, RAISE_DUPLICATES, RESUBMIT)
    ],
}


@pytest.mark.parametrize("words", [*CALLS, *MORE_CALLS])
def test_decide_call_follows_the_table(words: str) -> None:
    for there, call, policy, expected in (CALLS | MORE_CALLS)[words]:
        assert decide_call(there, call, policy) is expected, (there, call, policy)


# -- what the consumer does with a delivered message -------------------------------------------------------------------

SAME = Delivery(FIRST, fingerprint=ONE)
COPY = Delivery(OTHER, fingerprint=ONE)
READY = replace(SAME, result_ready=True)
LATER = replace(SAME, canvas=True, later=True)
IGNORED = replace(SAME, awaited=False)
DEFAULT = DeliveryPolicy()
RERUN = DeliveryPolicy(on_abandoned="rerun")
FAIL = DeliveryPolicy(on_abandoned="fail")
ASK = DeliveryPolicy(on_abandoned="ask")

REFUSE = DeliveryDecision(DeliveryAction.REFUSE)
CLAIM = DeliveryDecision(DeliveryAction.CLAIM)
TAKE_OVER = DeliveryDecision(DeliveryAction.TAKE_OVER)
ABANDON = DeliveryDecision(DeliveryAction.ABANDON)
TAKE_OVER_AND_REPLAY = DeliveryDecision(DeliveryAction.TAKE_OVER_AND_REPLAY)
SKIP = DeliveryDecision(DeliveryAction.SKIP)
REPLAY = DeliveryDecision(DeliveryAction.REPLAY)
RAISE_FAILED = DeliveryDecision(DeliveryAction.RAISE_FAILED)
RAISE_MISMATCH = DeliveryDecision(DeliveryAction.RAISE_MISMATCH)


def hold(delay: float) -> DeliveryDecision:
    return DeliveryDecision(DeliveryAction.HOLD, delay)


DeliveryCase = tuple[Row | None, Delivery, DeliveryPolicy, DeliveryDecision]

EXPIRED = {"lease_expires_at": ago(1)}

DELIVERIES: dict[str, list[DeliveryCase]] = {
    "(before all) an id, header or number that no store can keep": [
        (None, replace(SAME, storable=False), DEFAULT, REFUSE),
        (pending(), replace(SAME, storable=False), RERUN, REFUSE),
        (processing(), replace(COPY, storable=False, fingerprint=TWO), FAIL, REFUSE),
        (succeeded(), replace(READY, storable=False), DEFAULT, REFUSE),
    ],
    "absent, or done, `expires_at` passed, and this is no copy of what ended": [
        (None, SAME, DEFAULT, CLAIM),
        (None, replace(SAME, retries=3), FAIL, CLAIM),
        (succeeded(expires_at=ago(1)), COPY, DEFAULT, CLAIM),
        (failed(expires_at=NOW), COPY, DEFAULT, CLAIM),
        (failed(expires_at=NOW, ran_task_id=None), replace(COPY, original_task_id="another"), DEFAULT, CLAIM),
        (succeeded(expires_at=ago(1), fingerprint=TWO), COPY, DEFAULT, CLAIM),
    ],
    "pending, `retries >= attempt` or `available_at` passed by a grace": [
        (pending(), SAME, DEFAULT, CLAIM),
        (pending(), COPY, DEFAULT, CLAIM),
        (pending(attempt=2), replace(SAME, retries=2), DEFAULT, CLAIM),
        (pending(attempt=2), replace(SAME, retries=3), DEFAULT, CLAIM),
        (pending(attempt=2, available_at=ahead(60)), replace(SAME, retries=2), DEFAULT, CLAIM),
        (pending(attempt=2, available_at=ago(AVAILABLE_GRACE)), SAME, DEFAULT, CLAIM),
        (pending(attempt=2, available_at=ago(5)), SAME, DeliveryPolicy(grace=5), CLAIM),
        (pending(fingerprint=None), SAME, DEFAULT, CLAIM),
        (pending(), replace(SAME, fingerprint=None), DEFAULT, CLAIM),
    ],
    "pending, `retries < attempt` (an old copy of a retried message)": [
        (pending(attempt=1, available_at=ahead(60)), SAME, DEFAULT, hold(60 + AVAILABLE_GRACE)),
        (pending(attempt=3, available_at=ahead(60)), replace(COPY, retries=2), FAIL, hold(60 + AVAILABLE_GRACE)),
        (pending(attempt=1, available_at=NOW), SAME, DEFAULT, hold(AVAILABLE_GRACE)),
        (pending(attempt=1, available_at=ago(AVAILABLE_GRACE - 1)), SAME, DEFAULT, hold(AVAILABLE_GRACE)),
        (pending(attempt=1, available_at=ahead(60)), SAME, DeliveryPolicy(grace=5), hold(65)),
    ],
    "processing, lease live, another delivery": [
        *(
            (there, delivery, DeliveryPolicy(on_abandoned=on_abandoned), hold(40))
            for there in (processing(), recovery_point())
            for delivery in (SAME, COPY, IGNORED, replace(COPY, canvas=True), replace(SAME, retries=9))
            for on_abandoned in ("rerun", "fail", "ask")
        ),
        (processing(lease_expires_at=ahead(0.001)), SAME, DEFAULT, hold(0.001)),
        (processing(), SAME, DeliveryPolicy(on_processing="skip"), SKIP),
        (
            processing(),
            SAME,
            DeliveryPolicy(on_processing="raise"),
            DeliveryDecision(DeliveryAction.RAISE_PROCESSING, 40),
        ),
    ],
    'processing, lease expired, `on_abandoned="rerun"`': [
        (processing(**EXPIRED), SAME, RERUN, TAKE_OVER),
        (processing(**EXPIRED), COPY, RERUN, TAKE_OVER),
        (processing(lease_expires_at=NOW), SAME, RERUN, TAKE_OVER),
        (processing(lease_expires_at=None), SAME, RERUN, TAKE_OVER),
        # Whatever is done while an owner lives, this one does not.
        (processing(**EXPIRED), SAME, DeliveryPolicy(on_processing="skip"), TAKE_OVER),
        (processing(**EXPIRED), SAME, DeliveryPolicy(on_processing="raise"), TAKE_OVER),
    ],
    "processing, lease expired, `on_abandoned` is a callable": [
        (processing(**EXPIRED), there, ASK, DeliveryDecision(DeliveryAction.ASK)) for there in (SAME, COPY, IGNORED)
    ],
    'processing, lease expired, `"fail"`': [
        (processing(**EXPIRED), SAME, FAIL, ABANDON),
        (processing(**EXPIRED), COPY, FAIL, ABANDON),
        (processing(lease_expires_at=NOW), SAME, replace(FAIL, on_processing="skip"), ABANDON),
    ],
    "(processing, success), lease expired": [
        (recovery_point(**EXPIRED), SAME, RERUN, TAKE_OVER_AND_REPLAY),
        (recovery_point(**EXPIRED), COPY, RERUN, TAKE_OVER_AND_REPLAY),
        # The body ran: there is nothing to fail.
        (recovery_point(**EXPIRED), SAME, FAIL, TAKE_OVER_AND_REPLAY),
        (recovery_point(**EXPIRED), SAME, ASK, TAKE_OVER_AND_REPLAY),
        # Branch on the status: a result of None is one.
        (recovery_point(**EXPIRED, result=None), SAME, FAIL, TAKE_OVER_AND_REPLAY),
    ],
    "done, this task id's result is ready, or results are ignored": [
        (succeeded(), READY, DEFAULT, SKIP),
        (failed(), READY, DEFAULT, SKIP),
        (succeeded(), replace(COPY, result_ready=True), DEFAULT, SKIP),
        (succeeded(), replace(READY, canvas=True), DEFAULT, SKIP),
        (succeeded(), IGNORED, DEFAULT, SKIP),
        (failed(), IGNORED, DEFAULT, SKIP),
        (succeeded(), replace(IGNORED, canvas=True), DEFAULT, SKIP),
        (failed(), replace(IGNORED, canvas=True), DEFAULT, SKIP),
        (succeeded(), replace(COPY, awaited=False), DEFAULT, SKIP),
        (failed(), replace(COPY, awaited=False), DEFAULT, SKIP),
    ],
    "done, another task id waits on this message_id, or the result never reached the backend": [
        (succeeded(), COPY, DEFAULT, REPLAY),
        (succeeded(), replace(COPY, canvas=True), DEFAULT, REPLAY),
        # Nobody asks for its result, but what comes after it in the canvas does.
        (succeeded(), replace(COPY, canvas=True, awaited=False), DEFAULT, REPLAY),
        (succeeded(), SAME, DEFAULT, REPLAY),
        (succeeded(result=None), COPY, DEFAULT, REPLAY),
        (succeeded(expires_at=ahead(1)), COPY, DEFAULT, REPLAY),
        # The id is free for calls, and these are copies of what ended.
        (succeeded(expires_at=ago(1)), SAME, DEFAULT, REPLAY),
        (succeeded(expires_at=ago(1)), replace(COPY, original_task_id=FIRST), DEFAULT, REPLAY),
        (succeeded(expires_at=ago(1), ran_task_id=OTHER), COPY, DEFAULT, REPLAY),
    ],
    "done/failure, another task id waits on this message_id": [
        (failed(), COPY, DEFAULT, RAISE_FAILED),
        (failed(), replace(COPY, canvas=True), DEFAULT, RAISE_FAILED),
        (failed(), replace(COPY, canvas=True, awaited=False), DEFAULT, RAISE_FAILED),
        # Its own failure never reached the backend.
        (failed(), SAME, DEFAULT, RAISE_FAILED),
        (failed(error=None), COPY, DEFAULT, RAISE_FAILED),
        (failed(expires_at=NOW), SAME, DEFAULT, RAISE_FAILED),
    ],
    "same id, other fingerprint": [
        (there, replace(delivery, fingerprint=TWO), policy, RAISE_MISMATCH)
        for there in (
            pending(),
            processing(),
            processing(**EXPIRED),
            recovery_point(**EXPIRED),
            succeeded(),
            succeeded(expires_at=ahead(1)),
            failed(),
        )
        for delivery in (SAME, COPY, READY, IGNORED)
        for policy in (RERUN, FAIL)
    ],
}


DISCARDED = Delivery(FIRST, discarded="revoked")
OF_A_COPY = replace(DISCARDED, task_id=OTHER)
CANCEL = DeliveryDecision(DeliveryAction.CANCEL)

#: What the code adds to the table, in its own words.
MORE_DELIVERIES: dict[str, list[DeliveryCase]] = {
    "pending, and the delivery was revoked or has expired": [
        (pending(), DISCARDED, DEFAULT, CANCEL),
        (pending(attempt=3, available_at=ahead(60)), DISCARDED, DEFAULT, CANCEL),
        (pending(), OF_A_COPY, DEFAULT, SKIP),
    ],
    "processing, lease live, and the delivery was revoked or has expired": [
        (processing(), DISCARDED, RERUN, DeliveryDecision(DeliveryAction.FORBID)),
        (recovery_point(), DISCARDED, RERUN, DeliveryDecision(DeliveryAction.FORBID)),
        (processing(), OF_A_COPY, RERUN, SKIP),
        # The owner goes on, and copies wait for it.
        (processing(error="revoked"), SAME, RERUN, hold(40)),
    ],
    "processing, lease expired, and the delivery was revoked or has expired, or one before it": [
        (processing(**EXPIRED), DISCARDED, RERUN, CANCEL),
        (processing(**EXPIRED), DISCARDED, FAIL, CANCEL),
        (processing(**EXPIRED), OF_A_COPY, RERUN, SKIP),
        (processing(**EXPIRED, error="revoked"), SAME, RERUN, CANCEL),
        (processing(**EXPIRED, error="revoked"), COPY, FAIL, CANCEL),
        # Its body ran.
        (recovery_point(**EXPIRED), DISCARDED, RERUN, TAKE_OVER_AND_REPLAY),
        (recovery_point(**EXPIRED, error="revoked"), SAME, RERUN, TAKE_OVER_AND_REPLAY),
    ],
    "done after its own callbacks": [
        (succeeded(), replace(SAME, canvas=True), DEFAULT, SKIP),
        (failed(), replace(SAME, canvas=True), DEFAULT, RAISE_FAILED),
        # A copy ran in its place: its callbacks were sent, not those of the first one sent.
        (succeeded(ran_task_id=OTHER), replace(SAME, canvas=True), DEFAULT, REPLAY),
        (succeeded(ran_task_id=OTHER), replace(COPY, canvas=True), DEFAULT, SKIP),
        (succeeded(ran_task_id=OTHER), replace(IGNORED, canvas=True), DEFAULT, REPLAY),
    ],
    "pending or processing, and a later call under the same Celery id": [
        (pending(), LATER, DEFAULT, hold(AVAILABLE_GRACE)),
        (pending(available_at=ahead(60)), LATER, RERUN, hold(60 + AVAILABLE_GRACE)),
        (processing(), LATER, DeliveryPolicy(on_processing="skip"), hold(40 + AVAILABLE_GRACE)),
        (processing(**EXPIRED), LATER, RERUN, hold(AVAILABLE_GRACE)),
        (recovery_point(**EXPIRED), LATER, FAIL, hold(AVAILABLE_GRACE)),
        # Over by now: what waits on the later call has yet to go on.
        (succeeded(), LATER, DEFAULT, REPLAY),
        (succeeded(), replace(LATER, awaited=False), DEFAULT, REPLAY),
        (failed(), LATER, DEFAULT, RAISE_FAILED),
        (failed(), replace(LATER, awaited=False), DEFAULT, RAISE_FAILED),
    ],
    "done/failure by `Reject(requeue=False)`, and the delivery's `x-death` count for `rejected` is higher than the row's": [
        (failed(error="Reject: no; rejected before: 0"), replace(READY, rejected=1), DEFAULT, CLAIM),
        (failed(error="Reject: no; rejected before: 2"), replace(SAME, rejected=3), DEFAULT, CLAIM),
        (failed(error="Reject: no; rejected before: 1"), replace(READY, rejected=1), DEFAULT, SKIP),
        (failed(error="Reject: no; rejected before: 0"), READY, DEFAULT, SKIP),
        (failed(error="ValueError: no"), replace(READY, rejected=3), DEFAULT, SKIP),
        (succeeded(error="odd; rejected before: 0"), replace(READY, rejected=3), DEFAULT, SKIP),
    ],
    "done/failure, and an errback waits on it that was not sent yet": [
        (failed(), replace(READY, callbacks_pending=True), DEFAULT, RAISE_FAILED),
        (failed(), replace(IGNORED, callbacks_pending=True), DEFAULT, RAISE_FAILED),
        (failed(), replace(COPY, callbacks_pending=True), FAIL, RAISE_FAILED),
        (succeeded(), replace(READY, callbacks_pending=True), DEFAULT, SKIP),
    ],
    "done without a result (ignored, replaced)": [
        (succeeded(result=None, error="ignored"), SAME, DEFAULT, SKIP),
        (succeeded(result=None, error="ignored"), COPY, DEFAULT, SKIP),
        (succeeded(result=None, error="replaced"), SAME, DEFAULT, SKIP),
        # Its result is under the first id; callers with another id read it there.
        (succeeded(result=None, error="replaced"), COPY, DEFAULT, REPLAY),
    ],
    "processing, lease expired, taken over too often before (a poison message)": [
        (processing(**EXPIRED, takeovers=5), SAME, RERUN, ABANDON),
        (processing(**EXPIRED, takeovers=4), SAME, RERUN, TAKE_OVER),
        (recovery_point(**EXPIRED, takeovers=5), SAME, RERUN, ABANDON),
        (processing(**EXPIRED, takeovers=1), COPY, DeliveryPolicy(max_takeovers=1), ABANDON),
        (processing(takeovers=9), SAME, RERUN, hold(40)),
    ],
}


@pytest.mark.parametrize("words", [*DELIVERIES, *MORE_DELIVERIES])
def test_decide_delivery_follows_the_table(words: str) -> None:
    for there, delivery, policy, expected in (DELIVERIES | MORE_DELIVERIES)[words]:
        assert decide_delivery(there, delivery, policy) == expected, (there, delivery, policy)


@pytest.mark.parametrize("words", [*CALLS, *MORE_CALLS, *DELIVERIES, *MORE_DELIVERIES])
def test_the_code_says_it_in_the_same_words(words: str) -> None:
    assert f"# {words}" in inspect.getsource(decision)


def test_every_action_stands_in_a_table() -> None:
    assert {expected for cases in CALLS.values() for *_, expected in cases} == set(CallAction)
    assert {expected.action for cases in (DELIVERIES | MORE_DELIVERIES).values() for *_, expected in cases} == set(
        DeliveryAction
    )


# -- the states of docs/explanation/states.md, as far as the decisions move them ---------------------------------------------


@pytest.mark.parametrize(
    ("there", "call", "delivery"),
    [
        pytest.param(None, CallAction.RECORD, CLAIM, id="(absent)"),
        pytest.param(pending(), CallAction.RETURN_FIRST, CLAIM, id="pending --claim-->"),
        pytest.param(processing(), CallAction.RETURN_FIRST, hold(40), id="processing"),
        pytest.param(processing(**EXPIRED), CallAction.RETURN_FIRST, TAKE_OVER, id="lease expired--> claim again"),
        pytest.param(
            pending(attempt=1, token=1, available_at=ahead(10)),
            CallAction.RETURN_FIRST,
            hold(10 + AVAILABLE_GRACE),
            id="<----retry: its first delivery comes back",
        ),
        pytest.param(succeeded(), CallAction.RETURN_FIRST, REPLAY, id="done/success"),
        pytest.param(failed(), CallAction.RETURN_FIRST, RAISE_FAILED, id="done/failure"),
        pytest.param(pending(token=1), CallAction.RETURN_FIRST, CLAIM, id="done/failure --requeue--> pending"),
    ],
)
def test_state_follows_the_table(there: Row | None, call: CallAction, delivery: DeliveryDecision) -> None:
    assert decide_call(there, CALL, SKIP_DUPLICATES) is call
    assert decide_delivery(there, SAME, DEFAULT) == delivery


# -- any row --------------------------------------------------------------------------------------------------

# Seconds before and after the moment at which a row is read; the moment itself is what boundaries are made of.
offsets = st.sampled_from([-1e6, -301.0, -30.0, -1.0, -0.001, 0.0, 0.001, 1.0, 30.0, 301.0, 1e6]) | st.floats(-1e6, 1e6)
moments = st.none() | offsets.map(ahead)
fingerprints = st.sampled_from([None, ONE, TWO])
on_duplicate: st.SearchStrategy[Literal["skip", "raise"]] = st.sampled_from(["skip", "raise"])
on_processing: st.SearchStrategy[Literal["hold", "skip", "raise"]] = st.sampled_from(["hold", "skip", "raise"])
on_abandoned: st.SearchStrategy[Literal["rerun", "fail", "ask"]] = st.sampled_from(["rerun", "fail", "ask"])

rows = st.builds(
    row,
    st.sampled_from(Status),
    st.none() | st.sampled_from(ProcessedStatus),
    created_timestamp=offsets.map(ahead),
    published_at=moments,
    available_at=moments,
    lease_expires_at=moments,
    expires_at=moments,
    attempt=st.integers(0, 3),
    task_id=st.sampled_from([FIRST, OTHER]),
    ran_task_id=st.sampled_from([None, FIRST, OTHER]),
    takeovers=st.integers(0, 6),
    fingerprint=fingerprints,
    result=st.sampled_from([None, b"", b"result"]),
    error=st.sampled_from([None, "ignored", "replaced", "ValueError: no"]),
)
calls = st.builds(Call, fingerprint=fingerprints, canvas=st.booleans(), own=st.booleans())
call_policies = st.builds(
    CallPolicy, on_duplicate=on_duplicate, resubmit_failed=st.booleans(), lost_after=st.sampled_from([1.0, 300.0])
)
deliveries = st.builds(
    Delivery,
    st.sampled_from([FIRST, OTHER]),
    retries=st.integers(0, 3),
    fingerprint=fingerprints,
    awaited=st.booleans(),
    canvas=st.booleans(),
    result_ready=st.booleans(),
)
delivery_policies = st.builds(
    DeliveryPolicy,
    on_processing=on_processing,
    on_abandoned=on_abandoned,
    grace=st.sampled_from([0.5, AVAILABLE_GRACE]),
)

anything = settings(deadline=None, max_examples=200)


def taken(there: Row) -> Row:
    """Return the row while its id is not free."""
    return replace(there, expires_at=ahead(1)) if there.expired else there


def compared(there: Row, given: Call | Delivery) -> bool:
    return there.fingerprint is not None and given.fingerprint is not None and there.fingerprint != given.fingerprint


@anything
@given(st.none() | rows, calls, call_policies)
def test_every_call_is_decided(there: Row | None, call: Call, policy: CallPolicy) -> None:
    action = decide_call(there, call, policy)
    free = there is None or there.expired
    assert (action is CallAction.TRANSITION) == call.own
    assert (action is CallAction.RECORD) == (free and not call.own)
    match action:
        case CallAction.RETURN_FIRST | CallAction.RAISE_DUPLICATE:
            assert (action is CallAction.RETURN_FIRST) == (policy.on_duplicate == "skip")
            assert not call.canvas  # else what waits on this call would wait for ever
        case CallAction.PUBLISH_AGAIN:
            assert there is not None
            assert there.status is Status.PENDING
        case CallAction.RESUBMIT:
            assert there is not None
            assert policy.resubmit_failed
            assert (there.status, there.processed_status) == (Status.DONE, ProcessedStatus.FAILURE)
        case CallAction.RAISE_MISMATCH:
            assert there is not None
            assert compared(there, call)
        case _:
            pass


@anything
@given(rows, calls, call_policies)
def test_a_mismatch_is_never_sent(there: Row, call: Call, policy: CallPolicy) -> None:
    there, call = replace(taken(there), fingerprint=ONE), replace(call, fingerprint=TWO, own=False)
    assert decide_call(there, call, policy) is CallAction.RAISE_MISMATCH


@anything
@given(st.none() | rows, deliveries, delivery_policies)
def test_every_delivery_is_decided(there: Row | None, delivery: Delivery, policy: DeliveryPolicy) -> None:
    decided = decide_delivery(there, delivery, policy)
    assert 0 <= decided.delay < float("inf")
    if there is None:
        assert decided == CLAIM
        return
    state = there.status, there.processed_status
    live = there.lease_left > 0
    match decided.action:
        case DeliveryAction.CLAIM:
            assert there.status is Status.PENDING or (there.status is Status.DONE and there.expired)
        case DeliveryAction.HOLD:
            assert decided.delay > 0  # a copy that comes back at once would spin
            assert there.status is Status.PENDING or (there.status is Status.PROCESSING and live)
        case DeliveryAction.TAKE_OVER | DeliveryAction.ABANDON:
            assert there.status is Status.PROCESSING
            assert not live
            poison = there.takeovers >= policy.max_takeovers
            assert poison or there.processed_status is not ProcessedStatus.SUCCESS
            assert (decided.action is DeliveryAction.TAKE_OVER) == (policy.on_abandoned == "rerun" and not poison)
            assert poison or policy.on_abandoned != "ask"
        case DeliveryAction.ASK:
            assert there.status is Status.PROCESSING
            assert there.processed_status is not ProcessedStatus.SUCCESS
            assert not live
            assert policy.on_abandoned == "ask"
        case DeliveryAction.TAKE_OVER_AND_REPLAY:
            assert state == (Status.PROCESSING, ProcessedStatus.SUCCESS)
            assert not live
        case DeliveryAction.SKIP:
            assert there.status is Status.DONE or (live and policy.on_processing == "skip")
        case DeliveryAction.REPLAY:
            assert there.status is Status.DONE
            assert there.processed_status is not ProcessedStatus.FAILURE
        case DeliveryAction.RAISE_FAILED:
            assert state == (Status.DONE, ProcessedStatus.FAILURE)
        case DeliveryAction.RAISE_PROCESSING:
            assert policy.on_processing == "raise"
            assert there.status is Status.PROCESSING
            assert live
        case DeliveryAction.RAISE_MISMATCH:
            assert compared(there, delivery)


@anything
@given(rows, deliveries, delivery_policies, st.floats(0.001, 1e6))
def test_a_live_lease_is_respected(there: Row, delivery: Delivery, policy: DeliveryPolicy, left: float) -> None:
    # Also while the id is free by its `expires_at`: that says something of a message that is done.
    there = replace(there, status=Status.PROCESSING, lease_expires_at=ahead(left))
    assert decide_delivery(there, delivery, policy).action in {
        DeliveryAction.HOLD,
        DeliveryAction.SKIP,
        DeliveryAction.RAISE_PROCESSING,
        DeliveryAction.RAISE_MISMATCH,
    }


@anything
@given(rows, deliveries, delivery_policies)
def test_a_mismatch_is_never_run(there: Row, delivery: Delivery, policy: DeliveryPolicy) -> None:
    there, delivery = replace(taken(there), fingerprint=ONE), replace(delivery, fingerprint=TWO)
    assert decide_delivery(there, delivery, policy) == RAISE_MISMATCH


@anything
@given(rows, deliveries, delivery_policies)
def test_an_absent_fingerprint_never_mismatches(there: Row, delivery: Delivery, policy: DeliveryPolicy) -> None:
    for one, other in (
        (replace(there, fingerprint=None), delivery),
        (there, replace(delivery, fingerprint=None)),
        (replace(there, fingerprint=ONE), replace(delivery, fingerprint=ONE)),
    ):
        assert decide_delivery(one, other, policy) != RAISE_MISMATCH


@anything
@given(rows, deliveries, delivery_policies)
def test_every_waiting_caller_gets_an_answer(there: Row, delivery: Delivery, policy: DeliveryPolicy) -> None:
    """A delivery whose result somebody awaits is dropped only where that result comes, or came, from elsewhere."""
    delivery = replace(delivery, awaited=True, result_ready=False)
    if decide_delivery(there, delivery, policy) != SKIP:
        return
    asked_for = there.status is Status.PROCESSING and there.lease_left > 0 and policy.on_processing == "skip"
    succeeded = there.status is Status.DONE and there.processed_status is not ProcessedStatus.FAILURE
    was_ignored = succeeded and there.error == "ignored"
    ran = delivery.task_id == there.ran_task_id
    was_sent = succeeded and ran and (delivery.canvas or there.error == "replaced")
    assert asked_for or was_ignored or was_sent


@anything
@given(
    rows,
    deliveries,
    delivery_policies,
    offsets,
    st.floats(0.001, 1e6),
    st.sampled_from([Status.PENDING, Status.PROCESSING]),
)
def test_a_hold_has_a_longest_time(
    there: Row, delivery: Delivery, policy: DeliveryPolicy, available: float, left: float, status: Status
) -> None:
    """The copy that comes back after the delay is not held again when nothing moved meanwhile."""
    there = replace(
        there,
        status=status,
        fingerprint=None,
        attempt=delivery.retries + 1,
        available_at=ahead(available),
        lease_expires_at=ahead(left),
    )
    decided = decide_delivery(there, delivery, replace(policy, on_processing="hold"))
    if decided.action is DeliveryAction.HOLD:
        there = replace(there, read_at=there.read_at + timedelta(seconds=decided.delay, milliseconds=1))
    assert decide_delivery(there, delivery, policy).action in {
        DeliveryAction.CLAIM,
        DeliveryAction.TAKE_OVER,
        DeliveryAction.TAKE_OVER_AND_REPLAY,
        DeliveryAction.ASK,
        DeliveryAction.ABANDON,
        DeliveryAction.CANCEL,
    }


@anything
@given(rows, deliveries, deliveries, delivery_policies)
def test_a_pending_message_is_run_by_its_own_delivery(
    there: Row, delivery: Delivery, other: Delivery, policy: DeliveryPolicy
) -> None:
    there = replace(there, status=Status.PENDING, fingerprint=ONE)
    own = replace(delivery, retries=there.attempt, fingerprint=ONE)
    assert decide_delivery(there, own, policy) == CLAIM
    # And by no copy that the broker kept from before its retry, while the retry may still come.
    early = replace(there, attempt=other.retries + 1, available_at=ahead(1))
    assert decide_delivery(early, replace(other, fingerprint=ONE), policy).action is DeliveryAction.HOLD
