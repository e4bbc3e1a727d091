"""The queue log of an app: its settings, its store and its hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, TypeVar, cast, runtime_checkable

# Import these before an app's settings can be shown, and before anything is logged.
from celery_idempotent.core import log_lines, settings_mask  # noqa: F401
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.hooks import Hooks
from celery_idempotent.settings import Settings
from celery_idempotent.stores import open_store

if TYPE_CHECKING:
    from celery import Celery

    from celery_idempotent.core.store import Store
    from celery_idempotent.core.transactions import SessionFactory

__all__ = ["QueueLog"]

_ATTRIBUTE = "queue_log"


T = TypeVar("T")


@runtime_checkable
class _Resting(Protocol):
    """A part with a thread that must end with the app."""

    def rest(self) -> None: ...


class QueueLog:
    """The queue log of an app.

    Tasks with ``base=IdempotentTask`` make one for their app when they are bound. Its store is opened at the first call or the
    first delivery, in the process that needs it. To use your own store, make one yourself before the first call::

        QueueLog(app, store=SQLStore(engine), session_factory=sessionmaker(expire_on_commit=False))

    Args:
        app: The Celery app. A queue log that it already has is replaced.
        store: The store to use instead of the setting ``idempotent_store``.
        session_factory: Makes the sessions of atomic tasks: your ``sessionmaker`` or ``scoped_session``. Its ``bind`` is
            overridden, because each session uses the connection of its body. Default: SQLAlchemy's ``Session``.
        isolation_level: The isolation level of atomic tasks, by SQLAlchemy's name (``"SERIALIZABLE"``). Default: the
            engine's. Hazard: if a transaction's snapshot is fixed, as from ``REPEATABLE READ`` on PostgreSQL, a body that takes
            longer than a third of its lease is run twice; see "Atomic tasks".

    Raises:
        ConfigurationError: ``store`` is not a store, or ``session_factory`` cannot be called.
    """

    def __init__(
        self,
        app: Celery,
        store: Store | None = None,
        *,
        session_factory: SessionFactory | None = None,
        isolation_level: str | None = None,
    ) -> None:
        if store is not None and not callable(getattr(store, "record", None)):
            raise ConfigurationError(
                f"QueueLog(app, store=...) takes a store such as SQLStore(url), not {type(store).__name__}; "
                f"for a URL, use the setting idempotent_store"
            )
        if session_factory is not None and not callable(session_factory):
            raise ConfigurationError(
                f"QueueLog(app, session_factory=...) takes a sessionmaker, not {type(session_factory).__name__}"
            )
        self.app = app
        self.session_factory = session_factory
        self.isolation_level = isolation_level
        self._given_store = store
        self._parts: dict[type, object] = {}
        setattr(app, _ATTRIBUTE, self)
        _close_with(app)

    @classmethod
    def of(cls, app: Celery) -> QueueLog:
        """Return the app's queue log; make one if there is none yet."""
        found = vars(app).get(_ATTRIBUTE)
        return found if isinstance(found, cls) else cls(app)

    @cached_property
    def settings(self) -> Settings:
        """The app's ``idempotent_*`` settings, read once.

        Raises:
            ConfigurationError: A setting is unknown or has a wrong value.
        """
        return Settings.from_app(self.app)

    @cached_property
    def store(self) -> Store:
        """The store, opened lazily: connections belong to the process that made them.

        Raises:
            ConfigurationError: The URL is not valid, or its driver is not installed.
        """
        if self._given_store is not None:
            return self._given_store
        settings = self.settings
        try:
            store = open_store(settings.store, table=settings.table)
        except ConfigurationError as error:
            raise ConfigurationError(f"setting idempotent_store: {error}") from error
        # Close the store when the app is collected. At exit, the operating system does it.
        weakref.finalize(self, store.close).atexit = False
        return store

    @cached_property
    def hooks(self) -> Hooks:
        """The app's hooks, which may be none.

        Raises:
            ConfigurationError: A hook of the setting ``idempotent_hooks`` cannot be imported.
        """
        return Hooks.of(self.settings.hooks)

    def part(self, kind: type[T], make: Callable[[], T]) -> T:
        """Return an object that a higher layer keeps for this queue log; make it at the first call.

        Args:
            kind: Its class; there is one object per class.
            make: Makes the object.

        Atomicity: N concurrent threads get the same object. There is no lock, which a fork could leave locked.
        """
        found = self._parts.get(kind) or self._parts.setdefault(kind, make())
        return cast("T", found)

    def init(self) -> bool:
        """Create the table if it is missing, or upgrade one of an older version; return whether anything was created or changed.

        Safe while workers run, also those of the version before, and for any number of concurrent calls. A large table takes long.

        Raises:
            SchemaError: A table of that name has no known version.
            StoreUnavailableError: The store did not answer.
        """
        return self.store.init()

    def close(self) -> None:
        """Close the store's connections in this process, if the store was opened. Its next use opens new ones.

        Call it before a test drops its database. Messages that this process still runs, in a worker's thread, would open it again: end
        them first. ``app.close()`` does the same, and ends the threads.
        """
        if "store" in vars(self):
            self.store.close()

    def end(self) -> None:
        """Close all that was opened for the app in this process, because the app is closed. It is opened again if it is used again."""
        if self._given_store is None:
            self.close()
        for part in list(self._parts.values()):
            if isinstance(part, _Resting):
                part.rest()

    def __repr__(self) -> str:
        return f"<QueueLog of {self.app.main or 'app'}>"


def _close_with(app: Celery) -> None:
    """Make ``app.close()`` close what the app's queue log has opened. Celery has no signal for it."""
    if "close" in vars(app):
        return
    itself = weakref.ref(app)
    close = type(app).close

    def close_all() -> None:
        app = itself()
        if app is not None:
            QueueLog.of(app).end()
            close(app)

    app.close = close_all
