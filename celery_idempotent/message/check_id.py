"""What a message id may be."""

from __future__ import annotations

from celery_idempotent.core.storable import check_plain
from celery_idempotent.errors import ConfigurationError

__all__ = ["MAX_BYTES", "check_message_id"]

#: Longest message id, in bytes of UTF-8: in AMQP the property is a short string, whose length is one byte.
MAX_BYTES = 255


def check_message_id(value: object) -> str:
    """Return the message id, if it can be one.

    A message id is any text from 1 to 255 bytes of UTF-8 without NUL. Blanks count, and so does case.

    Raises:
        ConfigurationError: It cannot; the text says why and what to do.
    """
    text = check_plain("message_id", value)
    if not text:
        raise ConfigurationError("a message_id cannot be empty: leave it out to use the task id")
    size = len(text) if text.isascii() else len(text.encode())
    if size > MAX_BYTES:
        raise ConfigurationError(
            f"message_id {text[:32]!r}... is {size} bytes long in UTF-8, and AMQP carries {MAX_BYTES}: "
            f"use a hash of the arguments, with message_id=by_arguments(...)"
        )
    return text
