"""One record is one line in a log: what an id holds cannot begin another, nor speak to a terminal.

An id is any text that a caller, or whoever reaches the broker, may choose. A newline in it would forge a line of the log, an escape code
would reach the terminal of whoever reads it, and a lone surrogate would keep the line from being written.
"""

from __future__ import annotations

import logging

__all__ = ["LOGGERS", "OneLine"]

#: Every logger of the library.
LOGGERS = ("celery_idempotent", "celery_idempotent.outcomes")


class OneLine(logging.Filter):
    """Writes what is not printable in the text of a record as escapes; tracebacks, which have lines of their own, stay."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass."""
        text = record.getMessage()
        if not text.isprintable():
            # A record whose text is as it should be keeps its template, by which collectors of errors group.
            record.msg = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
            record.args = ()
        return True


_FILTER = OneLine()
for _name in LOGGERS:
    logging.getLogger(_name).addFilter(_FILTER)
