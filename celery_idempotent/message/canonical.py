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

# Longer than most: the form is one table of types, specified in the docstring.

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag
from pathlib import PurePath, PureWindowsPath
from typing import Any
from uuid import UUID

from celery_idempotent.errors import ConfigurationError

__all__ = ["FORM", "canonical", "fingerprint", "plain"]

#: Version of the form. It is part of every digest, so a later form never matches this one.
FORM = b"celery-idempotent:1\n"

# How an error shows a step into a value.
_ITEM, _FIELD, _KEY, _ELEMENT = "[{!r}]", ".{}", ".keys()", "{{...}}"

#: Types whose values all have a form, so the walk need not record their place.
_LEAVES = frozenset((str, int, float, bool, type(None)))

#: A Decimal's text ends in up to this many zeros before it uses an exponent.
_ZEROS = 64

_MICROSECOND = timedelta(microseconds=1)


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


def plain(value: Any) -> Any:
    """Return what a value stands for, as plain data: values with equal canonical forms have equal text.

    Format strings are filled with it, so that both sides of the wire produce the same text. A ``StrEnum`` member
    becomes its value, a tuple a list, an aware ``datetime`` the same instant in UTC, and ``Decimal("1.00")``
    ``Decimal("1")``. A value without a canonical form is returned unchanged.

    Raises:
        RecursionError: The value contains itself.
    """
    match value:
        case None | bool():
            return value
        case str():
            return _text(value).decode("utf-8", "surrogatepass")
        case int():
            return int.__index__(value)
        case float():
            return float.__add__(value, 0.0)
        case list() | tuple():
            return [plain(item) for item in value]
        case dict():
            named = {_json_key(key): key for key in value}
            keys = named if len(named) == len(value) else {key: key for key in value}
            return {plain(name): plain(value[keys[name]]) for name in sorted(keys, key=str)}
    if hasattr(type(value), "__json__"):
        return plain(value.__json__())
    match value:
        case datetime():
            # Field by field, as in the form.
            wall = datetime.combine(date.fromordinal(value.toordinal()), time()) + _since_midnight(value)
            return _at_utc(wall, value.utcoffset())
        case date():
            return date.fromordinal(value.toordinal())
        case time():
            at = _at_utc(datetime(1970, 1, 2) + _since_midnight(value), value.utcoffset())  # noqa: DTZ001 - the zone is added there
            return at.timetz()
        case Decimal():
            return _plain_decimal(value)
        case bytes() | bytearray() | memoryview():
            return bytes(value)
    if callable(getattr(type(value), "model_dump", None)):
        return plain(value.model_dump(mode="json"))
    return value


def _at_utc(wall: datetime, offset: timedelta | None) -> datetime:
    if offset is None:
        return wall
    try:
        return (wall - offset).replace(tzinfo=UTC)
    except OverflowError:  # within a day of datetime.min or datetime.max
        return wall.replace(tzinfo=timezone(offset))


def _plain_decimal(value: Decimal) -> Decimal:
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        return Decimal(_decimal(value))
    places = len(digits) - len("".join(map(str, digits)).rstrip("0"))
    if places >= len(digits):
        return Decimal(0)
    significant, power = digits[: len(digits) - places], exponent + places
    if 0 < power <= _ZEROS:  # a hundred is 100, not 1E+2
        significant, power = significant + (0,) * power, 0
    return Decimal((sign, significant, power))


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
            return _delimited(b"s", _text(value))
        if isinstance(value, int):
            return _delimited(b"i", b"%x" % value)  # hex: decimal text is refused past 4300 digits
        if isinstance(value, float):
            return _delimited(b"f", float.__repr__(float(value) + 0.0).encode())  # + 0.0 turns -0.0 into 0.0
        if isinstance(value, (list, tuple)):
            return self._inside(value, self._list)
        if isinstance(value, dict):
            return self._inside(value, self._dict)
        if hasattr(type(value), "__json__"):
            return self._inside(value, self._reduced)
        scalar = _scalar(value)
        if scalar is not None:
            return scalar
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
        # Arguments are shown by their bare names.
        bare = kind == _ITEM and isinstance(key, str) and key.isidentifier()
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
        names: Sequence[object] = [_json_key(key) for key in value]
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
        return _delimited(b"s", _text(name)) if type(name) is str else self._at(_KEY, key, name)

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
        items = [_delimited(b"s", _text(name)) + self._at(_FIELD, name, getattr(value, name)) for name in fields]
        return b"c" + _class(value) + _counted(b"d", sorted(items))


def _scalar(value: object) -> bytes | None:
    """Return the form of a value that contains no others and is not native to JSON; ``None`` for any other value."""
    match value:
        case datetime():
            wall = timedelta(days=value.toordinal()) + _since_midnight(value)
            offset = value.utcoffset()
            return _delimited(b"d", _micros(wall)) if offset is None else _delimited(b"D", _micros(wall - offset))
        case date():
            return _delimited(b"y", b"%d" % value.toordinal())
        case time():
            wall = _since_midnight(value)
            offset = value.utcoffset()  # None for a zone that needs a date; its wall time is what JSON sends
            return _delimited(b"t", _micros(wall)) if offset is None else _delimited(b"Z", _micros(wall - offset))
        case Decimal():
            return _delimited(b"n", _decimal(value).encode())
        case UUID():
            return _delimited(b"u", value.bytes)
        case bytes() | bytearray() | memoryview():
            return _delimited(b"b", bytes(value))
        # kombu's JSON keeps the type of those above; those below need pickle.
        case Enum():
            return None
        case timedelta():
            return _delimited(b"P", _micros(value))
        case PurePath():
            return _delimited(b"W" if isinstance(value, PureWindowsPath) else b"p", _text(str(value)))
        case _:
            return None


def _delimited(tag: bytes, content: bytes) -> bytes:
    return b"%b%d:%b" % (tag, len(content), content)


def _counted(tag: bytes, forms: list[bytes]) -> bytes:
    return b"%b%d:%b" % (tag, len(forms), b"".join(forms))


def _text(value: str) -> bytes:
    try:
        return str.encode(value)
    except UnicodeEncodeError:
        # Lone surrogates stay as they are. JSON makes a pair of them one character.
        paired = str.encode(value, "utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return paired.encode("utf-8", "surrogatepass")


def _json_key(key: object) -> object:
    """Return a dict's key as the text that JSON turns it into, or else the key itself."""
    if isinstance(key, (int, float)) or key is None:
        try:
            return json.dumps(key)
        except ValueError:  # an int too long for decimal text, which JSON cannot carry
            return key
    return key


def _since_midnight(value: datetime | time) -> timedelta:
    # Field by field: subclasses of datetime (pandas, pendulum) have their own arithmetic.
    return timedelta(hours=value.hour, minutes=value.minute, seconds=value.second, microseconds=value.microsecond)


def _micros(value: timedelta) -> bytes:
    return b"%d" % (value // _MICROSECOND)


def _decimal(value: Decimal) -> str:
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        return "nan" if value.is_nan() else "-inf" if sign else "inf"
    # Not `normalize()`, which rounds to the precision of the thread's context.
    every = "".join(map(str, digits))
    significant = every.rstrip("0").lstrip("0")
    if not significant:
        return "0"
    return f"{'-' if sign else ''}{significant}e{exponent + len(every) - len(every.rstrip('0'))}"


def _class(value: object) -> bytes:
    return _delimited(b"s", _text(_type_name(value)))


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
