"""Decide the id of a call: once, in its producer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery_idempotent.core.records import MessageKey
from celery_idempotent.message.call_signature import arguments_fingerprint
from celery_idempotent.message.canvas_ids import is_derived
from celery_idempotent.message.check_id import check_message_id

if TYPE_CHECKING:
    from celery_idempotent.options import Options

__all__ = ["identify"]


def identify(
    options: Options, args: Any, kwargs: Any, *, message_id: str | None, task_id: str, task_name: str
) -> tuple[MessageKey, str | None]:
    """Return the key and the fingerprint of a call.

    Args:
        options: The task's options.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        message_id: An id given with the call; it overrides the task's option.
        task_id: The Celery task id, used if there is no other id.
        task_name: The task.

    Raises:
        ConfigurationError: The id is not valid, or an argument has no canonical form.
        TypeError: The arguments do not fit the body's signature.
    """
    if message_id is not None:
        chosen = check_message_id(message_id)
    elif options.message_id is not None:
        chosen = check_message_id(options.message_id(tuple(args or ()), dict(kwargs or {})))
    else:
        chosen = check_message_id(task_id)
    # A derived id already includes the arguments. Those of a callback may be anything that its parent returns.
    known = (message_id is not None and not is_derived(message_id)) or options.message_id is not None
    wanted = known if options.fingerprint is None else options.fingerprint
    fingerprint = arguments_fingerprint(options.signature, tuple(args or ()), dict(kwargs or {})) if wanted else None
    return MessageKey(chosen, task_name), fingerprint
