"""Whose turn it is to send a chord's body.

Since Celery 5.7 the Redis backend lets one worker at a time count the last part of a chord and send the body: that worker takes a
claim, which runs out by itself should it die. Whoever stores a part meanwhile is told nothing, and the body is then sent by
nobody. So a part whose owner died is stored again only when that claim is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery.app.task import Context
    from celery.backends.base import Backend
    from celery.result import AsyncResult

    from celery_idempotent.producer.guarded import Guarded

__all__ = ["add_part", "claimed_for"]

#: What Celery leaves in the place of the claim once the body was sent.
_SENT = b"done"

#: Seconds after which a backend that gave no answer is asked again.
_ASK_AGAIN = 1.0


#: Counts a part of a chord, unless it was counted: a body that adds it may run again. Celery's own is a mere INCR.
_ADD_PART = """
if redis.call('SADD', KEYS[1], ARGV[1]) == 1 then
  redis.call('EXPIRE', KEYS[1], ARGV[2])
  redis.call('INCR', KEYS[2])
end
"""

#: Seconds for which the parts are remembered that were added to a chord, where results are kept for ever.
_REMEMBERED = 7 * 86400


def add_part(backend: Backend, group: str, part: AsyncResult[Any]) -> None:
    """Add a part to the size of a chord, once however often it is asked for.

    Args:
        backend: The result backend, which counts the parts.
        group: The chord's group.
        part: The part, whose Celery id is the same each time.

    Raises:
        NotImplementedError: The backend has no such chords.

    Atomicity: one script. ``.t`` is where Celery's Redis backend (5.5 to 5.7) keeps what was added to the size of a chord.
    """
    if type(backend).add_to_chord.__module__ != "celery.backends.redis":
        backend.add_to_chord(group, part)
        return
    keys = [backend.get_key_for_group(group, suffix) for suffix in (".added", ".t")]
    backend.client.eval(_ADD_PART, len(keys), *keys, part.id, int(backend.expires or _REMEMBERED))


def claimed_for(task: Guarded, request: Context) -> float:
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
