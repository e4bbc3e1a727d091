"""The ``idempotent_*`` settings of an app: read, checked, and refused by name when they are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from celery_idempotent.errors import ConfigurationError

if TYPE_CHECKING:
    from celery import Celery
    from sqlalchemy import URL

__all__ = ["OPTION_NAMES", "PREFIX", "Settings", "one_of", "seconds", "yes_or_no"]

PREFIX = "idempotent_"

#: The task options; each is a setting too, under :data:`PREFIX`.
OPTION_NAMES = (
    "message_id",
    "on_duplicate",
    "on_processing",
    "on_abandoned",
    "resubmit_failed",
    "lease",
    "unique_for",
    "fingerprint",
    "atomic",
    "keep_result",
)

#: Beginnings of setting names that are probably misspelt settings of ours.
_LIKE_OURS = ("idemp", "idemo", "idepo", "indemp")

_APP_NAMES = (
    "enabled",
    "store",
    "table",
    "retention",
    "failure_retention",
    "recovery_interval",
    "lost_after",
    "on_store_error",
    "hooks",
    "redact",
    "django_outbox",
)


@dataclass(frozen=True)
class Settings:
    """The settings of an app for its queue log.

    Attributes:
        store: URL of the store, as text or SQLAlchemy's ``URL``. Default: an SQLite file in the working directory.
        table: Name of the table, ``schema.name`` if the database has schemas.
        retention: Seconds for which a finished row is kept before it is purged.
        recovery_interval: Seconds between two recovery passes of a worker; 0 turns recovery off in this worker.
        lost_after: Seconds for which a message may stay pending before its publication is doubted.
        on_store_error: What to do while the store does not answer. ``retry``: wait, then have the message delivered
            again. ``run``: run unguarded, with an error in the log. ``raise``: raise StoreUnavailableError.
        hooks: Callables that take an :class:`~celery_idempotent.hooks.Outcome`, or their dotted paths. They are called for each outcome
            of a message. Default: none.
        redact: Names of parameters and keys, or patterns with ``*`` and ``?``, whose values are masked wherever arguments and results are
            shown. The rows keep them: a message has to be published again.
        failure_retention: The same as ``retention`` for a message that failed, which somebody may yet requeue. At least ``retention``.
        django_outbox: Whether calls inside of ``transaction.atomic()`` are part of it, where the store is ``django://``.
        enabled: Whether tasks are guarded. ``False`` turns the guard off for all of them; see the option ``idempotent``.
    """

    store: str | URL = field(default="sqlite:///queue_log.db", repr=False)
    table: str = "queue_log"
    retention: float = 7 * 86400.0
    recovery_interval: float = 30.0
    lost_after: float = 300.0
    on_store_error: Literal["retry", "run", "raise"] = "retry"
    hooks: tuple[str | Callable[..., object], ...] = ()
    redact: tuple[str, ...] = ()
    enabled: bool = True
    failure_retention: float = 30 * 86400.0
    django_outbox: bool = True

    @classmethod
    def from_app(cls, app: Celery) -> Settings:
        """Read and check an app's settings.

        Raises:
            ConfigurationError: A setting is unknown (its nearest valid name is given) or has a wrong value.
        """
        _refuse_unknown(app)
        known = {name: value for name in _APP_NAMES if (value := app.conf.get(PREFIX + name)) is not None}
        retention = seconds("idempotent_retention", known.get("retention", cls.retention), positive=True)
        failures = known.get("failure_retention", max(cls.failure_retention, retention))
        return cls(
            failure_retention=seconds("idempotent_failure_retention", failures, positive=True),
            enabled=yes_or_no("idempotent_enabled", known.get("enabled", cls.enabled)),
            store=_url("store", known.get("store", cls.store)),
            table=_text("table", known.get("table", cls.table)),
            retention=retention,
            recovery_interval=seconds(
                "idempotent_recovery_interval", known.get("recovery_interval", cls.recovery_interval), positive=False
            ),
            lost_after=seconds("idempotent_lost_after", known.get("lost_after", cls.lost_after), positive=True),
            on_store_error=one_of(
                "idempotent_on_store_error", known.get("on_store_error", cls.on_store_error), "retry", "run", "raise"
            ),
            hooks=_hooks(known.get("hooks", cls.hooks)),
            redact=_names("redact", known.get("redact", cls.redact)),
            django_outbox=yes_or_no("idempotent_django_outbox", known.get("django_outbox", cls.django_outbox)),
        )


def _refuse_unknown(app: Celery) -> None:
    """Refuse keys that look like settings of ours and are not.

    With ``config_from_object(..., namespace="CELERY")``, they are written ``CELERY_IDEMPOTENT_STORE``. Without a namespace, Celery reads
    only lower case.
    """
    keys = [str(key) for key in app.conf]  # loads the configuration, which then has its namespace
    namespace = getattr(app.conf, "prefix", None) or ""
    plain = [PREFIX + name for name in (*_APP_NAMES, *OPTION_NAMES)]

    def written(name: str) -> str:
        return (namespace + name).upper() if namespace.isupper() else namespace + name

    valid = {*plain, *map(written, plain)}
    for key in keys:
        name = key.lower().removeprefix(namespace.lower())
        if key not in valid and name.startswith(_LIKE_OURS):
            near = get_close_matches(name, plain, n=1, cutoff=0.0)[0]
            raise ConfigurationError(f"unknown setting {key!r}; did you mean {written(near)!r}?")


def _url(name: str, value: object) -> str | URL:
    # Do not import SQLAlchemy, which a queue log in Redis does not need.
    return value if _is_url(value) else _text(name, value)


def _is_url(value: object) -> TypeGuard[URL]:
    return callable(getattr(value, "render_as_string", None))


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        # Do not show the value: a URL in a list, or in bytes, contains a password too.
        shown = repr(value) if not value or isinstance(value, (int, float)) else f"one of type {type(value).__name__}"
        raise ConfigurationError(f"setting {PREFIX + name} must be a non-empty string, not {shown}")
    return value


def _hooks(value: object) -> tuple[str | Callable[..., object], ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigurationError(
            f"setting {PREFIX}hooks must be a list of callables or of their dotted paths, not {value!r}"
        )
    for entry in value:
        if isinstance(entry, type) or not (isinstance(entry, str) or callable(entry)):
            raise ConfigurationError(
                f"setting {PREFIX}hooks: {entry!r} is neither a callable of one outcome nor the dotted path of one"
            )
    return tuple(value)


def _names(name: str, value: object) -> tuple[str, ...]:
    # Refuse a string, which is a sequence of strings too: each of its letters would be taken as a name.
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(each, str) and each for each in value):
        return tuple(value)
    raise ConfigurationError(f"setting {PREFIX + name} must be a list of names, not {value!r}")


def seconds(name: str, value: object, *, positive: bool) -> float:
    """Return a duration given as a number of seconds or a ``timedelta``.

    Args:
        name: Option or setting, for the error.
        value: What the user gave.
        positive: Whether 0 is refused too.

    Raises:
        ConfigurationError: It is neither, or is infinite or negative.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and value - value == 0
    if not good or value < 0 or (positive and value == 0):  # type: ignore[operator]
        bound = "> 0" if positive else ">= 0"
        raise ConfigurationError(f"{name} must be a number of seconds or a timedelta, {bound}, not {value!r}")
    return float(value)  # type: ignore[arg-type]


def one_of(name: str, value: object, *choices: str) -> Any:
    """Return the value if it is one of the choices.

    Raises:
        ConfigurationError: It is not; the error names the nearest choice.
    """
    if value in choices:
        return value
    near = get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}{hint}")


def yes_or_no(name: str, value: object) -> bool:
    """Return a flag.

    Raises:
        ConfigurationError: It is not a ``bool``. Strings such as ``"false"`` are truthy, so they are refused.
    """
    if isinstance(value, bool):
        return value
    raise ConfigurationError(f"{name} must be True or False, not {value!r}")
