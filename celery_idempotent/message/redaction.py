"""Mask arguments and results where they are shown, by the names of parameters and keys."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any
from uuid import UUID

__all__ = ["MASK", "Redaction"]

logger = logging.getLogger("celery_idempotent")

#: Shown in place of a masked value.
MASK = "***"

#: Types whose values are shown unless their name is masked. The ``repr`` of any other type may show anything.
_PLAIN = (str, int, float, Decimal, UUID, bytes, dt.date, dt.time, dt.timedelta, type(None))


class Redaction:
    """Mask values by their names.

    A value's name is the body's parameter, whether the argument was given by place or by name, or a mapping's key, at any depth. A
    value with a matching name is masked as a whole. An object of an unusual type is shown by its type alone, since its ``repr`` may show
    anything. If the parameters of positional arguments are unknown, all of these are masked. If anything fails, everything is masked.

    Args:
        names: The names, or patterns with ``*`` and ``?``; case is ignored. Without names, everything is shown.
        tasks: The app's tasks by name.
    """

    def __init__(self, names: Iterable[str], tasks: Mapping[str, Any]) -> None:
        self._patterns = tuple(name.casefold() for name in names)
        self._tasks = tasks

    def call(self, task_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the arguments of a call, masked."""
        if not self._patterns:
            return args, kwargs
        try:
            return self._call(task_name, args, kwargs)
        except Exception as error:  # noqa: BLE001 - a user's objects may raise anything, and then nothing is shown
            logger.warning("the arguments of %s cannot be redacted: %s", task_name, type(error).__name__)
            return MASK, MASK

    def result(self, value: Any, *, name: str = "result") -> Any:
        """Return a result, masked; its name is ``result``, and that of a step's is the step's, too."""
        if not self._patterns:
            return value
        try:
            shown = self._named("result", value)
            return shown if name == "result" or shown == MASK else self._named(name, value)
        except Exception as error:  # noqa: BLE001 - as above
            logger.warning("a result cannot be redacted: %s", type(error).__name__)
            return MASK

    def _call(self, task_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        names = self._positions(task_name, len(args))
        shown = [MASK if name is None else self._named(name, value) for name, value in zip(names, args, strict=True)]
        return shown, {name: self._named(name, value) for name, value in kwargs.items()}

    def _positions(self, task_name: str, count: int) -> Sequence[str | None]:
        """Return the parameters of positional arguments; ``None`` for each that is unknown."""
        options = getattr(self._tasks.get(task_name), "idempotency", None)
        try:
            return [None] * count if options is None else list(options.signature.positions(count))
        except TypeError:
            return [None] * count

    def _named(self, name: Any, value: Any) -> Any:
        known = str(name).casefold()
        return MASK if any(fnmatchcase(known, pattern) for pattern in self._patterns) else self._value(value)

    def _value(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            if "task" in value and "args" in value and "kwargs" in value:  # a signature, with arguments of its own
                args, kwargs = self._call(str(value["task"]), value["args"] or (), value["kwargs"] or {})
                value = {**value, "args": args, "kwargs": kwargs}
                return {
                    key: each if key in {"args", "kwargs"} else self._named(key, each) for key, each in value.items()
                }
            return {key: self._named(key, each) for key, each in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return {key: self._named(key, each) for key, each in value._asdict().items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self._value(each) for each in value]
        return value if isinstance(value, _PLAIN) else f"<{type(value).__name__}>"
