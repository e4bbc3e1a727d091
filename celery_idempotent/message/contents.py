"""What a row holds of a call, for people: its arguments and its result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from celery_idempotent.message.redaction import Redaction
from celery_idempotent.message.serialization import UndecodableError, decode_message, decode_result

if TYPE_CHECKING:
    from celery import Celery

    from celery_idempotent.core.records import Row

__all__ = ["contents_of"]

#: What a caller has arguments called in Celery's logs.
_REPRS = ("argsrepr", "kwargsrepr")


def contents_of(app: Celery, row: Row, redact: Sequence[str]) -> dict[str, Any]:
    """Return the arguments and the result of a message, as far as the app can read them.

    Args:
        app: The app that reads them.
        row: The row, with its message and its result.
        redact: Names of parameters and keys whose values are masked, as in the setting ``idempotent_redact``.

    Returns:
        ``args``, ``kwargs`` and ``result``, with the ``argsrepr`` and ``kwargsrepr`` that the caller gave;
        ``undecodable_message`` and ``undecodable_result`` say why one cannot be read.
    """
    redaction = Redaction(redact, app.tasks) if redact else None
    contents: dict[str, Any] = {}
    if row.message is not None:
        try:
            args, kwargs, options = decode_message(app, row.message)
        except UndecodableError as error:
            contents["undecodable_message"] = str(error)
        else:
            if redaction is not None:
                args, kwargs = redaction.call(row.key.task_name, args, kwargs)
            contents.update({name: options[name] for name in _REPRS if options.get(name)}, args=args, kwargs=kwargs)
    if row.result is not None:
        try:
            result = decode_result(app, row.result)
        except UndecodableError as error:
            contents["undecodable_result"] = str(error)
        else:
            contents["result"] = result if redaction is None else redaction.result(result)
    return contents
