"""What a parameter stands for that a call leaves out."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.canonical import canonical
from celery_idempotent.message.exclusion import Exclusion

__all__ = ["Default", "is_optional"]


def is_optional(parameter: inspect.Parameter) -> bool:
    """Return whether a call may leave a parameter out."""
    return parameter.default is not parameter.empty or parameter.kind in {
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    }


class Default:
    """The value of a parameter that a call leaves out.

    Args:
        name: The parameter.
        value: The value.
    """

    __slots__ = ("_form", "_name", "_value")

    def __init__(self, name: str, value: Any) -> None:
        self._name = name
        self._value = value
        self._form: bytes | None = None
        with suppress(ConfigurationError):  # a sentinel, equal to nothing but itself
            self._form = canonical({self._name: self._value})

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> Default:
        """Return the default of a parameter that has one."""
        if parameter.kind is parameter.VAR_POSITIONAL:
            return cls(parameter.name, ())
        return cls(parameter.name, {} if parameter.kind is parameter.VAR_KEYWORD else parameter.default)

    def without(self, excluded: Exclusion) -> Default:
        """Return it without what does not count."""
        value = excluded.without({self._name: self._value}, {self._name: self._value}).get(self._name, self._value)
        return Default(self._name, value)

    def equals(self, value: Any) -> bool:
        """Return whether a call that gives this value is the same as one that leaves it out."""
        if value is self._value:
            return True
        # Compare forms, since there True is not 1. Include the name, so that an error says where.
        return self._form is not None and canonical({self._name: value}) == self._form
