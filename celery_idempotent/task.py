"""The base class of guarded tasks, for ``base=IdempotentTask``."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar, cast, overload

from celery import Task
from celery.exceptions import Ignore
from celery.utils import uuid

from celery_idempotent.core.abandoned import Done
from celery_idempotent.core.records import NewMessage
from celery_idempotent.errors import ConfigurationError, IdempotentError
from celery_idempotent.message.header import Header
from celery_idempotent.message.identity import type_of_exchange
from celery_idempotent.message.serialization import content_of
from celery_idempotent.options import Options, refuse_misspelt, refuse_misspelt_call, refuse_unknown_arguments
from celery_idempotent.producer.answers import answer_of
from celery_idempotent.producer.awaited import AwaitedCalls
from celery_idempotent.producer.call_options import expiring_in_workers
from celery_idempotent.producer.identify import identify
from celery_idempotent.producer.marked import marked
from celery_idempotent.producer.send import send
from celery_idempotent.producer.unrecorded import is_unrecorded, warn_once
from celery_idempotent.queue_log import QueueLog
from celery_idempotent.settings import PREFIX
from celery_idempotent.worker.binding import REQUEST, guard
from celery_idempotent.worker.celery_versions import NESTING, dated, id_of_step, replacements
from celery_idempotent.worker.chords import add_part
from celery_idempotent.worker.handlers import guard_handlers
from celery_idempotent.worker.run import Passage, Run
from celery_idempotent.worker.signals import install
from celery_idempotent.worker.step_calls import StepCalls

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context
    from celery.canvas import Signature
    from celery.result import AsyncResult
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from celery_idempotent.result import IdempotentEagerResult, IdempotentResult
    from celery_idempotent.worker.unit_of_work import UnitOfWork

__all__ = ["IdempotentTask"]

T = TypeVar("T")


class _InTheBody(Generic[T]):
    """An attribute that a task has while its atomic body runs. It is per thread, since all threads share a task object.

    A task that is not atomic may define the name itself: on its class, on any of its bases, or on the object.
    """

    def __init__(self, read: Callable[[UnitOfWork], T], name: str, doc: str) -> None:
        self._read = read
        self._name = name
        self.__doc__ = doc

    @overload
    def __get__(self, task: None, owner: type) -> Self: ...
    @overload
    def __get__(self, task: IdempotentTask, owner: type) -> T: ...
    def __get__(self, task: IdempotentTask | None, owner: type) -> T | Self:
        if task is None:
            return self
        run = Run.of(task.request_stack.top)
        if run is not None and run.unit is not None:
            return self._read(run.unit)
        if not task.idempotency.atomic:
            bases = type(task).__mro__
            if any(self._name in vars(base) for base in bases[bases.index(IdempotentTask) + 1 :]):
                return cast("T", getattr(super(IdempotentTask, task), self._name))
            raise IdempotentError(
                f"task {task.name} has no {self._name}, because it is not atomic: give it the option atomic=True"
            )
        raise IdempotentError(
            f"task {task.name} has no {self._name} here: an atomic task has one only while a worker, or apply(), runs its body; "
            f"calls as a function, map, starmap and chunks are not guarded"
        )


class IdempotentTask(AwaitedCalls, StepCalls, Task):  # type: ignore[misc]
    """A Celery task that takes effect once per message.

    Use it as ``base=IdempotentTask``, or subclass it. The options below are class attributes or arguments of the decorator. Each
    is also a setting of the app, with the prefix ``idempotent_``; ``None`` leaves it to that setting. Unknown options are refused
    by name when the task is bound.

    A redelivered, repeated or copied message is skipped, replayed or held, by the decision tables. Calls of the task as a
    function, and ``map``, ``starmap`` and ``chunks``, run unguarded.

    Hazard:
        The body is not interrupted when its lease runs out, and another worker may then run it too. So its own writes take effect at
        most once only if they are fenced or idempotent.
    """

    abstract = True

    #: Whether the task is guarded. ``False`` turns the guard off, as the setting ``idempotent_enabled`` does for all tasks: calls are not
    #: recorded, and messages run as plain Celery's, each copy too. The row of a recorded message is ended after it has run. Default:
    #: ``True``. With ``idempotent_enabled = False``, no task is guarded, whatever this says.
    idempotent: ClassVar[bool | None] = None

    #: Where the message id comes from: ``None`` (the task id: safe against redelivery), a format string over the bound
    #: arguments (``"order:{order_id}"``; a call is refused in which a field is ``None``, or all are empty), or a callable of the call's arguments returning ``str``; ``by_arguments("order.id", exclude=("now",))`` is one. A
    #: method of the class, or a callable whose first parameter is called ``self``, gets the task before the arguments.
    message_id: ClassVar[str | Callable[..., str] | None] = None

    #: What the caller of a duplicate gets: the first message's AsyncResult (``"skip"``) or a DuplicateMessageError (``"raise"``).
    #: Default: ``"skip"``.
    on_duplicate: ClassVar[Literal["skip", "raise"] | None] = None

    #: What to do with a copy that arrives while another delivery runs: ``"hold"`` brings it back later, up to the end of the lease,
    #: ``"skip"`` drops it, ``"raise"`` fails it with AlreadyProcessingError. Default: ``"hold"``. Hazard: a copy may be the
    #: broker's last one. Without recovery, ``"skip"`` and ``"raise"`` lose the message if the owner then dies.
    on_processing: ClassVar[Literal["hold", "skip", "raise"] | None] = None

    #: What to do with a message whose owner's lease ran out: run it again, or fail it. Or a callable that is given the ``Row`` and returns
    #: ``"rerun"``, ``"fail"`` or ``Done(result)``, as a method or with ``self`` first; if it raises, it is asked again later. It may be asked
    #: more than once. Default: ``"rerun"`` with ``acks_late``, else ``"fail"``.
    on_abandoned: ClassVar[Literal["rerun", "fail"] | Callable[..., Literal["rerun", "fail"] | Done] | None] = None

    #: Whether a message that ended in failure may be sent again under its id. Default: ``False``.
    resubmit_failed: ClassVar[bool | None] = None

    #: How long a claim lives without renewal, in seconds or as a timedelta; > 0. Default: 60 s.
    lease: ClassVar[float | timedelta | None] = None

    #: How long after completion the id stays taken, in seconds or as a timedelta; ``None`` until the row is purged.
    unique_for: ClassVar[float | timedelta | None] = None

    #: Whether the same id with other arguments is refused. Default: yes if a message id is set, by option or for one call.
    fingerprint: ClassVar[bool | None] = None

    #: Whether the body runs in a transaction on the store's database, in :attr:`session` or :attr:`connection`, which is
    #: committed together with the message's completion. Default: ``False``. Hazard: if the database aborts the transaction
    #: because of another one, the body is run again, up to five times in all.
    atomic: ClassVar[bool | None] = None

    #: Whether the return value is kept for replay. Default: ``True``.
    keep_result: ClassVar[bool | None] = None

    #: The worker's request class, which handles dead children and time limits. Your own class is combined with it.
    Request: ClassVar[Any] = REQUEST

    @classmethod
    def bind(cls, app: Celery) -> Celery:
        """Bind the task to an app: guard its class, and give the app a queue log and the signal hooks.

        Raises:
            ConfigurationError: An option is misspelt, ``message_id`` names an argument that the body does not have, or one of the task's bases
                makes a guard impossible.
        """
        bound = super().bind(app)
        refuse_misspelt(cls, IdempotentTask)
        refuse_unknown_arguments(cls)
        guard(cls)
        guard_handlers(cls)
        cls._refuse_two_sessions(app)
        install(QueueLog.of(app))
        return bound

    @classmethod
    def _refuse_two_sessions(cls, app: Celery) -> None:
        atomic = app.conf.get(f"{PREFIX}atomic") if cls.atomic is None else cls.atomic
        for name in ("session", "connection") if atomic else ():
            for base in cls.__mro__:
                if not isinstance(vars(base).get(name, IdempotentTask.session), _InTheBody):
                    raise ConfigurationError(
                        f"task {cls.name} is atomic, so self.{name} is its transaction's, but {base.__name__} has another {name}: rename that"
                    )

    @property
    def queue_log(self) -> QueueLog:
        """The app's queue log."""
        return QueueLog.of(self.app)

    #: The SQLAlchemy session of the atomic body that this thread runs. It is committed after the body has returned, together with
    #: the message's completion. A commit by the body itself is an error. Undo a part by ``begin_nested()``, and all by raising an error.
    #: Outside of an atomic body, reading it raises IdempotentError.
    session: ClassVar[_InTheBody[Session]] = _InTheBody(
        lambda unit: unit.session, "session", "The session of the atomic body that runs."
    )

    #: The SQLAlchemy connection of the atomic body that this thread runs, in the same transaction as :attr:`session`.
    connection: ClassVar[_InTheBody[Connection]] = _InTheBody(
        lambda unit: unit.connection, "connection", "The connection of the atomic body."
    )

    @cached_property
    def idempotency(self) -> Options:
        """The task's options, collected and checked at the first use.

        Raises:
            ConfigurationError: An option has a wrong value.
        """
        return Options.of(self, self.queue_log.settings)

    # -- producer ------------------------------------------------------------------------------------------------------

    def apply_async(  # noqa: D417 - the rest is Celery's
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        **options: Any,
    ) -> IdempotentResult:
        """Send the task, once per message id.

        Takes what Celery's ``apply_async`` takes, and ``message_id``.

        Args:
            message_id: The id of this one message, instead of the one from the option ``message_id``; at most 255 bytes of UTF-8.

        Returns:
            The message's AsyncResult. Its attribute ``duplicate`` is true when the message was sent before, and ``message_id`` is the
            message's id. They belong to this object: pickled, or made anew by its id, a result has neither.

        Raises:
            ConfigurationError: The message id is not valid, a keyword is misspelt, or an argument has no canonical form. Nothing
                was sent.
            DuplicateMessageError: The message was sent before, and ``on_duplicate="raise"``.
            MessageMismatchError: The id is known with other arguments.
            StoreUnavailableError: The store did not answer within ``task_publish_retry_policy`` or, with
                ``idempotent_on_store_error="raise"``, at the first attempt. Nothing was sent.
            kombu.exceptions.OperationalError: The broker did not take the message; its id is free again.

        Atomicity: of N concurrent calls with one message id exactly one is recorded and published.
        """
        refuse_misspelt_call(self.name, options)
        named = {"producer": producer, "link": link, "link_error": link_error, "shadow": shadow}
        given = {name: value for name, value in named.items() if value is not None}
        result: IdempotentResult = send(self, args, kwargs, task_id, {**options, **given})
        return result

    def delay(self, *args: Any, **kwargs: Any) -> IdempotentResult:
        """Send the task with these arguments; see :meth:`apply_async`."""
        return self.apply_async(args, kwargs)

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> IdempotentEagerResult:
        """Run the task in this process, guarded by its message id as in a worker; see Celery's ``apply``."""
        refuse_misspelt_call(self.name, options)
        given = options.pop("task_id", None)
        task_id, step_id = (uuid(), None) if given is None else (given, id_of_step(given))
        message_id = options.pop("message_id", None)
        if is_unrecorded(self):
            warn_once(self.queue_log)
            result: IdempotentEagerResult = super().apply(args, kwargs, task_id=task_id, **options)
            return marked(result, message_id or task_id, duplicate=False)
        self.queue_log.warn_of_eager_call()
        header = Header.read(options.get("headers"))
        if header is None or not header.belongs_to(self.name, task_id):
            key, fingerprint = identify(
                self.idempotency, args, kwargs, message_id=message_id, task_id=step_id or task_id, task_name=self.name
            )
            header = Header.new(key, task_id, fingerprint)
            run = Run.of(self.request_stack.top)
            if run is not None and run.replacing and run.key == key:
                run.hand_on(
                    NewMessage(key=key, task_id=task_id, fingerprint=fingerprint)
                )  # replaced by itself, eagerly
            else:
                answer: IdempotentEagerResult | None = answer_of(self, key, fingerprint, task_id, options)
                if answer is not None:
                    return answer
        headers = header.write(options.get("headers"))
        if NESTING in options:
            headers[NESTING] = options[NESTING]
        result = super().apply(args, kwargs, task_id=task_id, **{**options, "headers": headers})
        # A retry's result already says it.
        return result if hasattr(result, "duplicate") else marked(result, header.message_id, duplicate=False)

    def publish(self, args: Any, kwargs: Any, **options: Any) -> AsyncResult[Any]:
        """Publish a message that has a row: Celery's own ``apply_async``, without the guard."""
        return super().apply_async(args, kwargs, **dated(self, options))

    def publish_copy(self, request: Context, message_id: str, countdown: float) -> None:
        """Publish a running delivery's message again, to arrive in ``countdown`` seconds, with the same task id and retries."""
        signature: Signature[Any] = self.signature_from_request(request, retries=request.retries)
        options = {**signature.options, **content_of(request), "message_id": message_id, "add_to_parent": False}
        options["countdown"] = countdown
        if options.get("exchange"):
            # Celery's native delayed delivery requires it if no queue is named.
            options["exchange_type"] = type_of_exchange(self.app, options["exchange"])
        options.pop("redelivered", None)
        self.publish(signature.args, signature.kwargs, **expiring_in_workers(self.app, options))

    # -- consumer ------------------------------------------------------------------------------------------------------

    def push_request(self, *args: Any, **kwargs: Any) -> None:
        """Push a request for a direct call.

        Celery's ``__call__`` calls this. If that call is the end of a delivery's ``super()`` chain, the body keeps the delivery's request.
        """
        request = self.request_stack.top
        run = Run.of(request)
        if run is None or run.passage is not Passage.CALLED:
            super().push_request(*args, **kwargs)
        else:
            run.passage = Passage.IN_BODY
            self.request_stack.push(request)

    def add_to_chord(self, sig: Signature[Any], lazy: bool = False) -> Any:
        """Add a signature to this task's chord, only once if the body runs again; see Celery's ``add_to_chord``.

        Hazard:
            Only Celery's Redis backend counts once. Other backends with such chords count at each run.
        """
        run = Run.of(self.request_stack.top)
        if run is None or not self.request.chord:
            return super().add_to_chord(sig, lazy)
        options = sig.options
        if not options.get("task_id"):
            options["task_id"] = run.calls.part(sig.task, sig.args, sig.kwargs)
        request = self.request
        sig.set(group_id=request.group, group_index=request.group_index, chord=request.chord, root_id=request.root_id)
        add_part(self.backend, request.group, sig.freeze())
        return sig if lazy else sig.delay()

    def replace(self, sig: Signature[Any]) -> Any:
        """Replace this task by another one under the same task id; see Celery's ``replace``."""
        run = Run.of(self.request_stack.top)
        if run is None:
            return super().replace(sig)
        run.replacing = True
        self.request.replaced_task_nesting = replacements(self.request)  # to which Celery adds one
        try:
            return super().replace(sig)
        except Ignore:
            raise
        except Exception:
            run.replacing = False
            raise
