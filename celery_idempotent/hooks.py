"""Report the outcome of each message to an app's hooks, which count, trace or log it.

An app names its hooks in ``idempotent_hooks``. Each hook is called with a frozen record right after the event, in the same process and
thread. Without hooks, no record is made.
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

__all__ = ["Hook", "Hooks", "Outcome", "OutcomeKind", "TracingHook", "reason_of"]

logger = logging.getLogger("celery_idempotent")

SETTING = "idempotent_hooks"


class OutcomeKind(StrEnum):
    """The kinds of outcomes of a message, a call or a delivery. The tables of the page "Monitor" say when each is reported."""

    RECORDED = "recorded"  # producer: it has a row and was published
    DUPLICATE = "duplicate"  # producer: its id was taken
    WITHDRAWN = "withdrawn"  # producer: it could not be published, and its id is free again
    MISMATCHED = "mismatched"  # either side: its id is known with other arguments
    CLAIMED = "claimed"  # consumer: its body is about to run
    TAKEN_OVER = "taken_over"  # consumer: its body is about to run, after the previous owner's lease ran out
    HELD = "held"  # consumer: a copy was published to come again later
    SKIPPED = "skipped"  # consumer: there was nothing to do
    REPLAYED = "replayed"  # consumer: it got the stored outcome of the message
    COMPLETED = "completed"  # it succeeded
    FAILED = "failed"  # it failed
    RETRIED = "retried"  # it waits for its next attempt
    ABANDONED = "abandoned"  # it failed, because its worker died or lost its lease
    CANCELLED = "cancelled"  # it failed, because it was revoked or had expired
    LEASE_LOST = "lease_lost"  # its run is over, but its claim had been lost by then
    UNGUARDED = "unguarded"  # either side: the store did not answer, and idempotent_on_store_error is "run"
    RECOVERED = "recovered"  # it was published from its row
    PURGED = "purged"  # old rows were deleted


#: Outcomes reported when the body is over or will not run. A time limit that strikes in a hook then comes too late for the body.
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
    """One outcome. Durations are seconds. A field that is unknown, or does not apply, is ``None``.

    It never contains arguments or results. But the task's option may make the message id from arguments.

    Attributes:
        kind: What happened.
        task_name: The task; ``None`` for ``purged``, which covers rows of all tasks.
        message_id: The message.
        task_id: The Celery id of the call or the delivery.
        first_task_id: The Celery id first sent under the message id, if an existing row was found or taken over.
        queue: The queue that the message was routed to.
        attempt: Celery's ``retries``; for ``retried``, the next attempt's.
        token: The fencing token of the claim.
        worker: ``host:pid`` of the worker, and the thread if it has several.
        status: The status of an existing row: ``pending``, ``processing`` or ``done``.
        reason: The reason, in one fixed word: the type of the error for ``failed``; otherwise see the tables.
        count: How many; more than 1 only for ``purged``.
        store: How long the store took: its statement, waiting for it, and the encoding of a result.
        ran: How long the body took.
        age: The time since the message was recorded, by the store's clock, if its row was read.
        delay: The time until a held copy comes again.
        trace: W3C ``traceparent`` of the span in which the original was sent, if its row was read and has one.
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
    """An entry of ``idempotent_hooks``: a callable that takes one outcome.

    It runs in the path of the message, so it should be quick and never wait. If it raises, the error is logged once, and has no other
    effect. It must not call guarded tasks, since it would be called for their outcomes too.
    """

    def __call__(self, outcome: Outcome, /) -> object:
        """Take an outcome."""
        ...


@runtime_checkable
class TracingHook(Protocol):
    """A hook that also returns the span in which a message is sent. The span is kept with the message, to link duplicates to it."""

    def __call__(self, outcome: Outcome, /) -> object:
        """Take an outcome."""
        ...

    def traceparent(self) -> str | None:
        """Return the W3C ``traceparent`` of the current span, or ``None``."""
        ...


class Facts(TypedDict, total=False):
    """The fields of an outcome that its caller knows; see :class:`Outcome`."""

    task_id: str | None
    queue: str | None
    attempt: int | None
    token: int | None
    worker: str | None
    count: int
    store: float | None
    ran: float | None
    delay: float | None


class Hooks:
    """Report outcomes to the hooks of an app.

    Args:
        hooks: The hooks.
    """

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = tuple(hooks)
        self._tracing = next((hook for hook in hooks if isinstance(hook, TracingHook)), None)
        self._complained: set[int] = set()

    @classmethod
    def of(cls, entries: Sequence[str | Hook]) -> Hooks:
        """Make one from the setting ``idempotent_hooks``, which may be empty.

        Raises:
            ConfigurationError: A hook does not exist, is not a hook, or needs a library that is not installed.
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
        """Call each hook with an outcome; see :class:`Outcome`. Without hooks, it costs almost nothing.

        Args:
            kind: What happened.
            key: The message.
            row: Its row, if it was read.
            reason: The reason, as text or as a member of an enumeration.
            facts: The other fields of the outcome.

        Raises:
            SoftTimeLimitExceeded: It struck in a hook while the body was running, or about to run. Nothing else is raised.
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
                    logger.exception(
                        "the hook %r raised an error for %r; further errors of this hook are not logged", hook, outcome
                    )

    def traceparent(self) -> str | None:
        """Return the current span, if one of the hooks traces."""
        if self._tracing is None:
            return None
        try:
            trace = self._tracing.traceparent()
            if trace is not None and not is_trace(trace):
                raise ValueError(f"{trace!r} is not a W3C traceparent")  # noqa: TRY301 - treated as an error of the hook
        except SoftTimeLimitExceeded:
            raise
        except Exception:
            if id(self._tracing) not in self._complained:
                self._complained.add(id(self._tracing))
                logger.exception(
                    "the hook %r did not return the current span; further errors of this hook are not logged",
                    self._tracing,
                )
            return None
        return trace

    def trace_among(self, headers: Mapping[str, Any] | None) -> str | None:
        """Return the span in W3C trace context among a message's headers, for a sender without a tracing hook."""
        if self._tracing is None or not isinstance(headers, Mapping):
            return None
        found = headers.get(TRACE_HEADER)
        return found if is_trace(found) else None


def reason_of(error: str) -> str:
    """Return the first word of the column ``error``: the type of an error, or why a message was ended."""
    return error.partition(":")[0].partition(",")[0]


def _load(path: str) -> Hook:
    """Return the hook at a dotted path, ``package.module.name`` or ``package.module:name``."""
    module_name, _, name = path.replace(":", ".").rpartition(".")
    if not module_name or not name:
        raise ConfigurationError(
            f"setting {SETTING}: {path!r} is not the path of a hook, such as 'package.module.hook'"
        )
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigurationError(f"setting {SETTING}: {path!r} cannot be imported: {error}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"setting {SETTING}: {path!r}: {error}") from error
    hook = getattr(module, name, None)
    if not callable(hook) or isinstance(hook, type):
        what = (
            "has no such name"
            if hook is None
            else f"has {hook!r} there, which is not a callable that takes one outcome"
        )
        raise ConfigurationError(f"setting {SETTING}: {path!r}: the module {what}")
    return cast("Callable[[Outcome], object]", hook)
