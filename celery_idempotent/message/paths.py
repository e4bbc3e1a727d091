"""Find a part of an argument by its path: ``order.id``, ``order.lines[0].sku``, ``order.note?``.

A path means the part that the broker will see, so it finds the same on both sides of the wire: a model is the dict that it is sent as, a
tuple is a list, and the keys of a dict are text.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from datetime import datetime, time
from functools import lru_cache
from itertools import islice
from typing import Any, NoReturn

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.plain import plain
from celery_idempotent.message.scalars import json_key

__all__ = ["ABSENT", "Path", "arriving", "key_of", "nearest", "parsed", "place", "refuse", "refuse_absent", "value_at"]

#: What :func:`value_at` returns for an optional part that a call does not have.
ABSENT = object()

_PATH = re.compile(r"(?P<name>[^.\[\]?*\s]+)(?P<steps>(?:\.[^.\[\]?*\s]+|\[[^\[\]]+\])*)(?P<optional>\??)")
_STEP = re.compile(r"\.([^.\[]+)|\[([^\]]+)\]")

#: Values without parts, with their subclasses: JSON sends a ``StrEnum`` member as its text.
_WHOLE = (str, int, float, bytes, bytearray, memoryview)

#: How many names an error looks at for the nearest one.
_NAMES = 200


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Path:
    """A parsed path.

    Attributes:
        steps: The argument's name, then the keys, attributes and indexes that lead to the part.
        optional: Whether a call may lack the part.
        text: The path without its mark; one text for all ways to write it.
    """

    steps: tuple[str, ...]
    optional: bool = False
    text: str = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Write the path once, not at each call."""
        object.__setattr__(self, "text", place(self.steps))

    @classmethod
    def parse(cls, text: object) -> Path:
        """Parse a path.

        Raises:
            ConfigurationError: It is not one.
        """
        found = _PATH.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ConfigurationError(
                f"by_arguments takes names of arguments, and paths to their parts, not {text!r}: write 'order_id', 'order.id', "
                f"'order.lines[0].sku', or 'order.note?' for a part that may be missing; by_arguments() is for all of them"
            )
        steps = (dotted or bracketed for dotted, bracketed in _STEP.findall(found["steps"]))
        return cls((found["name"], *steps), bool(found["optional"]))

    def __str__(self) -> str:
        return f"{self.text}?" if self.optional else self.text

    def leads_into(self, other: Path) -> bool:
        """Return whether it is the other path, or leads to a part of what that leads to."""
        return self.steps[: len(other.steps)] == other.steps


#: As :meth:`Path.parse`, once per text: for ids that a callable makes by ``by_arguments(...)`` at each call.
parsed = lru_cache(maxsize=1024)(Path.parse)


def place(steps: Iterable[str]) -> str:
    """Return the path of a part, as it is written."""
    name, *rest = steps
    return name + "".join(f".{step}" if re.fullmatch(r"[^.\[\]?*\s]+", step) else f"[{step}]" for step in rest)


def value_at(path: Path, arguments: Mapping[str, Any], option: str) -> Any:
    """Return the part that a path leads to, or :data:`ABSENT` if the call lacks it and may.

    Args:
        path: The path.
        arguments: The call's arguments by name; they have the path's first step.
        option: The option as it was written, for the error.

    Raises:
        ConfigurationError: The call lacks it and may not.
    """
    value = arguments[path.steps[0]]
    for number, step in enumerate(path.steps[1:], start=1):
        value = arriving(value)
        key = key_of(value, step)
        if key is ABSENT:
            if path.optional:
                return ABSENT
            refuse(option, path, number, value)
        value = value[key] if isinstance(value, (Mapping, list, tuple)) else getattr(value, str(key))
    return value


def arriving(value: Any) -> Any:
    """Return what a value stands for, one level deep: a model's fields, what ``__json__`` returns, a time in UTC."""
    while hasattr(type(value), "__json__"):
        value = value.__json__()
    if callable(getattr(type(value), "model_dump", None)):
        return value.model_dump(mode="json")
    return plain(value) if isinstance(value, (datetime, time)) else value


def key_of(value: Any, step: str) -> Any:
    """Return the key, index or attribute of a value that a step means; :data:`ABSENT` if it has none.

    Args:
        value: The value, as :func:`arriving` returns it.
        step: The step.
    """
    if isinstance(value, Mapping):
        if step in value:
            return step
        return next((key for key in value if json_key(key) == step), ABSENT)
    if isinstance(value, (list, tuple)):
        return int(step) if re.fullmatch(r"[0-9]{1,9}", step) and int(step) < len(value) else ABSENT
    if value is None or isinstance(value, _WHOLE):
        return ABSENT
    return ABSENT if callable(getattr(value, step, refuse)) else step


def refuse(option: str, path: Path, number: int, value: Any) -> NoReturn:
    """Raise the error for a call that lacks a part.

    Args:
        option: The option as it was written.
        path: The path to the part.
        number: Which step of the path leads nowhere.
        value: The value that lacks it; not shown, since it may be secret.
    """
    at, step = place(path.steps[:number]), path.steps[number]
    if value is None:
        what = f"{at} is None in this call, so it has no {step!r}"
    elif isinstance(value, _WHOLE):
        what = f"{at} is of type {type(value).__name__} in this call, which has no parts"
    elif isinstance(value, (list, tuple)):
        what = f"{at} has {len(value)} items in this call, and {step!r} is none of their indexes"
    else:
        what = f"{at} has no {step!r} in this call{nearest(step, _names(value))}"
    raise ConfigurationError(f"{option}: {what}: correct the path, or write '{path.text}?' if it may be missing")


def refuse_absent(option: str, path: Path, names: Iterable[str]) -> NoReturn:
    """Raise the error for a call that lacks an argument.

    Args:
        option: The option as it was written.
        path: The path, whose first step is the argument.
        names: The arguments that the call has.
    """
    raise ConfigurationError(
        f"{option}: {path.steps[0]} is not in the arguments of this call{nearest(path.steps[0], names)}: "
        f"give it, or write '{path.text}?' if it may be missing"
    )


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the nearest of some names in brackets, to add to an error; empty if none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _names(value: Any) -> Iterable[str]:
    names = value if isinstance(value, Mapping) else (name for name in dir(value) if not name.startswith("_"))
    return (name for name in islice(names, _NAMES) if isinstance(name, str))
