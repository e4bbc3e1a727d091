"""Refuse a path that leads to nothing that an annotated parameter can have, when the task is bound and not at each call."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.paths import Path, place

__all__ = ["parts_of_body", "refuse_unknown_part"]

_WHOLE = (str, int, float, bool, bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class _Lacks:
    """The type has no such part.

    Attributes:
        names: The parts that it has; ``None`` if it has none at all.
    """

    names: Sequence[str] | None


def parts_of_body(body: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the annotations of a body's parameters; none of a body whose annotations cannot be read here."""
    return _hints(inspect.unwrap(body))


def refuse_unknown_part(path: Path, hint: Any, option: str) -> None:
    """Refuse a path with a step that its type does not have. Types that do not say what parts they have are not checked.

    Args:
        path: The path.
        hint: The annotation of its parameter.
        option: The option as it was written.

    Raises:
        ConfigurationError: The text names the nearest part.
    """
    for number, step in enumerate(path.steps[1:], start=1):
        found = _part(hint, step)
        if isinstance(found, _Lacks):
            at, name = place(path.steps[:number]), getattr(hint, "__name__", str(hint))
            if found.names is None:
                raise ConfigurationError(f"{option}: {at} is a {name}, which has no parts; name {at!r} itself")
            near = difflib.get_close_matches(step, found.names, n=1)
            instead = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(found.names) or 'none'}"
            raise ConfigurationError(f"{option}: {at}, a {name}, has no {step!r}; {instead}")
        hint = found


def _part(hint: Any, step: str) -> Any:
    """Return the type of a part, ``Any`` if it is not known, or :class:`_Lacks`."""
    if hasattr(hint, "__supertype__"):  # a NewType
        return _part(hint.__supertype__, step)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _part_of_any([_part(each, step) for each in arguments if each is not type(None)])
    kind = hint if origin is None else origin
    if not isinstance(kind, type):
        return Any
    if kind in _WHOLE:
        return _Lacks(None)
    if typing.is_typeddict(hint) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        return _named(kind, step)
    if issubclass(kind, (list, tuple)):
        return _item(kind, arguments, step)
    if issubclass(kind, Mapping):
        return arguments[1] if kind in (dict, Mapping) and len(arguments) == 2 else Any
    if hasattr(kind, "model_fields"):
        return _of_model(kind, step)
    if dataclasses.is_dataclass(kind) and not hasattr(kind, "__getattr__") and not hasattr(kind, "__json__"):
        names = [field.name for field in dataclasses.fields(kind)]
        return _hints(kind).get(step, Any) if step in names or hasattr(kind, step) else _Lacks(names)
    return Any


def _part_of_any(found: Sequence[Any]) -> Any:
    """Return the part of a union: it is lacking only if each member lacks it."""
    if found and all(isinstance(each, _Lacks) for each in found):
        names = [name for each in found for name in each.names or ()]
        return _Lacks(names or None)
    known = [each for each in found if not isinstance(each, _Lacks)]
    return known[0] if len(known) == 1 else Any


def _named(kind: Any, step: str) -> Any:
    """Return the part of a TypedDict, or of a named tuple, which arrives as a list."""
    if not issubclass(kind, tuple):
        hints = _hints(kind)
        return hints.get(step, Any) if step in kind.__annotations__ else _Lacks(list(kind.__annotations__))
    indexes = [str(number) for number, _ in enumerate(kind._fields)]
    return _hints(kind).get(kind._fields[int(step)], Any) if step in indexes else _Lacks(indexes)


def _item(kind: type, arguments: Sequence[Any], step: str) -> Any:
    if not re.fullmatch(r"[0-9]{1,9}", step):
        return _Lacks(["indexes from 0"])
    if kind is list or arguments[-1:] == (...,):
        return arguments[0] if arguments else Any
    if not arguments or kind is not tuple:
        return Any
    return arguments[int(step)] if int(step) < len(arguments) else _Lacks([str(n) for n, _ in enumerate(arguments)])


def _of_model(kind: Any, step: str) -> Any:
    """Return the part of a pydantic model, by its name or an alias: the app decides by which it is sent."""
    serializers = getattr(getattr(kind, "__pydantic_decorators__", None), "model_serializers", None)
    if kind.model_config.get("extra") == "allow" or serializers:
        return Any
    fields = kind.model_fields
    if step in fields:
        return fields[step].annotation
    aliases = {alias for field in fields.values() for alias in (field.alias, field.serialization_alias) if alias}
    computed = getattr(kind, "model_computed_fields", {})
    return Any if step in aliases or step in computed else _Lacks(list(fields))


def _hints(annotated: Any) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(annotated)
    except Exception:  # noqa: BLE001 - names that are imported for type checkers alone, or are local: nothing is known then
        return {}
