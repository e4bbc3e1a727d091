"""The fixtures that the contract's tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from celery_idempotent.core.store import Store

__all__ = ["StoreFixtures"]


class StoreFixtures:
    """The fixture that a subclass overrides, and those that depend on it."""

    @pytest.fixture
    def open_store_again(self) -> Callable[[], Store]:
        """Return a function that opens a new handle on this test's rows: none at first, and not shared with other tests.

        It must be picklable, because other processes call it: use a ``functools.partial`` of a class or of a
        module's function. The schema exists, or the first handle creates it.
        """
        raise NotImplementedError("override the fixture open_store_again")

    @pytest.fixture
    def store(self, open_store_again: Callable[[], Store]) -> Iterator[Store]:
        """Yield a handle on this test's rows, and close it at the end."""
        store = open_store_again()
        yield store
        store.close()
