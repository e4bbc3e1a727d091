"""Chords on the Redis result backend: who sends the body, and how often a part is counted.

Since Celery 5.7, the worker that counts the last part of a chord takes a claim and sends the body. If it dies, the claim expires by itself.
A part that is stored while the claim exists changes nothing, so nobody would send the body. Therefore a part whose owner died is stored
again only after the claim is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery.app.task import Context
    from celery.backends.base import Backend
    from celery.result import AsyncResult

    from celery_idempotent.producer.guarded import Guarded

__all__ = ["add_part", "claimed_for"]

#: Celery's value in place of the claim after the body was sent.
_SENT = b"done"

#: Seconds until a backend that did not answer is asked again.
_ASK_AGAIN = 1.0


#: Count a part of a chord once, although the body that adds it may run again. Celery's own is a plain INCR.
_ADD_PART = """
if redis.call('SADD', KEYS[1], ARGV[1]) == 1 then
  redis.call('EXPIRE', KEYS[1], ARGV[2])
  redis.call('INCR', KEYS[2])
end
"""

#: Seconds for which added parts are remembered, if results never expire.
_REMEMBERED = 7 * 86400


def add_part(backend: Backend, group: str, part: AsyncResult[Any]) -> None:
    """Add a part to the size of a chord; repeating this for the same part changes nothing.

    Args:
        backend: The result backend, which counts the parts.
        group: The chord's group.
        part: The part, whose Celery id is the same each time.

    Raises:
        NotImplementedError: The backend has no such chords.

    Atomicity: one script. In ``.t``, Celery's Redis backend (5.5 to 5.7) keeps the number of added parts.
    """
    if type(backend).add_to_chord.__module__ != "celery.backends.redis":
        backend.add_to_chord(group, part)
        return
    keys = [backend.get_key_for_group(group, suffix) for suffix in (".added", ".t")]
    backend.client.eval(_ADD_PART, len(keys), *keys, part.id, int(backend.expires or _REMEMBERED))


def claimed_for(task: Guarded, request: Context) -> float:
    """Return the seconds for which another worker may still send the body of a request's chord.

    Returns:
        0 if no worker claims it, if the request is not part of a chord, or if the result backend has no such claims.
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
