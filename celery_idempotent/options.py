"""The options of one task: from class attributes or decorator arguments, then the app's settings, then the defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache, partialmethod
from types import MethodType
from typing import TYPE_CHECKING, Any

from celery.utils.functional import maybe_list

from celery_idempotent.core.decision import CallPolicy, DeliveryPolicy
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.call_signature import CallSignature
from celery_idempotent.message.ids import ByArguments, message_id_source
from celery_idempotent.settings import OPTION_NAMES, PREFIX, Settings, one_of, seconds, yes_or_no

if TYPE_CHECKING:
    from celery import Task

    from celery_idempotent.core.records import Row

__all__ = ["Options", "refuse_misspelt", "refuse_misspelt_call", "refuse_unknown_arguments"]


@dataclass(frozen=True, slots=True)
class Options:
    """The checked options of a task.

    Attributes:
        idempotent: Whether the task is guarded. Rows that were recorded are completed in both cases.
        message_id: Makes the message id of a call from its arguments; ``None`` uses the task id.
        signature: Binds a call's arguments to the names of the body's parameters; without those that do not count.
        call: The options for the producer's decision.
        delivery: The options for the consumer's decision.
        ask_abandoned: Says what becomes of a message whose owner's lease ran out, if ``delivery.on_abandoned`` is ``ask``.
        lease: Seconds for which a claim lives without renewal.
        unique_for: Seconds after completion for which the id stays taken; ``None`` until it is purged.
        fingerprint: Whether calls under one id are compared; with ``None``, only if an id is set, by the option or for one call.
        atomic: Whether the body runs in a transaction on the store's database.
        keep_result: Whether the return value is kept for replay.
    """

    idempotent: bool
    message_id: Callable[[tuple[Any, ...], dict[str, Any]], str] | None
    signature: CallSignature
    call: CallPolicy
    delivery: DeliveryPolicy
    ask_abandoned: Callable[[Row], object] | None
    lease: float
    unique_for: float | None
    fingerprint: bool | None
    atomic: bool
    keep_result: bool

    @classmethod
    def of(cls, task: Task, settings: Settings) -> Options:
        """Collect and check a task's options.

        Raises:
            ConfigurationError: An option has a wrong value; the text names the task, the option and what is valid.
        """
        try:
            return cls._collect(task, settings)
        except ConfigurationError as error:
            raise ConfigurationError(f"task {task.name}: {error}") from error

    @classmethod
    def _collect(cls, task: Task, settings: Settings) -> Options:
        conf = task.app.conf

        def given(name: str) -> Any:
            # Read from the class: on the instance, a function would become a method.
            value = getattr(type(task), name, None)
            return conf.get(PREFIX + name) if value is None else value

        def chosen(name: str, default: str, *choices: str) -> Any:
            value = given(name)
            return default if value is None else one_of(name, value, *choices)

        def flag(name: str, default: bool | None) -> Any:
            value = given(name)
            return default if value is None else yes_or_no(name, value)

        lease, unique_for, message_id = given("lease"), given("unique_for"), given("message_id")
        signature = signature_of(type(task))
        if isinstance(message_id, ByArguments):
            signature = message_id.among(signature)  # what does not count is not compared either
        idempotent = getattr(type(task), "idempotent", None)
        asks, default = callable(given("on_abandoned")), "rerun" if task.acks_late else "fail"
        return cls(
            idempotent=(idempotent is None or yes_or_no("idempotent", idempotent)) and settings.enabled,
            message_id=message_id_source(_bound(task, "message_id", message_id, signature), signature),
            signature=signature,
            call=CallPolicy(
                on_duplicate=chosen("on_duplicate", "skip", "skip", "raise"),
                resubmit_failed=flag("resubmit_failed", False),
                lost_after=settings.lost_after,
            ),
            delivery=DeliveryPolicy(
                on_processing=chosen("on_processing", "hold", "hold", "skip", "raise"),
                on_abandoned="ask" if asks else chosen("on_abandoned", default, "rerun", "fail"),
            ),
            ask_abandoned=_bound(task, "on_abandoned", given("on_abandoned"), signature) if asks else None,
            lease=60.0 if lease is None else seconds("lease", lease, positive=True),
            unique_for=None if unique_for is None else seconds("unique_for", unique_for, positive=True),
            fingerprint=flag("fingerprint", None),
            atomic=flag("atomic", False),
            keep_result=flag("keep_result", True),
        )


def signature_of(cls: type[Task]) -> CallSignature:
    """Return the signature of a task's body."""
    run = inspect.getattr_static(cls, "run")
    return CallSignature(cls.run, bound=not isinstance(run, staticmethod), typed=cls.typing is not False)


def refuse_unknown_arguments(cls: type[Task]) -> None:
    """Refuse a task's option ``message_id`` that names arguments, or parts of them, which the body does not have.

    Raises:
        ConfigurationError: It names the nearest ones.
    """
    option = getattr(cls, "message_id", None)
    if isinstance(option, (str, ByArguments)):
        try:
            message_id_source(option, signature_of(cls))
        except ConfigurationError as error:
            raise ConfigurationError(f"task {cls.name}: {error}") from error


def _bound(task: Task, name: str, option: Any, signature: CallSignature) -> Any:
    """Return an option that may be a callable; if it is a method, bound to the task."""
    stored = inspect.getattr_static(type(task), name, None)
    if isinstance(stored, partialmethod):
        return stored.__get__(task, type(task))
    if isinstance(stored, staticmethod) and stored.__func__ is option:
        return option
    return MethodType(option, task) if signature.wants_task(option, type(task), name) else option


def refuse_misspelt_call(task_name: str, options: Mapping[str, Any]) -> None:
    """Refuse a keyword of ``apply_async`` that resembles ``message_id``, or is an option of the task.

    Celery passes unknown keywords on as properties of the message, so ``mesage_id="m"`` would silently do nothing. Stamps are keywords
    too, with names that the user chooses.

    Raises:
        ConfigurationError: It names the nearest valid keyword.
    """
    stamps = maybe_list(options.get("stamped_headers")) or ()
    for name in options:
        near = "" if name == "message_id" or name in stamps else _nearest(name)
        if near == "message_id":
            raise ConfigurationError(
                f"apply_async() of {task_name}: unknown keyword {name!r}; did you mean 'message_id'?"
            )
        if near:
            raise ConfigurationError(
                f"apply_async() of {task_name}: {name!r} is not a keyword of a call; {near!r} is an option of the task: "
                f"give it to the decorator"
            )


def refuse_misspelt(cls: type[Task], base: type) -> None:
    """Refuse a class attribute or decorator argument that resembles an option.

    Celery accepts any attribute on a task, so ``on_duplicat="raise"`` would silently do nothing. Attributes that resemble no
    option belong to the user, and are accepted.

    Raises:
        ConfigurationError: It names the nearest option.
    """
    # Not `hasattr`, which would call the property `app` of the base: that binds the base to an app, and its subclasses would then share
    # its stack of requests.
    known = {name for owner in base.__mro__ for name in vars(owner)}
    for owner in cls.__mro__:
        if owner is base:
            break
        for name in vars(owner):
            if name.startswith("_") or name in known:
                continue
            near = _nearest(name)
            if near:
                raise ConfigurationError(
                    f"task {getattr(cls, 'name', None) or cls.__name__}: unknown option {name!r}; did you mean {near!r}?"
                )


@lru_cache(maxsize=1024)
def _nearest(name: str) -> str:
    """Return the option that a name is or resembles; empty if there is none. Cached, since calls have the same few keywords."""
    return next(iter(get_close_matches(name.lower(), (*OPTION_NAMES, "idempotent"), n=1, cutoff=0.85)), "")
