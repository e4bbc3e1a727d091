"""A store that is observed: its caller may be interrupted at each verb, and each verb must keep the invariants."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from celery_idempotent.core.records import MessageKey, Row, RowFilter
from celery_idempotent.core.store import Store
from tests.chaos.model.invariants import VerbCall, check_invariants

__all__ = ["ObservedStore"]

_READS = {"find", "rows", "counts", "lapsed", "waiting", "unsent", "check", "init", "close"}


class ObservedStore:
    """A store as its users see it.

    Args:
        store: The one that is asked.
        gate: Called before and after each verb; what it raises keeps the verb from being asked, or its answer from being heard.
        saw: Called with each change of a row.
    """

    def __init__(
        self, store: Store, gate: Callable[[], None], saw: Callable[[VerbCall, Row | None, Row | None], None]
    ) -> None:
        self._store = store
        self._gate = gate
        self._saw = saw
        #: The rows as they stand.
        self.rows: dict[MessageKey, Row] = self._read()

    def as_store(self) -> Store:
        """Itself, by the port's type."""
        return cast("Store", self)

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._store, name)
        if not hasattr(Store, name):  # what only some stores have
            return verb

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._gate()
            answer = verb(*args, **kwargs)
            if name not in _READS:
                given = inspect.signature(getattr(Store, name)).bind(self, *args, **kwargs).arguments
                self._witness(VerbCall(name, given, answer))
            self._gate()
            return answer

        return watched

    def _read(self) -> dict[MessageKey, Row]:
        return {row.key: row for row in self._store.rows(RowFilter(limit=1000))}

    def _witness(self, act: VerbCall) -> None:
        before, self.rows = self.rows, self._read()
        for key in sorted({*before, *self.rows, *act.keys}, key=str):
            check_invariants(act, key, before.get(key), self.rows.get(key))
            self._saw(act, before.get(key), self.rows.get(key))
