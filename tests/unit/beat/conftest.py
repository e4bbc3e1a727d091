"""Beats on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery, _state, signals

from celery_idempotent import IdempotentTask, QueueLog, SQLStore
from celery_idempotent.beat import scheduler, tick_log
from celery_idempotent.core.records import MessageKey


class Killed(BaseException):
    """The process is gone."""


class World:
    """The time of all beats and of the store, and what the broker got."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.now = datetime(2026, 11, 30, 2, 59, 30, tzinfo=UTC)
        #: What was published: when, of which entry (its first argument), under which Celery id.
        self.published: list[tuple[datetime, str, str]] = []
        #: Called before a message is published, and after.
        self.before: Any = lambda: None
        self.after: Any = lambda: None
        self._apps: list[Celery] = []
        engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
        sa.event.listen(
            engine, "connect", lambda connection, _: connection.create_function("strftime", -1, self._strftime)
        )
        self.store = SQLStore(engine)
        #: Whether a process is dying: it takes nothing back.
        self.dying = False
        self.store.withdraw = self._withdraw  # type: ignore[method-assign]

    def _withdraw(self, key: MessageKey, *, task_id: str) -> bool:
        if self.dying:
            raise Killed
        return SQLStore.withdraw(self.store, key, task_id=task_id)

    def kill_at_next(self, when: str) -> None:
        """Kill the process that publishes next, ``"before"`` or ``"after"`` it has."""

        def kill() -> None:
            setattr(self, when, lambda: None)
            self.dying = True
            raise Killed

        setattr(self, when, kill)

    def monotonic(self) -> float:
        return self.now.timestamp()

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def _strftime(self, _format: str, _now: str, later: str | None = "+0 seconds") -> str | None:
        """Answer as SQLite would at this time: the store asks for ``now``, and for moments from now."""
        if later is None:
            return None
        moment = self.now + timedelta(seconds=float(later.removesuffix(" seconds")))
        return f"{moment:%Y-%m-%d %H:%M:%S}.{moment.microsecond // 1000:03}000"

    def app(self, *, ahead: float = 0.0, **settings: Any) -> Celery:
        """Return an app for a beat whose clock is some seconds ahead."""
        app = Celery("shop", broker="memory://", set_as_current=False)
        app.conf.update(settings)
        app.now = lambda: self.now + timedelta(seconds=ahead)
        for name in ("guarded", "other.guarded"):
            app.task(base=IdempotentTask, name=name, shared=False)(_body)
        app.task(name="plain", shared=False)(_body)
        QueueLog(app, store=self.store)
        self._apps.append(app)
        return app

    def publishing(self, **_: Any) -> None:
        self.dying = False
        self.before()

    def note(self, headers: dict[str, Any], body: Any, **_: Any) -> None:
        self.published.append((self.now, str(body[0][0]), headers["id"]))
        self.after()

    def sent(self, entry: str) -> list[datetime]:
        """Return when each message of an entry was published first."""
        first: dict[str, datetime] = {}
        for moment, of, task_id in self.published:
            if of == entry:
                first.setdefault(task_id, moment)
        return list(first.values())

    def close(self) -> None:
        for app in self._apps:
            app.close()
        self.store.engine.dispose()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path)
    clock = SimpleNamespace(monotonic=world.monotonic)
    monkeypatch.setattr(_state._tls, "current_app", None)
    monkeypatch.setattr(scheduler, "time", clock)
    monkeypatch.setattr(tick_log, "time", clock)
    signals.before_task_publish.connect(world.publishing, weak=False)
    signals.after_task_publish.connect(world.note, weak=False)
    yield world
    signals.before_task_publish.disconnect(world.publishing)
    signals.after_task_publish.disconnect(world.note)
    world.close()


def _body(*_: Any, **__: Any) -> None: ...
