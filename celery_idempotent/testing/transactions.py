"""The contract of verbs in the users' transactions: ``within``, ``recorded`` and ``gave_way``."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import pytest

from celery_idempotent.core.records import Claim, Duplicate, Inserted, MessageKey, ProcessedStatus, Status
from celery_idempotent.core.store import Store, TransactionalStore
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import KEY, LEASE, claim, new_message, pending, processing, read, same_row, take

__all__ = ["TransactionContract"]

OTHER = MessageKey("order:2", "shop.charge")


class TransactionContract(StoreFixtures):
    """``within``, ``recorded``, ``gave_way``: what :class:`~celery_idempotent.core.store.TransactionalStore` adds to ``Store``."""

    @pytest.fixture
    def transactional(self, open_store_again: Callable[[], Store]) -> Iterator[TransactionalStore]:
        """Yield a handle on this test's rows, and close it at the end."""
        store = cast("TransactionalStore", open_store_again())
        store.find(KEY)
        yield store
        store.close()

    def test_what_is_written_takes_effect_with_the_commit(self, transactional: TransactionalStore) -> None:
        held = processing(transactional)
        before = read(transactional)
        with transactional.engine.connect() as connection:
            within = transactional.within(connection)
            assert within.complete(held, result=b"1", unique_for=3600.0)
            assert read(within).status is Status.DONE
            assert same_row(read(transactional), before)
            connection.commit()
        row = read(transactional)
        assert (row.status, row.processed_status, row.result) == (Status.DONE, ProcessedStatus.SUCCESS, b"1")

    def test_what_is_rolled_back_was_not_written(self, transactional: TransactionalStore) -> None:
        held = processing(transactional)
        before = read(transactional)
        with transactional.engine.connect() as connection:
            assert transactional.within(connection).complete(held, result=b"1")
            connection.rollback()
        assert same_row(read(transactional), before)
        assert transactional.complete(held, result=b"2")

    def test_verbs_of_one_transaction_stand_or_fall_together(self, transactional: TransactionalStore) -> None:
        held = processing(transactional)
        for end in ("rollback", "commit"):
            with transactional.engine.connect() as connection:
                within = transactional.within(connection)
                assert within.record(new_message(OTHER)) == Inserted()
                assert isinstance(within.record(new_message(OTHER)), Duplicate)
                assert within.complete(held, result=b"1")
                getattr(connection, end)()
            assert (transactional.find(OTHER) is not None) is (end == "commit")
            assert (read(transactional).status is Status.DONE) is (end == "commit")

    def test_a_lost_claim_writes_nothing(self, transactional: TransactionalStore) -> None:
        held = processing(transactional)
        transactional.expire(held)
        assert take(transactional, read(transactional)) is not None
        before = read(transactional)
        with transactional.engine.connect() as connection:
            within = transactional.within(connection)
            assert not within.complete(held, result=b"1")
            assert not within.checkpoint(held, result=b"1", lease=LEASE)
            assert not within.retry(held, new_message(attempt=1))
            connection.commit()
        assert same_row(read(transactional), before)

    def test_a_renewal_before_the_completion_does_not_keep_it_from_being_written(
        self, transactional: TransactionalStore
    ) -> None:
        held = processing(transactional)
        with transactional.engine.connect() as connection:
            assert transactional.renew([held], lease=600.0) == []
            assert transactional.within(connection).complete(held, result=b"1")
            connection.commit()
        assert read(transactional).status is Status.DONE

    def test_the_recovery_point_and_the_way_on_may_be_written_so_too(self, transactional: TransactionalStore) -> None:
        held = processing(transactional)
        with transactional.engine.connect() as connection:
            assert transactional.within(connection).checkpoint(held, result=b"1")
            connection.commit()
        assert read(transactional).processed_status is ProcessedStatus.SUCCESS
        with transactional.engine.connect() as connection:
            assert transactional.within(connection).retry(held, new_message(attempt=1, delay=0.0))
            connection.commit()
        assert (read(transactional).status, read(transactional).attempt) == (Status.PENDING, 1)

    def test_a_claim_may_be_part_of_a_transaction(self, transactional: TransactionalStore) -> None:
        pending(transactional)
        with transactional.engine.connect() as connection:
            claim(transactional.within(connection))
            connection.rollback()
        assert (read(transactional).status, read(transactional).token) == (Status.PENDING, 0)
        assert claim(transactional) == Claim(KEY, 1)

    def test_what_is_recorded_is_told_with_its_task_ids(self, transactional: TransactionalStore) -> None:
        pending(transactional)
        with transactional.engine.connect() as connection:
            transactional.within(connection).record(new_message(OTHER))
            connection.rollback()
        assert transactional.recorded([KEY, OTHER]) == {KEY: read(transactional).task_id}
        assert transactional.recorded([]) == {}

    def test_an_error_of_the_bodys_own_is_no_giving_way(self, transactional: TransactionalStore) -> None:
        assert not transactional.gave_way(ValueError("no"))
        assert not transactional.gave_way(KeyboardInterrupt())
        assert not transactional.collided(ValueError("no"))
