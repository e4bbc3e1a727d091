"""The queue log of an app: its settings, its store and its hooks."""

from __future__ import annotations

import inspect
import logging
import warnings
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar, cast, runtime_checkable

# Import these before an app's settings can be shown, and before anything is logged.
from celery_idempotent.core import log_lines, settings_mask  # noqa: F401
from celery_idempotent.errors import ConfigurationError, EagerStoreWarning
from celery_idempotent.hooks import Hooks
from celery_idempotent.messages import Messages
from celery_idempotent.settings import Settings
from celery_idempotent.stores import open_store

if TYPE_CHECKING:
    from celery import Celery

    from celery_idempotent.core.store import Store
    from celery_idempotent.core.transactions import SessionFactory

__all__ = ["QueueLog", "of_each_app"]

logger = logging.getLogger("celery_idempotent")

_ATTRIBUTE = "queue_log"


T = TypeVar("T")


@runtime_checkable
class _Resting(Protocol):
    """A part with a thread that must end with the app."""

    def rest(self) -> None: ...


class QueueLog(Messages):
    """The queue log of an app.

    It is the app's attribute ``queue_log``: ``app.queue_log``, or ``QueueLog.of(app)`` for type checkers. Its store is opened at the first call or the
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

    #: What a test gives each app in place of its store; ``None`` outside of tests. See :mod:`celery_idempotent.in_tests`.
    stand_in: ClassVar[Callable[[QueueLog], Store] | None] = None

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
        self._warned = False
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

    @property
    def store(self) -> Store:
        """The store, opened lazily: connections belong to the process that made them. In tests, what stands in for it.

        Raises:
            ConfigurationError: The URL is not valid, or its driver is not installed.
        """
        stand_in = QueueLog.stand_in
        return self.own_store if stand_in is None else stand_in(self)

    @property
    def is_open(self) -> bool:
        """Whether asking for :attr:`store` opens nothing: it was opened before, or a test's stands in for it."""
        return QueueLog.stand_in is not None or "own_store" in vars(self)

    @property
    def given_store(self) -> Store | None:
        """The store that the app's code gave; ``None`` if the setting names it."""
        return self._given_store

    @cached_property
    def own_store(self) -> Store:
        """The app's own store, also in tests."""
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

    def warn_of_eager_call(self) -> None:
        """Warn once if an eager call is about to be recorded in a store that outlives this process."""
        if self._warned or QueueLog.stand_in is not None or not getattr(self.store, "lasting", True):
            return
        self._warned = True
        text = (
            f"a task of {self!r} is called eagerly (task_always_eager, or apply()), and recorded in {self.store!r}: what runs here as "
            f"done is not run again, not even by a worker. In tests, give the app idempotent_store='sqlite://', or use the pytest plugin"
        )
        logger.warning("%s", text)
        warnings.warn(text, EagerStoreWarning, stacklevel=_level_of_caller())

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
        if "own_store" in vars(self):
            self.own_store.close()

    def end(self) -> None:
        """Close all that was opened for the app in this process, because the app is closed. It is opened again if it is used again."""
        if self._given_store is None:
            self.close()
        for part in list(self._parts.values()):
            if isinstance(part, _Resting):
                part.rest()

    def __repr__(self) -> str:
        return f"<QueueLog of {self.app.main or 'app'}>"


class _OfApp:
    """The attribute ``queue_log`` of an app that has none yet: the first reading makes it. The app's own attribute goes before it."""

    def __get__(self, app: Celery | None, owner: type[Celery]) -> QueueLog | _OfApp:
        return self if app is None else QueueLog.of(app)


def of_each_app() -> None:
    """Give each app the attribute ``queue_log``, also before its tasks are bound, as in a shell. An attribute of that name that is there stays."""
    from celery import Celery

    if not hasattr(Celery, _ATTRIBUTE):
        setattr(Celery, _ATTRIBUTE, _OfApp())


def _level_of_caller() -> int:
    """Return the ``stacklevel`` of the first frame above the caller that is neither Celery's nor ours."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals["__name__"].partition(".")[0] in ("celery", "celery_idempotent"):
        frame, level = frame.f_back, level + 1
    return level


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
