"""Check that every store can keep an id, a name or a number, before any store is asked.

Anyone who reaches the broker can put any id, header or number on a message. Databases refuse some of them, and a refusal looks like an
outage of the store: the message would be held again and again.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from celery_idempotent.errors import ConfigurationError

__all__ = [
    "FINGERPRINT",
    "LONGEST",
    "MOST",
    "check_number",
    "check_plain",
    "check_text",
    "in_ascii",
    "is_text",
    "storable_error",
]

#: The most characters in an id or a name, by the columns' width.
LONGEST = 255

#: Characters of a fingerprint: a SHA-256 in hexadecimal.
FINGERPRINT = 64

#: The largest number of a 32-bit column.
MOST = 2**31 - 1

#: The most characters of a refused value that its error shows.
_SHOWN = 64


def check_text(what: str, value: object, *, longest: int = LONGEST) -> str:
    """Return the value as text that every store can keep.

    Args:
        what: What it is, for the error.
        value: An id or a name.
        longest: Characters that it may have.

    Raises:
        ConfigurationError: As for :func:`check_plain`, or it is longer.
    """
    if type(value) is str and value.isascii() and len(value) <= longest and "\0" not in value:
        return value  # nearly every one, and every message has several
    text = check_plain(what, value)
    if len(text) > longest:
        raise ConfigurationError(
            f"{what} {_shown(text)} has {len(text)} characters, and {longest} are kept: use a shorter one"
        )
    return text


def check_plain(what: str, value: object) -> str:
    """Return the value as text that every store can keep, if it is not too long.

    Raises:
        ConfigurationError: It is no text, or has a NUL or a lone surrogate.
    """
    if not isinstance(value, str):
        raise ConfigurationError(
            f"{what} is text, not {_shown(value)} of type {type(value).__name__}: convert it to str"
        )
    text = str.__str__(value)  # the value of a member of a str enum, whose own __str__ gives its name
    if "\0" in text:
        raise ConfigurationError(
            f"{what} {_shown(text)} contains a NUL character, which databases do not store: leave it out"
        )
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigurationError(
            f"{what} {_shown(text)} contains a lone surrogate, which is not valid text: decode its source without surrogateescape"
        )
    return text


def is_text(value: object, *, longest: int = LONGEST) -> TypeGuard[str]:
    """Return whether every store can keep the value as text."""
    if not isinstance(value, str):
        return False
    try:
        check_text("", value, longest=longest)
    except ConfigurationError:
        return False
    return True


def check_number(what: str, value: object) -> int:
    """Return the value as a number that every store can keep.

    Raises:
        ConfigurationError: It is no whole number from 0 to 2,147,483,647.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
        raise ConfigurationError(
            f"{what} is a whole number from 0 to {MOST}, not {_shown(value)}: correct it where the message is sent"
        )
    return value


def storable_error(text: str) -> str:
    """Return the text of an error with NULs (refused by PostgreSQL) and lone surrogates (not UTF-8) as backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def in_ascii(text: str) -> str:
    """Return the text with all but ASCII as backslash escapes, for a database that lacks its characters."""
    return storable_error(text).encode("ascii", "backslashreplace").decode()


def _shown(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
