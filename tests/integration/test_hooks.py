"""What hooks see of each message, from producers, workers and recovery, and what they do not see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chain
from kombu.exceptions import OperationalError
from sqlalchemy.orm import Session

from celery_idempotent import DuplicateMessageError, MessageMismatchError, outbox
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, Status
from celery_idempotent.maintenance.purge import purge
from celery_idempotent.maintenance.recovery import Recovery
from celery_idempotent.maintenance.rescue import Rescue
from celery_idempotent.message.serialization import encode_message, encode_result
from tests.conftest import attach_log
from tests.support.deployment import unique
from tests.support.hook_recorder import HOOK, HookRecorder, recording_hooks
from tests.support.servers import skip_if_not_installed
from tests.support.shared_workers import SharedWorker, open_shared_worker
from tests.support.waiting import TIMEOUT, wait_until


@pytest.fixture(scope="module")
def hook_recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HookRecorder]:
    """Yield what the hooks of the shared worker, and of its app in this process, were told."""
    with recording_hooks(Path(tmp_path_factory.mktemp("hooks"))) as hook_recorder:
        yield hook_recorder


@pytest.fixture(scope="module")
def worker_with_hooks(hook_recorder: HookRecorder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedWorker]:
    """Yield a shared worker with a hook that raises, followed by one that records."""
    tasks = tuple(f"tests.support.apps.{name}" for name in ("generic", "identified", "lasting", "outcomes"))
    with (
        skip_if_not_installed(),
        open_shared_worker(
            Path(tmp_path_factory.mktemp("worker")),
            tasks,
            settings={
                "idempotent_hooks": ["tests.support.hook_recorder.broken", HOOK],
                "idempotent_recovery_interval": 0,
                "idempotent_lease": 5.0,
            },
        ) as shared_worker,
    ):
        yield shared_worker


@pytest.fixture
def shared_worker(request: pytest.FixtureRequest, worker_with_hooks: SharedWorker) -> SharedWorker:
    """Return that worker; a test uses message ids of its own."""
    attach_log(request, "the worker", worker_with_hooks.worker.log_tail)
    return worker_with_hooks


def leave_behind(shared_worker: SharedWorker, task: str, message_id: str, *args: Any, **options: Any) -> str:
    """Leave a message as a worker that died does: claimed, its lease over. Return its task id."""
    task_id = unique("task")
    message = encode_message(args, {}, {"task_id": task_id, **options}, serializer="json")
    new = NewMessage(MessageKey(message_id, task), task_id, queue=shared_worker.spec.queue, message=message)
    claimed = shared_worker.app.queue_log.store.claim(new, worker="gone@test:1", lease=0.01, grace=0.0)
    assert isinstance(claimed, Claimed)
    shared_worker.wait_for_row(task, message_id, lambda row: row.lease_left <= 0)
    return task_id


def revoke(shared_worker: SharedWorker, task_id: str, **options: Any) -> str:
    assert shared_worker.app.control.revoke(task_id, reply=True, timeout=TIMEOUT, limit=1, **options)
    return task_id


class TestTheProducer:
    def test_hooks_see_a_call_and_its_duplicate_with_the_first_id(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        m = unique()
        first = shared_worker.task("echo").apply_async(("secret",), message_id=m)
        assert first.get(timeout=TIMEOUT) == "secret"
        shared_worker.wait_until_done("echo", m)
        shared_worker.task("echo").apply_async(("secret",), message_id=m)

        recorded, claimed, completed, duplicate = (
            hook_recorder.wait(m, kind) for kind in ("recorded", "claimed", "completed", "duplicate")
        )
        assert sorted(hook_recorder.kinds(m)) == ["claimed", "completed", "duplicate", "recorded"]
        assert all(note["task_name"] == "echo" for note in hook_recorder(m))
        assert (recorded["task_id"], recorded["queue"], recorded["worker"]) == (
            first.id,
            shared_worker.spec.queue,
            None,
        )
        assert recorded["store"] > 0
        assert (claimed["token"], claimed["attempt"], claimed["task_id"]) == (1, 0, first.id)
        assert claimed["worker"].startswith(f"{shared_worker.worker.hostname}:")
        assert claimed["store"] > 0
        assert completed["store"] > 0
        assert completed["ran"] > 0
        assert (duplicate["first_task_id"], duplicate["status"]) == (first.id, "done")
        assert duplicate["reason"] == "return_first"
        assert duplicate["task_id"] != first.id
        assert duplicate["age"] > 0
        # Neither arguments nor results.
        assert "secret" not in str(hook_recorder(m))

    def test_hooks_see_errors_raised_to_the_caller(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        order = unique("order")
        shared_worker.task("order.raise").delay(order).get(timeout=TIMEOUT)
        with pytest.raises(DuplicateMessageError):
            shared_worker.task("order.raise").delay(order)
        with pytest.raises(MessageMismatchError):
            shared_worker.task("order.raise").delay(order, 2)

        assert hook_recorder.wait(f"order:{order}", "duplicate")["reason"] == "raise_duplicate"
        assert hook_recorder.wait(f"order:{order}", "mismatched")["status"] in {"processing", "done"}

    def test_a_publication_that_fails_is_withdrawn(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        m = unique()
        app = shared_worker.producer(
            broker="redis://127.0.0.1:9/0", task_publish_retry=False, broker_connection_timeout=1
        )
        with pytest.raises(OperationalError):
            app.tasks["echo"].apply_async(message_id=m)

        assert hook_recorder.kinds(m) == ["withdrawn"]

    def test_a_copy_in_a_canvas_is_a_duplicate_and_is_replayed(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        m = unique()
        first = shared_worker.task("echo").apply_async(("v",), message_id=m)
        first.get(timeout=TIMEOUT)
        shared_worker.wait_until_done("echo", m)
        result = chain(
            shared_worker.task("echo").si("v").set(message_id=m), shared_worker.task("echo").s(), app=shared_worker.app
        ).apply_async()
        assert result.get(timeout=TIMEOUT) == "v"

        duplicate, replayed = hook_recorder.wait(m, "duplicate"), hook_recorder.wait(m, "replayed")
        assert (duplicate["reason"], duplicate["task_id"]) == ("publish_copy", result.parent.id)
        assert (replayed["first_task_id"], replayed["task_id"]) == (first.id, result.parent.id)

    def test_a_message_sent_again_after_a_failure_is_recorded_once_more(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        order, flag = unique("order"), shared_worker.path("flag")
        shared_worker.task("order.again").delay(order, flag).get(timeout=TIMEOUT, propagate=False)
        shared_worker.wait_until_done("order.again", f"order:{order}")
        Path(flag).touch()
        shared_worker.task("order.again").delay(order, flag).get(timeout=TIMEOUT)

        assert hook_recorder.wait(f"order:{order}", "recorded", count=2)["reason"] == "resubmit"
        assert hook_recorder.wait(f"order:{order}", "failed")["reason"] == "ValueError"

    def test_hooks_see_calls_by_name_too(self, shared_worker: SharedWorker, hook_recorder: HookRecorder) -> None:
        m = unique()
        first = shared_worker.app.send_task("echo", ("v",), message_id=m)
        first.get(timeout=TIMEOUT)
        shared_worker.wait_until_done("echo", m)
        shared_worker.app.send_task("echo", ("v",), message_id=m).get(timeout=TIMEOUT)

        assert hook_recorder.wait(m, "recorded")["task_id"] == first.id
        assert hook_recorder.wait(m, "duplicate")["reason"] == "by_name"

    def test_hooks_see_each_call_of_a_batch(self, shared_worker: SharedWorker, hook_recorder: HookRecorder) -> None:
        ids = [unique() for _ in range(3)]
        with outbox():
            results = [shared_worker.task("echo").apply_async((m,), message_id=m) for m in ids]
            assert all(hook_recorder(m) == [] for m in ids)

        assert [result.get(timeout=TIMEOUT) for result in results] == ids
        for m, result in zip(ids, results, strict=True):
            assert hook_recorder.wait(m, "recorded")["task_id"] == result.id

    def test_hooks_see_a_call_after_its_commit_and_not_after_a_rollback(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        m = unique()
        with Session(shared_worker.app.queue_log.store.engine) as session, outbox(session):
            shared_worker.task("echo").apply_async(message_id=m)
            session.rollback()
            assert hook_recorder(m) == []
            result = shared_worker.task("echo").apply_async(message_id=m)
            assert hook_recorder(m) == []
            session.commit()

        assert hook_recorder.wait(m, "recorded")["task_id"] == result.id
        hook_recorder.wait(m, "completed")
        assert sorted(hook_recorder.kinds(m)) == ["claimed", "completed", "recorded"]


class TestTheWorker:
    def test_a_failure_says_its_type_and_not_its_text(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        m = unique()
        shared_worker.task("fail").apply_async(("with a card number",), message_id=m).get(
            timeout=TIMEOUT, propagate=False
        )

        failed = hook_recorder.wait(m, "failed")
        assert failed["reason"] == "ValueError"
        assert failed["ran"] > 0
        assert failed["store"] > 0
        assert "card number" not in str(hook_recorder(m))

    def test_hooks_see_a_retry_with_its_next_attempt(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        m = unique()
        shared_worker.task("retry_n").apply_async((1,), message_id=m).get(timeout=TIMEOUT)

        hook_recorder.wait(m, "completed")
        notes = [(note["kind"], note["attempt"], note["token"]) for note in hook_recorder(m) if note["worker"]]
        assert notes == [
            ("claimed", 0, 1),
            ("retried", 1, 1),
            ("claimed", 1, 2),
            ("completed", 1, 2),
        ]

    def test_a_copy_of_a_running_message_is_held_and_then_skipped(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        m, gate = unique(), shared_worker.path("gate")
        first = shared_worker.task("gated").apply_async((gate,), message_id=m)
        shared_worker.wait_for_starts("gated", m)
        shared_worker.deliver("gated", (gate,), message_id=m, task_id=first.id)

        held = hook_recorder.wait(m, "held")
        assert (held["status"], held["task_id"]) == ("processing", first.id)
        assert held["delay"] > 0
        assert held["age"] > 0
        Path(gate).touch()
        skipped = hook_recorder.wait(m, "skipped")
        assert (skipped["status"], skipped["first_task_id"]) == ("done", first.id)

    def test_a_copy_with_other_arguments_is_mismatched(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        m = unique()
        shared_worker.task("echo").apply_async((1,), message_id=m).get(timeout=TIMEOUT)
        shared_worker.deliver("echo", (2,), message_id=m)

        assert hook_recorder.wait(m, "mismatched")["worker"] is not None

    def test_a_copy_of_a_failed_message_is_replayed_as_a_failure(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        m = unique()
        shared_worker.task("fail").apply_async(message_id=m).get(timeout=TIMEOUT, propagate=False)
        shared_worker.wait_until_done("fail", m)
        shared_worker.deliver("fail", message_id=m)

        assert hook_recorder.wait(m, "replayed")["reason"] == "failure"

    def test_a_message_is_taken_over(self, shared_worker: SharedWorker, hook_recorder: HookRecorder) -> None:
        m, gate = unique(), shared_worker.path("gate")
        Path(gate).touch()
        task_id = leave_behind(shared_worker, "last.late", m, gate, "v")
        shared_worker.deliver("last.late", (gate, "v"), message_id=m, task_id=task_id).get(timeout=TIMEOUT)

        hook_recorder.wait(m, "completed")
        assert [(note["kind"], note["token"]) for note in hook_recorder(m)] == [("taken_over", 2), ("completed", 2)]

    def test_a_recovery_point_is_taken_over_and_replayed(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        m = unique()
        task_id = unique("task")
        new = NewMessage(MessageKey(m, "echo"), task_id, message=encode_message((), {}, {}, serializer="json"))
        store = shared_worker.app.queue_log.store
        claimed = store.claim(new, worker="gone@test:1", lease=0.01, grace=0.0)
        assert store.checkpoint(claimed.claim, result=encode_result(shared_worker.app, "v"))
        shared_worker.wait_for_row("echo", m, lambda row: row.lease_left <= 0)
        shared_worker.deliver("echo", message_id=m, task_id=task_id).get(timeout=TIMEOUT)

        hook_recorder.wait(m, "completed")
        assert hook_recorder.kinds(m) == ["taken_over", "replayed", "completed"]
        assert hook_recorder.wait(m, "completed")["ran"] is None

    def test_a_message_that_must_not_run_again_is_abandoned(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        m = unique()
        task_id = leave_behind(shared_worker, "last.early", m, "no gate")
        shared_worker.deliver("last.early", ("no gate",), message_id=m, task_id=task_id).get(
            timeout=TIMEOUT, propagate=False
        )

        assert hook_recorder.wait(m, "abandoned")["first_task_id"] == task_id

    def test_a_worker_that_loses_a_child_tells_in_its_place(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        m = unique()
        shared_worker.task("die.early").apply_async((shared_worker.path("flag"),), message_id=m).get(
            timeout=TIMEOUT, propagate=False
        )

        abandoned = hook_recorder.wait(m, "abandoned")
        assert abandoned["pid"] == shared_worker.worker.pid
        assert abandoned["worker"] == hook_recorder.wait(m, "claimed")["worker"]

    def test_a_revoked_message_is_cancelled(self, shared_worker: SharedWorker, hook_recorder: HookRecorder) -> None:
        m = unique()
        shared_worker.task("echo").apply_async(message_id=m, task_id=revoke(shared_worker, unique("task")))

        assert hook_recorder.wait(m, "cancelled")["reason"] == "revoked"

    def test_an_expired_message_is_cancelled(self, shared_worker: SharedWorker, hook_recorder: HookRecorder) -> None:
        m = unique()
        shared_worker.task("echo").apply_async(message_id=m, expires=-1.0)

        assert hook_recorder.wait(m, "cancelled")["reason"] == "expired"

    def test_hooks_see_a_lost_claim_in_the_end(self, shared_worker: SharedWorker, hook_recorder: HookRecorder) -> None:
        m, gate = unique(), shared_worker.path("gate")
        shared_worker.task("gated").apply_async((gate,), message_id=m)
        shared_worker.wait_for_starts("gated", m)
        with shared_worker.app.queue_log.store.engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE queue_log SET token = token + 1 WHERE message_id = '{m}'")
        Path(gate).touch()

        lost = hook_recorder.wait(m, "lease_lost")
        assert lost["token"] == 1
        assert lost["ran"] > 0
        assert sorted(hook_recorder.kinds(m)) == ["claimed", "lease_lost", "recorded"]

    def test_a_failing_hook_is_logged_once_per_process(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        m = unique()
        shared_worker.task("echo").apply_async(message_id=m).get(timeout=TIMEOUT)
        hook_recorder.wait(m, "completed")
        log = shared_worker.worker.log.read_text()

        # The main process and its children: those of the pool, and those that took their places.
        logged, processes = (
            log.count("raised an error for"),
            {note["pid"] for note in _every(hook_recorder) if note["worker"]},
        )
        assert 1 <= logged <= len(processes)
        assert "RuntimeError: no claimed, thank you" in log


class TestRecovery:
    def test_a_publication_from_the_row_is_recovered(
        self, shared_worker: SharedWorker, hook_recorder: HookRecorder
    ) -> None:
        taken_back, relayed, lost, gate = (
            unique(),
            unique(),
            unique(),
            shared_worker.path("gate"),
        )
        Path(gate).touch()
        store, message = shared_worker.app.queue_log.store, encode_message((), {}, {}, serializer="json")

        def record(m: str, *, published: bool) -> None:
            key = MessageKey(m, "echo")
            store.record(
                NewMessage(key, unique("task"), shared_worker.spec.queue, published=published, message=message)
            )

        leave_behind(shared_worker, "last.late", taken_back, gate)
        record(relayed, published=False)
        Recovery(shared_worker.app.queue_log).run_pass()
        for m, reason in ((taken_back, "taken_back"), (relayed, "relayed")):
            hook_recorder.wait(m, "completed")
            assert hook_recorder.wait(m, "recovered")["reason"] == reason

        record(lost, published=True)
        Rescue.of(shared_worker.app.queue_log).publish_waiting(0.0)
        hook_recorder.wait(lost, "completed")
        recovered = hook_recorder.wait(lost, "recovered")
        assert (recovered["reason"], recovered["status"]) == ("lost", "pending")

    def test_a_purge_tells_how_many(self, shared_worker: SharedWorker, hook_recorder: HookRecorder) -> None:
        ids = [unique() for _ in range(3)]
        for m in ids:
            shared_worker.task("echo").apply_async(message_id=m)
        for m in ids:
            shared_worker.wait_until_done("echo", m)
        purged = wait_until(lambda: purge(shared_worker.app.queue_log, older_than=0.0), describe="something to purge")

        note = hook_recorder.wait(None, "purged")
        assert (note["count"], note["task_name"]) == (purged, None)
        assert all(shared_worker.find("echo", m) is None for m in ids)


def test_a_silent_store_is_logged_where_the_app_says_run(
    shared_worker: SharedWorker, hook_recorder: HookRecorder
) -> None:
    m = unique()
    app = shared_worker.producer(
        idempotent_store="postgresql+psycopg://nobody@127.0.0.1:1/none", idempotent_on_store_error="run"
    )
    result = app.tasks["echo"].apply_async(("v",), message_id=m)

    assert hook_recorder.wait(m, "unguarded")["worker"] is None
    batched = [unique() for _ in range(2)]
    with outbox():
        for name in batched:
            app.tasks["echo"].apply_async(("v",), message_id=name)
    for name in batched:
        assert hook_recorder.wait(name, "unguarded")["worker"] is None
    assert result.get(timeout=TIMEOUT) == "v"
    assert shared_worker.row("echo", m).status in {Status.PROCESSING, Status.DONE}


def _every(hook_recorder: HookRecorder) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in hook_recorder._path.read_text().splitlines()]
