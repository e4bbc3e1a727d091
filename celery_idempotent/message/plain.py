"""Return what a value stands for, as plain data, to fill the format strings of message ids with."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

from celery_idempotent.message.scalars import decimal_text, json_key, since_midnight, text

__all__ = ["plain"]

#: A Decimal's text ends in up to this many zeros before it uses an exponent.
_ZEROS = 64


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
            return text(value).decode("utf-8", "surrogatepass")
        case int():
            return int.__index__(value)
        case float():
            return float.__add__(value, 0.0)
        case list() | tuple():
            return [plain(item) for item in value]
        case dict():
            named = {json_key(key): key for key in value}
            keys = named if len(named) == len(value) else {key: key for key in value}
            return {plain(name): plain(value[keys[name]]) for name in sorted(keys, key=str)}
    if hasattr(type(value), "__json__"):
        return plain(value.__json__())
    match value:
        case datetime():
            # Field by field, as in the form.
            wall = datetime.combine(date.fromordinal(value.toordinal()), time()) + since_midnight(value)
            return _at_utc(wall, value.utcoffset())
        case date():
            return date.fromordinal(value.toordinal())
        case time():
            at = _at_utc(datetime(1970, 1, 2) + since_midnight(value), value.utcoffset())  # noqa: DTZ001 - the zone is added there
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
        return Decimal(decimal_text(value))
    places = len(digits) - len("".join(map(str, digits)).rstrip("0"))
    if places >= len(digits):
        return Decimal(0)
    significant, power = digits[: len(digits) - places], exponent + places
    if 0 < power <= _ZEROS:  # a hundred is 100, not 1E+2
        significant, power = significant + (0,) * power, 0
    return Decimal((sign, significant, power))
