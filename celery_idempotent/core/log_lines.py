"""Make each log record one line: an id can neither begin another line nor control a terminal; and make it safe to pickle.

A caller, or anyone who reaches the broker, may choose any text as an id. A newline in it would forge a line of the log. An escape code
would reach the reader's terminal. A line with a lone surrogate could not be written.

A handler that sends records to another process pickles them with their arguments. So a run or a message is logged as its text.
"""

from __future__ import annotations

import logging

__all__ = ["LOGGERS", "OneLine"]

#: Every logger of the library.
LOGGERS = ("celery_idempotent", "celery_idempotent.outcomes")


class OneLine(logging.Filter):
    """Escapes unprintable characters in a record's text, and turns our objects into text. Tracebacks keep their lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass."""
        if isinstance(record.args, tuple):
            record.args = tuple(str(each) if _is_ours(each) else each for each in record.args)
        text = record.getMessage()
        if not text.isprintable():
            # A printable record keeps its template, by which error collectors group.
            record.msg = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
            record.args = ()
        return True


def _is_ours(value: object) -> bool:
    return type(value).__module__.startswith("celery_idempotent.") and not isinstance(value, BaseException)


_FILTER = OneLine()
for _name in LOGGERS:
    logging.getLogger(_name).addFilter(_FILTER)
