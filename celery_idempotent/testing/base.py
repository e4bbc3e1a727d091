"""The fixtures on which the contract stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from celery_idempotent.core.store import Store

__all__ = ["StoreFixtures"]


class StoreFixtures:
    """What a subclass fills in, and what follows from it."""

    @pytest.fixture
    def open_store_again(self) -> Callable[[], Store]:
        """Return a function that opens a new handle on this test's rows, which are none at first and no other test's.

        It has to survive ``pickle``, because other processes call it: a ``functools.partial`` of a class or of a
        module's function will do. The schema is there, or made by the first handle.
        """
        raise NotImplementedError("override the fixture open_store_again")

    @pytest.fixture
    def store(self, open_store_again: Callable[[], Store]) -> Iterator[Store]:
        """Yield a handle on this test's rows, closed in the end."""
        store = open_store_again()
        yield store
        store.close()
