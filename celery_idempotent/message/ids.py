"""Turn a task's ``message_id`` option into a function of the call's arguments.

The producer decides the id, once. Arguments are bound to the task's parameters first, so that ``f(1)``, ``f(a=1)`` and
``f(1, b=<default>)`` are one call. Nothing here knows Celery or a database.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.call_signature import ANY_CALL, Args, CallSignature, Kwargs
from celery_idempotent.message.check_id import check_message_id
from celery_idempotent.message.id_template import IdTemplate

__all__ = ["ByArguments", "MessageIdSource", "by_arguments", "message_id_source"]

#: Gives the message id of a call with these positional and keyword arguments.
MessageIdSource = Callable[[Args, Kwargs], str]


@dataclass(frozen=True, slots=True, repr=False)
class ByArguments:
    """Message ids computed over arguments; made by :func:`by_arguments`."""

    #: The arguments that count, sorted; empty for all.
    names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"by_arguments({', '.join(map(repr, self.names))})"

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        """Return the digest of a call whose parameters are not known, so that positional arguments have no names.

        A task's option is not called like this. It is bound to the task's parameters, where ``f(1)`` is ``f(a=1)``.

        Raises:
            ConfigurationError: An argument has no canonical form, or an argument that counts was not given by keyword.
        """
        for name in self.names:
            if name not in kwargs:
                raise ConfigurationError(
                    f"{self!r}: argument {name!r} was not given by keyword; give it by keyword, "
                    f"or make {self!r} itself the task's message_id, which knows the parameters"
                )
        return ANY_CALL.digest(args, kwargs, only=self.names)


def by_arguments(*names: str) -> ByArguments:
    """Return a ``message_id`` option: calls with equal arguments are one message.

    The id is a SHA-256 over the canonical form of the arguments (see :mod:`celery_idempotent.message.canonical`), bound to the task's
    parameters and with defaults applied: ``f(1)``, ``f(a=1)`` and ``f(1, b=<default>)`` are one call; ``1`` and ``"1"`` are
    two.

    Args:
        names: The arguments that tell messages apart; none for all of them. Order does not matter.

    Hazard:
        With all arguments, one that differs at every call (the time, a request id) makes every call a new message. With
        some arguments, name all that the effect depends on. A call that differs in another argument is refused as a mismatch,
        unless ``fingerprint=False``.

    Raises:
        ConfigurationError: A name is not a non-empty string.
    """
    for name in cast("tuple[object, ...]", names):
        if not isinstance(name, str) or not name:
            raise ConfigurationError(
                f"by_arguments takes names of arguments, not {name!r}: "
                f'message_id=by_arguments("order_id"), or by_arguments() for all of them'
            )
    return ByArguments(tuple(sorted(set(names))))


def message_id_source(
    option: object, run: Callable[..., Any] | CallSignature, bound: bool = False
) -> MessageIdSource | None:
    """Turn a task's ``message_id`` option into a function of the call's arguments.

    Args:
        option: One of

            * ``None``: the message id is the task id;
            * a format string over the bound arguments: ``"order:{order_id}"``, ``"order:{order.id}"``,
              ``"{order[id]}"``, ``"{amount:.2f}"``. Fields are filled with plain data, so arguments that are equal for
              :func:`by_arguments` give one text: see :func:`~celery_idempotent.message.plain.plain`;
            * :func:`by_arguments`;
            * a callable that takes the task's arguments and returns the id. If it also takes the task, bind it first:
              see :meth:`CallSignature.wants_task`.
        run: The task's body, or its signature.
        bound: As for :class:`CallSignature`; ignored if ``run`` is one.

    Hazard:
        The fields of a format string are joined as text: ``"{a}:{b}"`` gives one id for ``("x:y", "z")`` and
        ``("x", "y:z")``, and ``{a}`` one for ``1`` and ``"1"``. Fingerprints differ, so the second such call is an error.

    Returns:
        The function, which raises ``TypeError`` for arguments that the body does not accept, and ``ConfigurationError``
        when they give no valid id: see :func:`check_message_id`, and fields that are all empty, one that is ``None`` or whose text is not the same
        in every process. ``None`` when the option is.

    Raises:
        ConfigurationError: The option is not valid for this task.
    """
    if option is None:
        return None
    signature = run if isinstance(run, CallSignature) else CallSignature(run, bound=bound)
    if isinstance(option, str):
        return IdTemplate(option, signature)
    if isinstance(option, ByArguments):
        signature.check_names(option.names, repr(option))
        names = option.names
        return lambda args, kwargs: signature.digest(args, kwargs, only=names)
    if callable(option) and option is not by_arguments:
        return _Called(option, signature)
    raise ConfigurationError(
        f"message_id={option!r} of {signature.name} is not one of: None for the task id, "
        f'a format string such as "order:{{order_id}}", by_arguments() or by_arguments("order_id"), '
        f"a callable of the call's arguments that returns the id"
    )


class _Called:
    """Ids by a callable of the call's arguments."""

    __slots__ = ("_option", "_signature")

    def __init__(self, option: Callable[..., str], signature: CallSignature) -> None:
        self._option = option
        self._signature = signature
        signature.check_callable(option)

    def __call__(self, args: Args, kwargs: Kwargs) -> str:
        self._signature.bind(args, kwargs)  # so that the error for a wrong call names the task, not the callable
        value = self._option(*(args or ()), **(kwargs or {}))
        try:
            return check_message_id(value)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"the message_id callable of {self._signature.name} returned {value!r}: {error}"
            ) from None
