"""The contract of a store's life: ``init``, ``outstanding``, ``check``, ``inspect``, ``close``."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

from collections.abc import Callable

from celery_idempotent.core.records import Status
from celery_idempotent.core.store import Change, Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import KEY, claim, pending, read

__all__ = ["LifeContract"]


class LifeContract(StoreFixtures):
    """Creating, checking, closing and reopening a store."""

    def test_what_is_there_is_not_made_again(self, store: Store) -> None:
        store.init()
        pending(store)
        assert not store.init()
        assert store.find(KEY) is not None

    def test_nothing_is_outstanding_where_all_is_there(self, store: Store) -> None:
        store.init()
        assert list(store.outstanding()) == []
        seen: list[Change] = []
        assert not store.init(before=seen.append)
        assert seen == []

    def test_a_store_that_is_there_checks_out(self, store: Store) -> None:
        store.init()
        store.check()

    def test_what_is_there_is_inspected(self, store: Store) -> None:
        store.init()
        assert store.inspect()

    def test_a_closed_store_may_be_used_again(self, store: Store) -> None:
        pending(store)
        store.close()
        store.close()
        assert read(store).status is Status.PENDING

    def test_handles_see_the_same_rows(self, store: Store, open_store_again: Callable[[], Store]) -> None:
        other = open_store_again()
        try:
            pending(store)
            held = claim(other)
            assert read(store).token == held.token
            assert store.complete(held, result=b"1")
            assert read(other).result == b"1"
        finally:
            other.close()
