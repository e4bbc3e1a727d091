"""Compute one byte form for equal values, from which fingerprints and ids by arguments are made.

Equal calls must give equal forms in any process, for any hash seed and any order of a dict or set, and on both sides of the wire:
the producer computes the form of what its caller passed, the consumer the form of what arrived. So a value stands for what arrives
after kombu's JSON has carried it. A value that JSON cannot carry stands for itself.

=========================================  ===========================================================================
value                                      stands for
=========================================  ===========================================================================
``None``, ``bool``, ``int``, ``float``     itself: ``1``, ``True``, ``1.0`` and ``"1"`` are four values. ``-0.0`` is
                                           ``0.0``, every NaN is one
``str``                                    its text; two surrogates that make up one character are that character
subclasses of the above                    the plain value, as JSON sends it: a ``StrEnum`` or ``IntEnum``
                                           member is its value
``list``, ``tuple``, a named tuple         a list
``dict``, a Celery signature               its items, in no order. Keys that JSON turns into text (numbers, ``bool``,
                                           ``None``) are that text: ``{1: x}`` is ``{"1": x}``. They differ only in a
                                           dict that holds both keys, which JSON cannot carry
an object with ``__json__``                what ``__json__`` returns, as for kombu
``datetime``                               aware: its instant, in any zone. Naive: its wall time, never an instant
``date``, ``time``, ``timedelta``, UUID    itself; an aware ``time`` is taken at UTC, as Python compares it
``Decimal``                                its number: ``1.0`` is ``1.00``
``bytes``, ``bytearray``, ``memoryview``   its bytes, never a text
other ``Enum`` members                     class and name
``set``, ``frozenset``                     its elements, in no order
a pydantic model                           its dump in JSON mode, as ``pydantic=True`` sends it
a dataclass instance                       class, and the fields that take part in comparison
a ``pathlib`` path                         its text and flavour
=========================================  ===========================================================================

Anything else is refused, such as a generator, a function or an object of your own class: its ``repr`` may contain a memory address,
which differs between processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from enum import Enum, Flag
from typing import Any

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.scalars import delimited, json_key, scalar, text

__all__ = ["FORM", "canonical", "fingerprint"]

#: Version of the form. It is part of every digest, so a later form never matches this one.
FORM = b"celery-idempotent:1\n"

# How an error shows a step into a value.
_ITEM, _FIELD, _KEY, _ELEMENT = "[{!r}]", ".{}", ".keys()", "{{...}}"

_PLACE = re.compile(r"[^\W\d]\w*([.\[].*)?")

#: Types whose values all have a form, so the walk need not record their place.
_LEAVES = frozenset((str, int, float, bool, type(None)))


def canonical(value: object) -> bytes:
    """Return the canonical form of a value: typed and length-delimited, so that no two values share one.

    Args:
        value: Plain data; the module's table says what each type stands for. An error names the place in it, with the keys of
            the outer dict as argument names: ``order.items[2]``.

    Returns:
        The form. It cannot be decoded.

    Raises:
        ConfigurationError: Part of the value has no canonical form, contains itself or is nested too deeply; the text says where.
    """
    form = _Form()
    try:
        return form.of(value)
    except RecursionError:
        # Not chained: a traceback of a thousand frames would hide the message.
        raise ConfigurationError(
            f"{form.where(depth=1)} is nested too deeply to have a canonical form: pass flatter data"
        ) from None


def fingerprint(value: object) -> str:
    """Return the SHA-256 hex digest (64 characters) of the canonical form of ``value``.

    Raises:
        ConfigurationError: As :func:`canonical`.
    """
    return hashlib.sha256(FORM + canonical(value)).hexdigest()


class _Form:
    """One walk over a value. It keeps the current place, for errors, and the enclosing values, to detect cycles."""

    __slots__ = ("_above", "_path")

    def __init__(self) -> None:
        self._path: list[tuple[str, object]] = []
        self._above: set[int] = set()

    def of(self, value: object) -> bytes:
        # JSON's native types come first, with their subclasses, as in the encoder.
        if value is None:
            return b"N"
        if isinstance(value, bool):
            return b"T" if value else b"F"
        if isinstance(value, str):
            return delimited(b"s", text(value))
        if isinstance(value, int):
            return delimited(b"i", b"%x" % value)  # hex: decimal text is refused past 4300 digits
        if isinstance(value, float):
            return delimited(b"f", float.__repr__(float(value) + 0.0).encode())  # + 0.0 turns -0.0 into 0.0
        if isinstance(value, (list, tuple)):
            return self._inside(value, self._list)
        if isinstance(value, dict):
            return self._inside(value, self._dict)
        if hasattr(type(value), "__json__"):
            return self._inside(value, self._reduced)
        if (form := scalar(value)) is not None:
            return form
        if isinstance(value, Enum):
            return b"e" + _class(value) + self.of(value.value if isinstance(value, Flag) else value.name)
        if isinstance(value, (set, frozenset)):
            return self._inside(value, self._set)
        if callable(getattr(type(value), "model_dump", None)):
            return self._inside(value, self._model)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._inside(value, self._dataclass)
        raise ConfigurationError(
            f"{self.where()} is of type {_type_name(value)}, which has no canonical form: pass plain data in its place "
            f"(text, numbers, dates, lists, dicts, dataclasses); or, if the serializer can carry it as pickle does, "
            f"set fingerprint=False and give a message_id that does not depend on it"
        )

    def where(self, depth: int | None = None) -> str:
        """Return the current place as a Python expression, ``order.items[2]``, of at most ``depth`` steps."""
        if not self._path:
            return "the value"
        kind, key = self._path[0]
        # Arguments, and paths into them, are shown as they are written.
        bare = kind == _ITEM and isinstance(key, str) and _PLACE.fullmatch(key) is not None
        first = str(key) if bare else kind.format(key)
        return first + "".join(kind.format(key) for kind, key in self._path[1:depth])

    def _at(self, kind: str, key: object, value: object) -> bytes:
        self._path.append((kind, key))
        form = self.of(value)
        self._path.pop()  # not in a `finally`: an error needs the path
        return form

    def _inside(self, value: Any, form: Callable[[Any], bytes]) -> bytes:
        if id(value) in self._above:
            raise ConfigurationError(
                f"{self.where()} contains itself, so it has no canonical form: pass data without cycles"
            )
        self._above.add(id(value))
        result = form(value)
        self._above.discard(id(value))
        return result

    def _list(self, value: Sequence[object]) -> bytes:
        return _counted(b"l", [self._at(_ITEM, index, item) for index, item in enumerate(value)])

    def _dict(self, value: dict[object, object]) -> bytes:
        names: Sequence[object] = [json_key(key) for key in value]
        if len(set(names)) < len(value):
            names = list(value)
        return _counted(
            b"d",
            sorted(
                self._key(key, name) + (self.of(item) if type(item) in _LEAVES else self._at(_ITEM, key, item))
                for name, (key, item) in zip(names, value.items(), strict=True)
            ),
        )

    def _key(self, key: object, name: object) -> bytes:
        return delimited(b"s", text(name)) if type(name) is str else self._at(_KEY, key, name)

    def _set(self, value: Iterable[object]) -> bytes:
        return _counted(b"S", sorted(self._at(_ELEMENT, None, element) for element in value))

    def _reduced(self, value: Any) -> bytes:
        return self.of(value.__json__())

    def _model(self, value: Any) -> bytes:
        try:
            dump = value.model_dump(mode="json")
        except ValueError as error:  # the base of pydantic's serialization and validation errors
            raise ConfigurationError(
                f"{self.where()} is of type {_type_name(value)}, which pydantic cannot dump in JSON mode ({error}), "
                f"so it has no canonical form: pass plain data in its place"
            ) from error
        return self.of(dump)

    def _dataclass(self, value: Any) -> bytes:
        fields = [field.name for field in dataclasses.fields(value) if field.compare]
        items = [delimited(b"s", text(name)) + self._at(_FIELD, name, getattr(value, name)) for name in fields]
        return b"c" + _class(value) + _counted(b"d", sorted(items))


def _counted(tag: bytes, forms: list[bytes]) -> bytes:
    return b"%b%d:%b" % (tag, len(forms), b"".join(forms))


def _class(value: object) -> bytes:
    return delimited(b"s", text(_type_name(value)))


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
