"""Whose turn it is to send a chord's body.

Since Celery 5.7 the Redis backend lets one worker at a time count the last part of a chord and send the body: that worker takes a
claim, which runs out by itself should it die. Whoever stores a part meanwhile is told nothing, and the body is then sent by
nobody. So a part whose owner died is stored again only when that claim is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery.app.task import Context

    from celery_idempotent.task import IdempotentTask

__all__ = ["claimed_for"]

#: What Celery leaves in the place of the claim once the body was sent.
_SENT = b"done"

#: Seconds after which a backend that gave no answer is asked again.
_ASK_AGAIN = 1.0


def claimed_for(task: IdempotentTask, request: Context) -> float:
    """Seconds for which another worker may be about to send the body of a request's chord.

    Returns:
        0 when nobody is, when the request is no part of a chord, or when the result backend knows no such claim.
    """
    backend = task.backend
    if not (request.chord and request.group) or not hasattr(type(backend), "_chord_part_return_script"):
        return 0.0
    key = backend.get_key_for_group(request.group, ".c")
    try:
        with backend.client.pipeline() as pipeline:
            holder, left = pipeline.get(key).pttl(key).execute()
    except backend.connection_errors:
        return _ASK_AGAIN
    return 0.0 if holder in (None, _SENT, _SENT.decode()) else max(left, 0) / 1000
