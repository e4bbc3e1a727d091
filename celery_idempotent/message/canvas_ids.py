"""Deterministic ids for the callbacks of a message and for the calls that its body makes.

If a worker dies, another one repeats its body or its dispatch of callbacks. Repeated calls get the same ids as before, so that they are
recognized as duplicates: see ADR 6.
"""

from __future__ import annotations

import hashlib
import heapq
import re
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery.canvas import Signature
from celery.utils.functional import arity_greater, maybe_list

from celery_idempotent.core.records import MessageKey, Status
from celery_idempotent.core.storable import is_text
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.call_signature import CallSignature, arguments_fingerprint
from celery_idempotent.message.canonical import FORM, canonical
from celery_idempotent.message.header import Header

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context

    from celery_idempotent.core.store import Store

__all__ = ["Calls", "Position", "derived", "fix_callbacks", "is_derived", "is_guarded", "unsent_errbacks"]

#: Prefix of a call's message id if a canvas or ``send_task`` has chosen its Celery id.
_PREFIX = "call:"

_DERIVED = re.compile(_PREFIX + "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def is_derived(message_id: str) -> bool:
    """Return whether a message id was made here, from a call's position and its arguments, which need no comparison then."""
    return _DERIVED.fullmatch(message_id) is not None


def is_guarded(task: object) -> bool:
    """Return whether a task, found by its name, is an ``IdempotentTask``."""
    # By `__class__`, which a proxy takes from its task. `IdempotentTask` cannot be imported here, since it imports this module.
    return hasattr(task.__class__, "idempotency")


def fix_callbacks(request: Context) -> None:
    """Give a request's callbacks and errbacks fixed Celery ids, since Celery makes new ones at each dispatch.

    The ids are derived from the request's own id, or from the name of its call: another copy of the message has another caller, and so
    other callbacks. Repeating this changes nothing.
    """
    header = Header.read(request.headers)
    base = request.id if header is None or header.call is None else header.call
    for kind, name in (("link", "callbacks"), ("errback", "errbacks")):
        callbacks = getattr(request, name, None)
        if callbacks:
            setattr(request, name, _fixed(callbacks, base, kind))


def unsent_errbacks(app: Celery, request: Context, store: Store) -> bool:
    """Return whether an errback of a failed message may not have been sent: it is guarded, and no worker has claimed it.

    Celery stores a failure before it sends the errbacks, so the result does not show whether they were sent.
    """
    for errback in maybe_list(request.errbacks) or ():
        if not isinstance(errback, Mapping) or errback.get("subtask_type"):
            continue
        task = app._tasks.get(errback.get("task"))  # noqa: SLF001
        options = errback.get("options") or {}
        if not is_guarded(task) or _is_called(task, errback):
            continue
        if task.idempotency.message_id is not None and not options.get("message_id"):
            continue  # its id depends on arguments that it does not have yet
        message_id = options.get("message_id") or options.get("task_id")
        if not message_id or not is_text(message_id):
            continue  # it has no id, or one that no store can keep: sending it will fail
        row = store.find(MessageKey(message_id, task.name))
        if row is None or (row.status is Status.PENDING and row.worker is None):
            return True  # recorded but perhaps not sent, or still waiting: its claim absorbs a second copy
    return False


def _is_called(task: Any, errback: Mapping[str, Any]) -> bool:
    """Return whether Celery calls an errback in the failed task's process instead of sending it: it takes more than the task's id."""
    header = getattr(task, "__header__", None)
    if header is None or isinstance(header, partial):
        return False
    if not errback.get("immutable") and (errback.get("args") or errback.get("kwargs")):
        header = partial(header, *errback.get("args", ()), **errback.get("kwargs", {}))
    try:
        return bool(arity_greater(header, 1))
    except (TypeError, ValueError):
        return True


@dataclass(frozen=True, slots=True)
class Position:
    """The position of one call among those that a body makes.

    Attributes:
        task_id: The Celery id for the call, unless its caller has chosen one.
        of: The task, and the fingerprint of the arguments.
        number: How many calls of the same task with the same arguments came before.
    """

    task_id: str
    of: tuple[str, str | None]
    number: int

    @property
    def message_id(self) -> str:
        """The message id for the call, if its caller has chosen the Celery id."""
        return _PREFIX + self.task_id


@dataclass
class Calls:
    """The calls that one attempt of a message makes. Thread-safe.

    Attributes:
        key: The message whose body makes the calls.
        first: The Celery id first sent under it; it differs each time that the message id is free and used again.
        attempt: The attempt. A rerun has the same number, a retry the next one.
    """

    key: MessageKey
    first: str
    attempt: int
    _count: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    _given_back: dict[tuple[str, str | None], list[int]] = field(default_factory=dict)
    _bodies: dict[str | None, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, task_name: str, signature: CallSignature | None, args: Any, kwargs: Any) -> Position:
        """Return the position of the call that is being made.

        Calls are counted per task and arguments, so a rerun may make them in another order, and make others in between. Calls
        whose arguments have no canonical form are told apart by their order alone.
        """
        try:
            fingerprint = arguments_fingerprint(signature, tuple(args or ()), dict(kwargs or {}))
        except (ConfigurationError, TypeError):  # Celery refuses arguments that do not fit
            fingerprint = None
        return self._take("call", task_name, fingerprint)

    def take_back(self, position: Position) -> None:
        """Take back a call that was not made after all; the next one like it gets its position."""
        with self._lock:
            heapq.heappush(self._given_back.setdefault(position.of, []), position.number)

    def mark(self, options: Mapping[str, Any], position: Position, app: Celery, request_id: str) -> dict[str, Any]:
        """Return the options of a call in a canvas, with message ids for all that the canvas sends after it.

        A canvas makes new Celery ids in each run, so these cannot identify a repeated call.

        Args:
            options: The options of ``apply_async``.
            position: The position of the call.
            app: The app, which knows the tasks.
            request_id: The Celery id of the body's own message. A signature that replaces the task keeps this id.
        """
        marking = _Marking(app, request_id)
        marked = marking.links(options, position.task_id)
        if options.get("chain"):
            marked["chain"] = [
                marking.of(step, derived(position.task_id, "chain", number))
                for number, step in enumerate(options["chain"])
            ]
        if options.get("chord"):
            # Each member of a chord's header carries the chord's body.
            marked["chord"] = marking.of(options["chord"], self._body(options["chord"]))
        return marked

    def part(self, task_name: str, args: Any, kwargs: Any) -> str:
        """Return the Celery id for a task that the body adds to its chord."""
        try:
            fingerprint = arguments_fingerprint(None, tuple(args or ()), dict(kwargs or {}))
        except ConfigurationError:
            fingerprint = None
        return self._take("part", task_name, fingerprint).task_id

    def _body(self, body: Mapping[str, Any]) -> str:
        frozen = _frozen_id(body)
        known = self._bodies.get(frozen)
        if known is None:
            try:
                fingerprint = arguments_fingerprint(None, tuple(body.get("args") or ()), {})
            except ConfigurationError:
                fingerprint = None
            known = self._bodies.setdefault(frozen, self._take("chord", str(body.get("task")), fingerprint).task_id)
        return known

    def _take(self, kind: str, task_name: str, fingerprint: str | None) -> Position:
        of = (task_name if kind == "call" else f"{kind} {task_name}", fingerprint)
        with self._lock:
            free = self._given_back.get(of)
            if free:
                number = heapq.heappop(free)
            else:
                number = self._count[of]
                self._count[of] += 1
        made = derived(
            self.key.message_id, self.key.task_name, self.first, self.attempt, kind, task_name, fingerprint, number
        )
        return Position(made, of, number)


def derived(*parts: str | int | None) -> str:
    """Return an id derived from these parts, in the form of a Celery id."""
    digest = hashlib.sha256(FORM + canonical(list(parts))).digest()
    return str(UUID(bytes=digest[:16], version=5))


# -- signatures --------------------------------------------------------------------------------------------------------

#: The keyword arguments of a canvas that hold its parts.
_PARTS = {"group": ("tasks",), "chain": ("tasks",), "chord": ("header", "body")}


def _fixed(callbacks: Any, *place: str) -> list[Any]:
    """Return callbacks with Celery ids derived from their place; an id that is already there stays."""
    return [
        _with_task_ids(callback, derived(*place, number)) if isinstance(callback, Mapping) else callback
        for number, callback in enumerate(maybe_list(callbacks))
    ]


def _with_task_ids(signature: Mapping[str, Any], task_id: str) -> Any:
    kind = signature.get("subtask_type")
    made = _copy(signature)
    if kind in _PARTS:
        _replace_parts(made, lambda part, *path: _with_task_ids(part, derived(task_id, *path)))
    if kind != "chain":  # a chain has no id of its own; the id of a group or a chord is the group's
        made["options"].setdefault("task_id", task_id)
    return made


@dataclass(frozen=True)
class _Marking:
    """Gives message ids to signatures whose Celery ids are fixed already."""

    app: Celery
    request_id: str

    def of(self, signature: Mapping[str, Any], base: str) -> Any:
        made = _copy(signature)
        if signature.get("subtask_type") in _PARTS:
            _replace_parts(made, lambda part, *path: self.of(part, derived(base, *path)))
        else:
            options = made["options"]
            if not options.get("message_id") and options.get("task_id") != self.request_id and self._may(made["task"]):
                options["message_id"] = _PREFIX + base
        made["options"].update(self.links(made["options"], base))
        return made

    def links(self, options: Mapping[str, Any], base: str) -> dict[str, Any]:
        """Return the options with their callbacks' ids fixed."""
        kinds = [kind for kind in ("link", "link_error") if options.get(kind)]
        return {**options, **{kind: _fixed(options[kind], base, kind) for kind in kinds}}

    def _may(self, task_name: str) -> bool:
        # Not `app.tasks`, which would finalize the app. A task unknown here may be guarded in its worker.
        task = self.app._tasks.get(task_name)  # noqa: SLF001
        return task is None or (is_guarded(task) and task.idempotency.message_id is None)


def _frozen_id(signature: Any) -> str | None:
    """Return the Celery id of a frozen signature; for a chain, which has none, that of one of its tasks."""
    task_id: str | None = (signature.get("options") or {}).get("task_id")
    if task_id is None:
        for name in _PARTS.get(signature.get("subtask_type"), ()):
            part = signature["kwargs"].get(name)
            for one in [part] if isinstance(part, Mapping) else part or ():
                task_id = task_id or _frozen_id(one)
    return task_id


def _copy(signature: Mapping[str, Any]) -> Any:
    """Return a copy whose options and parts can be changed; arguments are shared."""
    if isinstance(signature, Signature):
        return signature.clone()
    return {
        **signature,
        "options": dict(signature.get("options") or {}),
        "kwargs": dict(signature.get("kwargs") or {}),
    }


def _replace_parts(signature: Any, new: Any) -> None:
    kwargs = signature["kwargs"]
    for name in _PARTS[signature["subtask_type"]]:
        part = kwargs.get(name)
        if isinstance(part, Mapping):
            kwargs[name] = new(part, name)
        elif isinstance(part, (list, tuple)):
            kwargs[name] = [
                new(one, name, number) if isinstance(one, Mapping) else one for number, one in enumerate(part)
            ]
