"""Outcomes: what becomes of each message, told to whoever counts, traces or logs it.

An app names its hooks in ``idempotent_hooks``. Each is given a frozen record per outcome, right after what it tells of, in the process
and the thread where that happened. Without hooks nothing is made up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, Unpack, cast, runtime_checkable

from celery.exceptions import SoftTimeLimitExceeded

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.header import TRACE_HEADER, is_trace
from celery_idempotent.message.serialization import trace_of

if TYPE_CHECKING:
    from celery_idempotent.core.records import MessageKey, Row

__all__ = ["Hook", "Outcome", "OutcomeKind", "Outcomes", "TracingHook", "reason_of"]

logger = logging.getLogger("celery_idempotent")

SETTING = "idempotent_hooks"


class OutcomeKind(StrEnum):
    """What became of a message, a call or a delivery; the tables of the page "Monitor" say when each is told."""

    RECORDED = "recorded"  # producer: it has a row and was published
    DUPLICATE = "duplicate"  # producer: its id was taken
    WITHDRAWN = "withdrawn"  # producer: it could not be published, and its id is free again
    MISMATCHED = "mismatched"  # either side: its id is known with other arguments
    CLAIMED = "claimed"  # consumer: its body is about to run
    TAKEN_OVER = "taken_over"  # consumer: the same, after an owner whose lease ran out
    HELD = "held"  # consumer: a copy was published to come again later
    SKIPPED = "skipped"  # consumer: there was nothing to do
    REPLAYED = "replayed"  # consumer: it was answered with what the message ended with before
    COMPLETED = "completed"  # it ended as a success
    FAILED = "failed"  # it ended as a failure
    RETRIED = "retried"  # it waits for its next attempt
    ABANDONED = "abandoned"  # it ended as a failure, since its worker died or lost its lease
    CANCELLED = "cancelled"  # it ended as a failure, since it was revoked, or had expired
    LEASE_LOST = "lease_lost"  # its run is over, and somebody else had its claim by then
    UNGUARDED = "unguarded"  # either side: the store gave no answer, and the app says "run"
    RECOVERED = "recovered"  # it was published from its row
    PURGED = "purged"  # old rows were deleted


#: Told when the body is over, or will not run: a time limit that strikes in a hook then comes too late for it.
_ENDS = frozenset(
    (
        OutcomeKind.COMPLETED,
        OutcomeKind.FAILED,
        OutcomeKind.ABANDONED,
        OutcomeKind.CANCELLED,
        OutcomeKind.LEASE_LOST,
        OutcomeKind.HELD,
        OutcomeKind.SKIPPED,
        OutcomeKind.REPLAYED,
        OutcomeKind.MISMATCHED,
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One outcome. What is not known where it happened, or does not apply, is ``None``; durations are seconds.

    It never holds arguments or results. A message id may be made of arguments, if the task says so.

    Attributes:
        kind: What happened.
        task_name: The task; ``None`` for ``purged``, which is of rows of any.
        message_id: The message.
        task_id: The Celery id of the call or the delivery.
        first_task_id: The Celery id that was first sent under the message id, where a row stood in the way or was taken over.
        queue: Where the message was routed.
        attempt: Celery's ``retries``; of ``retried``, the next one.
        token: The fencing token of the claim.
        worker: ``host:pid`` of the worker where it happened, and the thread if it has several.
        status: Of the row that stood in the way: ``pending``, ``processing`` or ``done``.
        reason: Why, in one word that is the same each time: the type of the error for ``failed``, else see the tables.
        count: How many; more than 1 for ``purged`` only.
        store: How long the store took for what is told: its statement, the waiting for it, and the encoding of a result.
        ran: How long the body took.
        age: How old the message was, by the store's clock: since it was recorded, where its row was read.
        delay: In what time a copy that is held comes again.
        trace: W3C ``traceparent`` of the span in which the original was sent, where its row was read and that is known.
    """

    kind: OutcomeKind
    task_name: str | None = None
    message_id: str | None = None
    task_id: str | None = None
    first_task_id: str | None = None
    queue: str | None = None
    attempt: int | None = None
    token: int | None = None
    worker: str | None = None
    status: str | None = None
    reason: str | None = None
    count: int = 1
    store: float | None = None
    ran: float | None = None
    age: float | None = None
    delay: float | None = None
    trace: str | None = None


class Hook(Protocol):
    """What ``idempotent_hooks`` takes: a callable of one outcome.

    It runs in the path of the message, so it should be quick and wait for nothing. What it raises is logged once, and disturbs
    nothing. It must not call guarded tasks, whose outcomes it would be told.
    """

    def __call__(self, outcome: Outcome, /) -> object:
        """Take an outcome."""
        ...


@runtime_checkable
class TracingHook(Protocol):
    """A hook that also says in which span a message is sent; kept with it, so that a duplicate can be linked to that."""

    def __call__(self, outcome: Outcome, /) -> object:
        """Take an outcome."""
        ...

    def traceparent(self) -> str | None:
        """Return the W3C ``traceparent`` of the span that is current here, or ``None``."""
        ...


class Facts(TypedDict, total=False):
    """What of an outcome is known where it happens; see :class:`Outcome`."""

    task_id: str | None
    queue: str | None
    attempt: int | None
    token: int | None
    worker: str | None
    count: int
    store: float | None
    ran: float | None
    delay: float | None


class Outcomes:
    """Tells the hooks of an app.

    Args:
        hooks: The hooks.
    """

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = tuple(hooks)
        self._tracing = next((hook for hook in hooks if isinstance(hook, TracingHook)), None)
        self._complained: set[int] = set()

    @classmethod
    def of(cls, entries: Sequence[str | Hook]) -> Outcomes:
        """Return what tells the hooks of the setting ``idempotent_hooks``, which may be none.

        Raises:
            ConfigurationError: One is not there, is no hook, or lacks a library.
        """
        return cls([_load(entry) if isinstance(entry, str) else entry for entry in entries])

    def emit(
        self,
        kind: OutcomeKind,
        key: MessageKey | None = None,
        *,
        row: Row | None = None,
        reason: str | None = None,
        **facts: Unpack[Facts],
    ) -> None:
        """Tell each hook of an outcome; see :class:`Outcome`. Without hooks it costs next to nothing.

        Args:
            kind: What happened.
            key: The message.
            row: Its row as it was read, if it was.
            reason: The reason, as text or as a member of an enumeration.
            facts: The rest of the outcome.

        Raises:
            SoftTimeLimitExceeded: It struck in a hook while the body was running, or about to. Nothing else.
        """
        if not self._hooks:
            return
        outcome = Outcome(
            kind=kind,
            task_name=None if key is None else key.task_name,
            message_id=None if key is None else key.message_id,
            first_task_id=None if row is None else row.task_id,
            status=None if row is None else row.status.value,
            reason=None if reason is None else str(reason),
            age=None if row is None else (row.read_at - row.created_timestamp).total_seconds(),
            trace=None if row is None else trace_of(row.message) or trace_of(row.result),
            **facts,
        )
        for hook in self._hooks:
            try:
                hook(outcome)
            except SoftTimeLimitExceeded:
                if kind not in _ENDS:
                    raise
            except Exception:
                if id(hook) not in self._complained:
                    self._complained.add(id(hook))
                    logger.exception("the hook %r could not take %r; that is logged once", hook, outcome)

    def traceparent(self) -> str | None:
        """Return the span that is current here, if there is a hook that traces."""
        if self._tracing is None:
            return None
        try:
            trace = self._tracing.traceparent()
            if trace is not None and not is_trace(trace):
                raise ValueError(f"{trace!r} is no W3C traceparent")  # noqa: TRY301 - of the hook's, as if it had raised it
        except SoftTimeLimitExceeded:
            raise
        except Exception:
            if id(self._tracing) not in self._complained:
                self._complained.add(id(self._tracing))
                logger.exception("the hook %r could not say which span is current; that is logged once", self._tracing)
            return None
        return trace

    def trace_among(self, headers: Mapping[str, Any] | None) -> str | None:
        """Return the span in which a message was sent whose sender has no hook that traces, but says it by W3C trace context."""
        if self._tracing is None or not isinstance(headers, Mapping):
            return None
        found = headers.get(TRACE_HEADER)
        return found if is_trace(found) else None


def reason_of(error: str) -> str:
    """Return the word before the text of an error, as it is in the column ``error``: a type, or why a message was ended."""
    return error.partition(":")[0].partition(",")[0]


def _load(path: str) -> Hook:
    """Return the hook at a dotted path, ``package.module.name`` or ``package.module:name``."""
    module_name, _, name = path.replace(":", ".").rpartition(".")
    if not module_name or not name:
        raise ConfigurationError(f"setting {SETTING}: {path!r} is no path of a hook such as 'package.module.hook'")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigurationError(f"setting {SETTING}: {path!r} cannot be imported: {error}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"setting {SETTING}: {path!r}: {error}") from error
    hook = getattr(module, name, None)
    if not callable(hook) or isinstance(hook, type):
        what = "has no such name" if hook is None else f"has {hook!r} there, which is not a callable of one outcome"
        raise ConfigurationError(f"setting {SETTING}: {path!r}: the module {what}")
    return cast("Callable[[Outcome], object]", hook)
