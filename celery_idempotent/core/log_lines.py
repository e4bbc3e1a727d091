"""One record is one line in a log: an id cannot begin another line, nor control a terminal; and it can be sent to another process.

A caller may choose any text as an id, and so may anyone who reaches the broker. A newline in it would forge a line of the log. An escape code
would reach the reader's terminal. A lone surrogate would keep the line from being written.

A handler that sends records to another process pickles them with their arguments. So what is logged of a run or a message is its text.
"""

from __future__ import annotations

import logging

__all__ = ["LOGGERS", "OneLine"]

#: Every logger of the library.
LOGGERS = ("celery_idempotent", "celery_idempotent.outcomes")


class OneLine(logging.Filter):
    """Writes what is not printable in a record's text as escapes, and objects of ours as text. Tracebacks keep their lines."""

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
