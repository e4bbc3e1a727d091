"""What a row holds of a call, for people: its arguments, its result and its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from celery_idempotent.message.kept_steps import unpack_steps
from celery_idempotent.message.redaction import Redaction
from celery_idempotent.message.serialization import UndecodableError, decode_message, decode_result

if TYPE_CHECKING:
    from celery import Celery

    from celery_idempotent.core.records import Row

__all__ = ["contents_of"]

#: What a caller has arguments called in Celery's logs.
_REPRS = ("argsrepr", "kwargsrepr")


def contents_of(app: Celery, row: Row, redact: Sequence[str]) -> dict[str, Any]:
    """Return the arguments, the result and the steps of a message, as far as the app can read them.

    Args:
        app: The app that reads them.
        row: The row, with its message, its result and its steps.
        redact: Names of parameters and keys whose values are masked, as in the setting ``idempotent_redact``.

    Returns:
        ``args``, ``kwargs`` and ``result``, with the ``argsrepr`` and ``kwargsrepr`` that the caller gave; ``steps`` by their names, each with
        its ``key`` and its ``result``. ``undecodable_message``, ``undecodable_result`` and ``undecodable_steps`` say why one cannot be read.
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
    if row.steps is not None:
        try:
            kept = [(step, step.value(app)) for step in unpack_steps(row.steps)]
        except UndecodableError as error:
            contents["undecodable_steps"] = str(error)
        else:
            contents["steps"] = {
                step.name: {
                    "key": step.key,
                    "result": value if redaction is None else redaction.result(value, name=step.name),
                }
                for step, value in kept
            }
    return contents
