"""Turn a task's ``message_id`` option into a function of the call's arguments.

The producer decides the id, once. Arguments are bound to the task's parameters first, so that ``f(1)``, ``f(a=1)`` and
``f(1, b=<default>)`` are one call. Nothing here knows Celery or a database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.call_signature import ANY_CALL, Args, CallSignature, Kwargs
from celery_idempotent.message.exclusion import ALL
from celery_idempotent.message.id_callable import IdCallable
from celery_idempotent.message.id_template import IdTemplate
from celery_idempotent.message.paths import Path, parsed

__all__ = ["ByArguments", "MessageIdSource", "by_arguments", "message_id_source"]

#: Gives the message id of a call with these positional and keyword arguments.
MessageIdSource = Callable[[Args, Kwargs], str]


@dataclass(frozen=True, slots=True, repr=False)
class ByArguments:
    """Message ids computed over arguments; made by :func:`by_arguments`."""

    #: The paths that count, sorted; empty for all.
    names: tuple[str, ...] = ()
    #: The paths that do not count, sorted; ``("*",)`` for all.
    exclude: tuple[str, ...] = ()

    def __repr__(self) -> str:
        excluded = "'*'" if self.exclude == (ALL,) else repr(self.exclude)
        return (
            f"by_arguments({', '.join((*map(repr, self.names), *([f'exclude={excluded}'] if self.exclude else [])))})"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        """Return the digest of a call whose parameters are not known, so that positional arguments have no names.

        A task's option is not called like this. It is bound to the task's parameters, where ``f(1)`` is ``f(a=1)``.

        Raises:
            ConfigurationError: An argument has no canonical form, or an argument that counts was not given by keyword.
        """
        for path in self.paths:
            if path.steps[0] not in kwargs and not path.optional:
                raise ConfigurationError(
                    f"{self!r}: argument {path.steps[0]!r} was not given by keyword; give it by keyword, "
                    f"or make {self!r} itself the task's message_id, which knows the parameters"
                )
        return self.among(ANY_CALL).digest(args, kwargs, only=self.paths, option=repr(self))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths that count, parsed."""
        return tuple(map(parsed, self.names))

    def among(self, signature: CallSignature) -> CallSignature:
        """Return a task's signature without what does not count.

        Raises:
            ConfigurationError: A path leads to nothing that the task's calls can have.
        """
        if not self.exclude:
            return signature
        paths = [Path((ALL,))] if self.exclude == (ALL,) else list(map(parsed, self.exclude))
        return signature.excluding(paths, repr(self))


def by_arguments(*names: str, exclude: str | Iterable[str] = ()) -> ByArguments:
    """Return a ``message_id`` option: calls with equal arguments are one message.

    The id is a SHA-256 over the canonical form of the arguments (see :mod:`celery_idempotent.message.canonical`), bound to the task's
    parameters and with defaults applied: ``f(1)``, ``f(a=1)`` and ``f(1, b=<default>)`` are one call; ``1`` and ``"1"`` are
    two. What counts is what the broker will see: JSON makes a list of a tuple, and text of the keys of a dict.

    A path leads to a part of an argument: ``"order.id"`` to a key of a dict or to an attribute, ``"order.lines[0].sku"`` (or
    ``"order.lines.0.sku"``) into a list, ``"order[unit price]"`` to any key. ``"order.note?"`` may be missing, which is not the same
    as ``None``. A part that is missing without that mark is an error of the call.

    Args:
        names: The arguments, or paths, that tell messages apart; none for all of them. Order does not matter.
        exclude: The arguments, or paths, that do not count, such as the time of the call: they are neither part of the id nor compared
            when the id is used again. ``"*"`` is the task alone: all its calls are one message.

    Hazard:
        With all arguments, one that differs at every call (the time, a request id) makes every call a new message: exclude it. With
        some arguments, name all that the effect depends on. A call that differs in another argument is refused as a mismatch,
        unless that is excluded, or ``fingerprint=False``. If you change the option, calls from before and after are not alike.

    Raises:
        ConfigurationError: A name is not a path, or what is named is excluded. When the task is bound: a path leads to nothing that its
            calls can have, by its parameters and their annotations (dataclasses, pydantic models, ``TypedDict``, lists, dicts).
    """
    anything: object = exclude
    given = tuple(anything) if isinstance(anything, Iterable) and not isinstance(anything, str) else (anything,)
    if ALL in given:
        if names or given != (ALL,):
            raise ConfigurationError(
                f"by_arguments(exclude='*') is the task alone: leave out {[*names, *(name for name in given if name != ALL)]}; or, "
                f"so that other arguments are not compared, set fingerprint=False"
            )
        return ByArguments((), (ALL,))
    counted = sorted(set(map(Path.parse, cast("tuple[object, ...]", names))))
    excluded = sorted(set(map(Path.parse, cast("tuple[object, ...]", given))))
    for path in excluded:
        for name in counted:
            if name.leads_into(path):
                raise ConfigurationError(
                    f"by_arguments: {str(name)!r} counts, and exclude={str(path)!r} leaves it out: leave out one of the two"
                )
    return ByArguments(tuple(map(str, counted)), tuple(map(str, excluded)))


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
        signature.check_paths(option.paths, repr(option))
        digest = option.among(signature).digest
        return partial(digest, only=option.paths, option=repr(option))
    if callable(option) and option is not by_arguments:
        return IdCallable(option, signature)
    raise ConfigurationError(
        f"message_id={option!r} of {signature.name} is not one of: None for the task id, "
        f'a format string such as "order:{{order_id}}", by_arguments() or by_arguments("order_id"), '
        f"a callable of the call's arguments that returns the id"
    )
