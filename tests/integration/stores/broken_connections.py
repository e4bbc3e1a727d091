"""What holds of every store whose connections break: an answer that is lost, a server that is away, an exception in between.

A test class derives from ``BrokenConnectionContract``; its module has the fixtures ``tapped_store`` and ``wire_tap``.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from celery_idempotent.core.records import (
    Claim,
    Claimed,
    Inserted,
    MessageKey,
    NewMessage,
    NotClaimed,
    Owner,
    ProcessedStatus,
)
from celery_idempotent.core.store import Store
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.testing.examples import (
    GRACE,
    KEY,
    LEASE,
    WORKER,
    claim,
    expired_id,
    new_message,
    pending,
    processing,
    read,
    try_claim,
)
from tests.support.waiting import wait_until
from tests.support.wire_tap import WireTap

__all__ = ["BrokenConnectionContract", "InterruptedByTestError", "interrupted_when"]

ENDINGS: dict[str, Callable[[Store, Claim], bool]] = {
    "checkpoint": lambda store, held: store.checkpoint(held, result=b"1"),
    "complete": lambda store, held: store.complete(held, result=b"1"),
    "fail": lambda store, held: store.fail(held, error="E: no"),
    "fail by worker": lambda store, held: store.fail(Owner(KEY, WORKER), error="E: no"),
    "retry": lambda store, held: store.retry(held, new_message(attempt=1)),
    "retry by worker": lambda store, held: store.retry(Owner(KEY, WORKER), new_message(attempt=1)),
    "release": lambda store, held: store.release(held),
    "release by worker": lambda store, held: store.release(Owner(KEY, WORKER)),
    "expire": lambda store, held: store.expire(held),
    "renew": lambda store, held: store.renew([held], lease=LEASE) == [],
}


class BrokenConnectionContract:
    """A statement is repeated once, and stays right if it had taken effect the first time."""

    #: How many answers a claim of an absent message takes; each may be the one that is lost.
    answers_of_a_claim: int

    def open_at(self, port: int) -> Store:
        """Return a store at a port of this machine, for the account ``shop`` with the password ``hunter2``."""
        raise NotImplementedError

    def answers_before_an_expired_id_is_taken(self, store: Store) -> int:
        """Return how many answers come before the one to the write."""
        return 0

    def use_before(self, ending: str, store: Store) -> None:
        """Have the server know the script of an ending, so that its next use is one answer."""

    # -- an answer that is lost --------------------------------------------------------------------------------------------

    def test_a_record_whose_answer_was_lost_is_recorded(self, tapped_store: Store, wire_tap: WireTap) -> None:
        wire_tap.cut()
        assert tapped_store.record(new_message()) == Inserted()
        assert read(tapped_store).task_id == "task-1"
        assert wire_tap.connections == 2

    def test_a_record_that_found_another_task_is_not_mistaken(self, tapped_store: Store, wire_tap: WireTap) -> None:
        pending(tapped_store, task_id="task-0")
        wire_tap.cut()
        assert tapped_store.record(new_message()) != Inserted()

    def test_an_expired_id_recorded_with_its_answer_lost_is_recorded(
        self, tapped_store: Store, wire_tap: WireTap
    ) -> None:
        old = expired_id(tapped_store)
        wire_tap.cut(after_answers=self.answers_before_an_expired_id_is_taken(tapped_store))
        assert tapped_store.record(new_message(task_id="task-2")) == Inserted()
        assert read(tapped_store).token == old.token

    def test_a_claim_whose_answer_was_lost_is_claimed_once(self, tapped_store: Store, wire_tap: WireTap) -> None:
        pending(tapped_store)
        wire_tap.cut()
        assert try_claim(tapped_store) == Claimed(Claim(KEY, 1))
        assert read(tapped_store).token == 1

    def test_a_claim_that_found_another_owner_is_not_mistaken(self, tapped_store: Store, wire_tap: WireTap) -> None:
        processing(tapped_store)
        wire_tap.cut()
        assert isinstance(try_claim(tapped_store, worker="host-b:202"), NotClaimed)

    def test_an_absent_message_is_claimed_whichever_answer_was_lost(
        self, tapped_store: Store, wire_tap: WireTap
    ) -> None:
        try_claim(tapped_store, new_message(MessageKey("loads the scripts", "t")))
        for answers in range(self.answers_of_a_claim):
            key = MessageKey(f"m-{answers}", "t")
            connections = wire_tap.connections
            wire_tap.cut(after_answers=answers)
            assert try_claim(tapped_store, new_message(key)) == Claimed(Claim(key, 1))
            assert read(tapped_store, key).token == 1
            assert wire_tap.connections == connections + 1, "an answer was lost"

    def test_a_takeover_whose_answer_was_lost_is_taken_over_once(self, tapped_store: Store, wire_tap: WireTap) -> None:
        tapped_store.expire(processing(tapped_store))
        row = read(tapped_store)
        wire_tap.cut()
        answer = tapped_store.take_over(row, task_id="task-2", worker="host-b:202", lease=LEASE, attempt=0)
        assert answer == Claimed(Claim(KEY, 2))
        assert (read(tapped_store).token, read(tapped_store).takeovers) == (2, 1)

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_an_ending_whose_answer_was_lost_was_written(
        self, tapped_store: Store, wire_tap: WireTap, ending: str
    ) -> None:
        self.use_before(ending, tapped_store)
        held = processing(tapped_store)
        wire_tap.cut()
        assert ENDINGS[ending](tapped_store, held)
        assert read(tapped_store).token == held.token

    def test_a_withdrawal_whose_answer_was_lost_is_withdrawn(self, tapped_store: Store, wire_tap: WireTap) -> None:
        pending(tapped_store)
        wire_tap.cut()
        assert tapped_store.withdraw(KEY, task_id="task-1")
        assert tapped_store.find(KEY) is None

    def test_compare_and_set_whose_answer_was_lost_was_written(self, tapped_store: Store, wire_tap: WireTap) -> None:
        row = pending(tapped_store)
        wire_tap.cut()
        assert tapped_store.republish(row)

        wire_tap.cut()
        assert tapped_store.cancel(KEY, task_id="task-1", error="revoked")

        wire_tap.cut()
        assert tapped_store.resubmit(read(tapped_store), new_message(task_id="task-2"))

        tapped_store.expire(claim(tapped_store))
        row = read(tapped_store)
        wire_tap.cut()
        assert tapped_store.abandon(row, error="abandoned")
        assert read(tapped_store).processed_status is ProcessedStatus.FAILURE

    # -- no answer at all --------------------------------------------------------------------------------------------------

    def test_a_server_that_is_not_there_is_unavailable_and_its_password_is_not_told(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as nobody:
            port = nobody.getsockname()[1]
        store = self.open_at(port)
        with pytest.raises(StoreUnavailableError) as caught:
            store.record(new_message())
        assert caught.value.unsent
        assert "hunter2" not in f"{caught.value} {caught.value.__cause__} {store!r}"
        assert f"shop:***@127.0.0.1:{port}" in str(caught.value)

    # -- exceptions from elsewhere -----------------------------------------------------------------------------------------

    def test_an_adopt_that_fails_leaves_the_store_usable(self, tapped_store: Store) -> None:
        def adopt() -> NewMessage:
            raise InterruptedByTestError

        with pytest.raises(InterruptedByTestError):
            tapped_store.claim(new_message(), worker=WORKER, lease=LEASE, grace=GRACE, adopt=adopt)
        assert tapped_store.find(KEY) is None


class InterruptedByTestError(Exception):
    """What a soft time limit is: raised by a signal, wherever the main thread is."""


@contextmanager
def interrupted_when(condition: Callable[[], bool]) -> Iterator[None]:
    """Raise in the main thread as soon as the condition holds."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise InterruptedByTestError

    def watch() -> None:
        # Not more often: InnoDB answers from a cache for as long as it is asked ten times a second.
        wait_until(condition, interval=0.2)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        watcher.join()
        signal.signal(signal.SIGUSR1, before)
