"""Ids by a callable of the call's arguments: ``message_id=lambda order_id, amount: f"order:{order_id}"``."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.call_signature import Args, CallSignature, Kwargs
from celery_idempotent.message.check_id import check_message_id

__all__ = ["IdCallable"]


class IdCallable:
    """Makes ids by a callable.

    Args:
        option: The callable. If it also takes the task, it is bound to it: see :meth:`CallSignature.wants_task`.
        signature: The task's.

    Raises:
        ConfigurationError: It does not take the body's arguments, neither by place nor by name.
    """

    __slots__ = ("_option", "_signature")

    def __init__(self, option: Callable[..., str], signature: CallSignature) -> None:
        self._option = option
        self._signature = signature
        self._check()

    def __call__(self, args: Args, kwargs: Kwargs) -> str:
        """Return the id of a call with these arguments."""
        self._signature.bind(args, kwargs)  # so that the error for a wrong call names the task, not the callable
        value = self._option(*(args or ()), **(kwargs or {}))
        try:
            return check_message_id(value)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"the message_id callable of {self._signature.name} returned {value!r}: {error}"
            ) from None

    def _check(self) -> None:
        """Refuse a callable that cannot be called as the body is."""
        try:
            takes = inspect.signature(self._option)
        except (TypeError, ValueError):  # as for some types written in C: a misfit shows when it is called
            return
        every = self._signature.each
        for some in (every, [p for p in every if p.default is p.empty]):
            by_place = [p for p in some if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
            by_name = {p.name: None for p in some if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}}
            only = [p for p in some if p.kind is p.POSITIONAL_ONLY]
            for args, kwargs in (
                (by_place, {p.name: None for p in some if p.kind is p.KEYWORD_ONLY}),
                (only, by_name),
            ):
                try:
                    takes.bind(*args, **kwargs)
                except TypeError:
                    continue
                return
        if any(p.kind in {p.VAR_POSITIONAL, p.VAR_KEYWORD} for p in every):
            return  # the body takes any number of arguments, the callable a number of its choice
        name = self._signature.name
        raise ConfigurationError(
            f"the message_id callable of {name} takes {takes}, but is called like {name}, with "
            f"{inspect.Signature([p.replace(annotation=p.empty) for p in every])}: give it these parameters, "
            f"after `self` if it needs the task"
        )
