"""Ids by a format string over the bound arguments: ``message_id="order:{order_id}"``."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.call_signature import Args, CallSignature, Kwargs
from celery_idempotent.message.check_id import MAX_BYTES, check_message_id
from celery_idempotent.message.plain import plain

__all__ = ["IdTemplate"]


class IdTemplate(string.Formatter):
    """Makes ids by a format string.

    Args:
        template: The format string; each field names a parameter.
        signature: The task's.

    Raises:
        ConfigurationError: It is no format string, or names no parameter of the task.
    """

    def __init__(self, template: str, signature: CallSignature) -> None:
        self._signature = signature
        self._template = template
        self._option = f"message_id={template!r}"
        #: What an id is whose every field is empty.
        self._empty = ""
        try:
            fields = list(_fields(template))
            for literal, _, specification, _ in string.Formatter().parse(template):
                self._check_width(specification or "")
                self._empty += literal
        except ValueError as error:
            raise ConfigurationError(f"{self._option} is not a format string: {error}") from None
        example = f"{{{next(iter(signature.parameters), 'order_id')}}}"
        if not fields:
            raise ConfigurationError(
                f"{self._option} names no argument of {signature.name}, so all calls would be one message: "
                f"name one, such as {example}; if all calls are meant to be one message, use a callable"
            )
        for name, conversion in fields:
            if not name or name.isdigit():
                raise ConfigurationError(
                    f"{self._option} has a positional field, {{{name}}}: name the parameter, such as {example}"
                )
            if conversion not in {None, "", "s", "r", "a"}:
                raise ConfigurationError(f"{self._option}: there is no conversion !{conversion}; use !s, !r or !a")
        signature.check_names((name for name, _ in fields), self._option)

    def __call__(self, args: Args, kwargs: Kwargs) -> str:
        """Return the id of a call with these arguments."""
        text = self.vformat(self._template, (), self._signature.names(args, kwargs))
        if text == self._empty:
            fields = [name for _, name, _, _ in string.Formatter().parse(self._template) if name is not None]
            raise ConfigurationError(
                f"{self._option}: {' and '.join(fields)} {'is' if len(fields) == 1 else 'are'} empty in this call, and unrelated calls would "
                f"become one message: give it, or use by_arguments(...) where an empty text is a value like another"
            )
        try:
            return check_message_id(text)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self._option}: {error}") from None

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Get a field's value as plain data; refuse one whose text identifies nothing."""
        try:
            found, first = super().get_field(field_name, args, kwargs)
            value = plain(object.__getattribute__(found, "_at"))
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{self._option}: {{{field_name}}} is not in the arguments of this call "
                f"({type(error).__name__}: {error})"
            ) from error
        if value is None:
            raise ConfigurationError(
                f"{self._option}: {field_name} is None in this call, so unrelated calls would become one message: "
                f"pass a value, or use by_arguments(...) if None is a value like any other"
            )
        if isinstance(value, (set, frozenset)) or _is_anonymous(value):
            raise ConfigurationError(
                f"{self._option}: the text of {field_name}, of type {type(value).__name__}, "
                f"differs between processes: use an attribute or an item of it, or by_arguments(...)"
            )
        return value, first

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Get an argument, so that the field's attributes and items can be looked up in it."""
        return _Place(super().get_value(key, args, kwargs))

    def format_field(self, value: Any, format_spec: str) -> str:
        """Format a value; refuse one that is too long for an id."""
        self._check_width(format_spec)
        if isinstance(value, Decimal) and value.is_finite() and abs(value.adjusted()) > MAX_BYTES and format_spec:
            raise ConfigurationError(
                f"{self._option}: {value} has more digits than the {MAX_BYTES} bytes that an id may have: leave out {format_spec!r}"
            )
        try:
            return str(format(value, format_spec))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{self._option}: {error}") from error

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Convert a value by ``!s``, ``!r`` or ``!a``."""
        try:
            return super().convert_field(value, conversion)
        except ValueError as error:  # an int too long for decimal text
            raise ConfigurationError(f"{self._option}: {error}") from error

    def _check_width(self, specification: str) -> None:
        """Refuse a width or precision longer than an id: a caller's value could ask for gigabytes."""
        for number in re.findall(r"\d+", specification):
            if len(number) > len(str(MAX_BYTES)) or int(number) > MAX_BYTES:
                raise ConfigurationError(
                    f"{self._option}: {number[:32]} in the format specification {specification[:64]!r} is more than the "
                    f"{MAX_BYTES} bytes that an id may have: use a smaller width or precision"
                )


class _Place:
    """A place in an argument. It finds the same value on both sides of the wire: a model arrives as a dict, an int key as text."""

    __slots__ = ("_at",)

    def __init__(self, value: Any) -> None:
        self._at = value

    def __getattribute__(self, name: str) -> _Place:
        value = object.__getattribute__(self, "_at")
        if isinstance(value, Mapping) and name in value:  # also where it is the name of a method, as `items`
            return _Place(value[name])
        return _Place(getattr(value, name))

    def __getitem__(self, name: int | str) -> _Place:
        value = object.__getattribute__(self, "_at")
        if isinstance(value, Mapping) and isinstance(name, int) and name not in value:
            return _Place(value[str(name)])
        if isinstance(name, str) and callable(getattr(type(value), "model_dump", None)):
            return _Place(getattr(value, name))
        return _Place(value[name])


def _fields(template: str) -> Iterator[tuple[str, str | None]]:
    """Yield the names and conversions of a format string's fields, including those inside format specifications."""
    for _, field, specification, conversion in string.Formatter().parse(template):
        if field is not None:
            yield re.split(r"[.\[]", field, maxsplit=1)[0], conversion
            yield from _fields(specification or "")


def _is_anonymous(value: object) -> bool:
    """Return whether a value's text is the default of ``object``, with a memory address."""
    kind = type(value)
    return (kind.__format__, kind.__str__, kind.__repr__) == (object.__format__, object.__str__, object.__repr__)
