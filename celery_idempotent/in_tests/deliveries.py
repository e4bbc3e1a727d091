"""The messages of the test that runs: noted when they are published or run, so that each can be delivered again."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery import signals, states
from celery.app.trace import build_tracer
from celery.exceptions import Retry
from celery.result import EagerResult
from celery.utils.nodenames import gethostname

from celery_idempotent.core.records import Row, Status
from celery_idempotent.message.canvas_ids import is_guarded
from celery_idempotent.message.header import Header
from celery_idempotent.producer.answers import eager_result
from celery_idempotent.producer.marked import marked
from celery_idempotent.worker.run import Run

if TYPE_CHECKING:
    from celery import Celery

    from celery_idempotent.task import IdempotentTask

__all__ = ["Deliveries", "Delivery", "deliver"]

#: Seconds between two looks at the row of a message that another process runs.
_LOOK_EVERY = 0.02

#: The fields of a request that are a delivery's own. The rest is the message's.
_OF_ONE_DELIVERY = {"called_directly", "args", "kwargs", "hostname", "delivery_info"}


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message as an eager call has delivered it.

    Attributes:
        task: Its task.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        header: Its header.
        request: The other fields of Celery's request.
    """

    task: IdempotentTask
    args: Any
    kwargs: Any
    header: Header
    request: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Publication:
    """A message as it was published: what the signal ``before_task_publish`` says."""

    task: str
    body: Any
    exchange: Any
    routing_key: Any
    declare: Any
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]

    def repeat(self, app: Celery) -> None:
        # `delivery_info` says "redelivered" on kombu's own transports. On AMQP only the broker can say it.
        properties = {**self.properties, "delivery_info": {"redelivered": True}}
        with app.producer_or_acquire() as producer:
            producer.publish(
                self.body,
                exchange=self.exchange,
                routing_key=self.routing_key,
                declare=self.declare,
                serializer=app.tasks[self.task].serializer,
                headers=dict(self.headers),
                **properties,
            )


class Deliveries:
    """Notes messages by Celery's signals, under their Celery ids."""

    def __init__(self) -> None:
        self._eager: dict[str, Delivery] = {}
        self._published: dict[str, _Publication] = {}
        self._ended = threading.Condition()
        #: Of each Celery id, whether each of its deliveries has run the body.
        self._ran: dict[str, list[bool]] = {}

    def install(self) -> None:
        """Note what is published and run from now on."""
        signals.before_task_publish.connect(self._note_publication, weak=False)
        signals.task_prerun.connect(self._note_delivery, weak=False)
        signals.task_postrun.connect(self._note_end, weak=False)

    def uninstall(self) -> None:
        """Note nothing any more."""
        signals.before_task_publish.disconnect(self._note_publication)
        signals.task_prerun.disconnect(self._note_delivery)
        signals.task_postrun.disconnect(self._note_end)

    def clear(self) -> None:
        """Forget all messages."""
        for noted in (self._eager, self._published, self._ran):
            noted.clear()

    def repeat(self, app: Celery | None, task_id: str, timeout: float) -> Any:
        """Deliver a message once more; see :meth:`LogInTest.deliver_again`."""
        if task_id in self._eager:
            return self.again(self._eager[task_id])
        published = self._published.get(task_id)
        if published is None or app is None:
            raise LookupError(f"no guarded message was sent in this test under the Celery id {task_id}")
        task: IdempotentTask = app.tasks[published.task]
        header = Header.read(published.headers)
        assert header is not None, "others are not noted"
        store, key = task.queue_log.store, header.key
        before, count = store.find(key), len(self._ran.get(task_id, ()))
        published.repeat(app)
        ran = self._wait(task_id, count, lambda: _has_run(before, store.find(key)), timeout)
        return marked(task.AsyncResult(task_id), header.message_id, duplicate=not ran)

    def again(self, delivery: Delivery) -> EagerResult[Any]:
        """Deliver a message in this process, and note in its result whether the body ran."""
        task_id = delivery.header.task_id
        count = len(self._ran.get(task_id, ()))
        result = deliver(delivery, redelivered=True)
        ran = any(self._ran.get(task_id, [])[count:])
        return marked(result, delivery.header.message_id, duplicate=not ran)

    def _wait(self, task_id: str, count: int, look: Any, timeout: float) -> bool:
        """Wait until a delivery has ended, here or in another process; return whether the body ran."""
        deadline = time.monotonic() + timeout
        while True:
            with self._ended:
                if len(ended := self._ran.get(task_id, [])) > count:
                    return ended[count]
                self._ended.wait(_LOOK_EVERY)
            ran: bool | None = look()
            if ran is not None and len(self._ran.get(task_id, [])) == count:
                return ran
            if time.monotonic() > deadline:
                raise TimeoutError(f"no worker has taken the message {task_id} within {timeout:g} s")

    # -- signals -------------------------------------------------------------------------------------------------------

    def _note_publication(self, sender: str, headers: Any = None, **message: Any) -> None:
        if isinstance(headers, Mapping) and Header.read(headers) is not None:
            self._published[headers["id"]] = _Publication(
                sender,
                message.get("body"),
                message.get("exchange"),
                message.get("routing_key"),
                message.get("declare"),
                dict(headers),
                dict(message.get("properties") or {}),
            )

    def _note_delivery(self, task_id: str, task: Any, args: Any, kwargs: Any, **_: Any) -> None:
        request = task.request_stack.top
        if request is None or not request.is_eager or not is_guarded(task):
            return
        header = Header.read(request.headers)
        if header is not None and header.task_id == task_id:
            own = {name: value for name, value in vars(request).items() if not name.startswith("_")}
            fields = {name: value for name, value in own.items() if name not in _OF_ONE_DELIVERY}
            self._eager[task_id] = Delivery(task, args, kwargs, header, fields)

    def _note_end(self, task_id: str, task: Any, **_: Any) -> None:
        if is_guarded(task):
            run = Run.of(task.request_stack.top)
            with self._ended:
                self._ran.setdefault(task_id, []).append(run is not None and run.ran is not None)
                self._ended.notify_all()


def _has_run(before: Row | None, row: Row | None) -> bool | None:
    """Return whether a worker has run a message since its row was read; ``None`` if it has not come to an end."""
    if row is None or before is None:
        return None
    if row.duplicates > before.duplicates:
        return False
    return True if row.token > before.token and row.status is Status.DONE else None


def deliver(delivery: Delivery, *, redelivered: bool) -> EagerResult[Any]:
    """Deliver a message in this process, as ``Task.apply`` does.

    Args:
        delivery: The message.
        redelivered: Whether it was handed out before.

    Returns:
        Its result; for a copy that was skipped, the outcome of the message.
    """
    task, task_id = delivery.task, delivery.header.task_id
    request = {
        **delivery.request,
        "id": task_id,
        "task": task.name,
        "is_eager": True,
        "hostname": gethostname(),
        "headers": delivery.header.write(delivery.request.get("headers")),
        "delivery_info": {"is_eager": True, "exchange": None, "routing_key": None, "redelivered": redelivered},
    }
    traced = build_tracer(task.name, task, eager=True, propagate=False, app=task.app)(
        task_id, delivery.args, delivery.kwargs, request
    )
    value, lines = traced.retval, None
    if isinstance(value, ExceptionInfo):
        value, lines = value.exception, value.traceback
        value = value.exc if isinstance(value, ExceptionWithTraceback) else value
    if isinstance(value, Retry) and value.sig is not None:
        next_attempt: EagerResult[Any] = value.sig.apply(retries=(request["retries"] or 0) + 1, throw=False)
        return next_attempt
    state = states.SUCCESS if traced.info is None else traced.info.state
    if state == states.IGNORED:
        row = task.queue_log.store.find(delivery.header.key)
        if row is not None:
            return eager_result(task, row)
    return EagerResult(task_id, value, state, traceback=lines, name=task.name)
