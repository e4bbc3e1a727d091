"""Compute the canonical form of a value that contains no others; see :mod:`celery_idempotent.message.canonical`."""

from __future__ import annotations

import json
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath, PureWindowsPath
from uuid import UUID

__all__ = ["decimal_text", "delimited", "json_key", "scalar", "since_midnight", "text"]

_MICROSECOND = timedelta(microseconds=1)


def scalar(value: object) -> bytes | None:
    """Return the form of a value that contains no others and is not native to JSON; ``None`` for any other value."""
    match value:
        case datetime():
            wall = timedelta(days=value.toordinal()) + since_midnight(value)
            offset = value.utcoffset()
            return delimited(b"d", _micros(wall)) if offset is None else delimited(b"D", _micros(wall - offset))
        case date():
            return delimited(b"y", b"%d" % value.toordinal())
        case time():
            wall = since_midnight(value)
            offset = value.utcoffset()  # None for a zone that needs a date; its wall time is what JSON sends
            return delimited(b"t", _micros(wall)) if offset is None else delimited(b"Z", _micros(wall - offset))
        case Decimal():
            return delimited(b"n", decimal_text(value).encode())
        case UUID():
            return delimited(b"u", value.bytes)
        case bytes() | bytearray() | memoryview():
            return delimited(b"b", bytes(value))
        # kombu's JSON keeps the type of those above; those below need pickle.
        case Enum():
            return None
        case timedelta():
            return delimited(b"P", _micros(value))
        case PurePath():
            return delimited(b"W" if isinstance(value, PureWindowsPath) else b"p", text(str(value)))
        case _:
            return None


def delimited(tag: bytes, content: bytes) -> bytes:
    """Return a form: its type, its length and its content."""
    return b"%b%d:%b" % (tag, len(content), content)


def text(value: str) -> bytes:
    """Return a text in UTF-8, as it is after JSON has carried it."""
    try:
        return str.encode(value)
    except UnicodeEncodeError:
        # Lone surrogates stay as they are. JSON makes a pair of them one character.
        paired = str.encode(value, "utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return paired.encode("utf-8", "surrogatepass")


def json_key(key: object) -> object:
    """Return a dict's key as the text that JSON turns it into, or else the key itself."""
    if isinstance(key, (int, float)) or key is None:
        try:
            return json.dumps(key)
        except ValueError:  # an int too long for decimal text, which JSON cannot carry
            return key
    return key


def since_midnight(value: datetime | time) -> timedelta:
    """Return the wall time as a duration."""
    # Field by field: subclasses of datetime (pandas, pendulum) have their own arithmetic.
    return timedelta(hours=value.hour, minutes=value.minute, seconds=value.second, microseconds=value.microsecond)


def _micros(value: timedelta) -> bytes:
    return b"%d" % (value // _MICROSECOND)


def decimal_text(value: Decimal) -> str:
    """Return one text for all Decimals of the same number."""
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        return "nan" if value.is_nan() else "-inf" if sign else "inf"
    # Not `normalize()`, which rounds to the precision of the thread's context.
    every = "".join(map(str, digits))
    significant = every.rstrip("0").lstrip("0")
    if not significant:
        return "0"
    return f"{'-' if sign else ''}{significant}e{exponent + len(every) - len(every.rstrip('0'))}"
