"""The verbs that end or hand on a run: checkpoint, complete, fail, retry, release, expire, abandon, cancel.

As in :mod:`~celery_idempotent.stores.redis.producer`, each takes the connection, and ``is_retry`` says that it is a repeat. Every
one is a single script fenced by the holder, which answers 1 or, where it wrote nothing, with the row as it stands: by it an ending
that was already written is told from one that came too late.
"""

from __future__ import annotations

from typing import Any

from celery_idempotent.core.records import (
    Claim,
    Holder,
    MessageKey,
    NewMessage,
    NoResultReason,
    Owner,
    ProcessedStatus,
    Row,
    Status,
)
from celery_idempotent.stores.redis.connection import ScriptSession
from celery_idempotent.stores.redis.layout import encoded, identity
from celery_idempotent.stores.redis.rows import (
    duration,
    fence,
    held_by,
    message_arguments,
    optional,
    row_of,
    storable,
)
from celery_idempotent.stores.redis.scripts import Script

__all__ = ["abandon", "cancel", "checkpoint", "complete", "expire", "fail", "forbid", "release", "retry"]

_CHECKPOINT = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not held(row, 2) then return tell(ident) end
move(ident, row, {processed_status = 'success', lease_expires_at = from(now, ARGV[5]) or nil})
write_big(ident, 'result', optional(ARGV[4]))
return 1
""")

_COMPLETE = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not held(row, 2) then
  -- Nobody else can have ended it so under this token.
  return row and row[ARGV[2]] == ARGV[3] and row.status == 'done' and row.processed_status == 'success' and 1 or 0
end
move(ident, row, ended('success', optional(ARGV[5]), ARGV[6]))
local result = optional(ARGV[4])
write_big(ident, 'message', false)
if result then write_big(ident, 'result', result) end
return 1
""")

_FAIL = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not held_for_ending(row, 2) then return tell(ident) end
move(ident, row, ended('failure', ARGV[4], ARGV[5]))
write_big(ident, 'result', false)
return 1
""")

# Back to pending. The worker stays: null would mean that the message was never claimed.
_RETRY = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not held_for_ending(row, 2) then return tell(ident) end
local next, message = new(4, now)
move(ident, row, {
  status = 'pending',
  processed_status = false,
  lease_expires_at = false,
  attempt = next.attempt,
  fingerprint = next.fingerprint,
  queue = next.queue,
  available_at = next.available_at,
  published_at = next.published_at,
})
redis.call('UNLINK', tag .. ':big:' .. ident)
if message then write_big(ident, 'message', message) end
return 1
""")

# The broker has it again as of now: how long it has been waiting does not count the time it ran.
_RELEASE = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not held_for_ending(row, 2) then return tell(ident) end
move(ident, row, {status = 'pending', processed_status = false, lease_expires_at = false, published_at = at(now)})
write_big(ident, 'result', false)
return 1
""")

_EXPIRE = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not held(row, 2) then return 0 end
move(ident, row, {lease_expires_at = at(now)})
return 1
""")

_ABANDON = Script("""
local ident, row = ARGV[1], read(ARGV[1])
-- A recovery point written since the row was read is not to be lost.
if not (row and row.status == 'processing' and row.token == ARGV[2]
    and (row.processed_status or '') == ARGV[3] and lease_ran_out(row)) then
  return tell(ident)
end
move(ident, row, ended('failure', ARGV[4], ARGV[5]))
write_big(ident, 'result', false)
return 1
""")

_CANCEL = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not (row and row.status == 'pending' and row.task_id == ARGV[2]) then return tell(ident) end
move(ident, row, ended('failure', ARGV[3], ARGV[4]))
write_big(ident, 'result', false)
return 1
""")


_FORBID = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not (row and row.status == 'processing' and row.token == ARGV[2] and not row.processed_status) then return 0 end
move(ident, row, {error = ARGV[3]})
return 1
""")


def checkpoint(on: ScriptSession, claim: Claim, *, result: bytes | None, lease: float | None) -> bool:
    """Write the recovery point; written a second time it is the same."""
    ident = identity(claim.key)
    return _wrote(on.call(_CHECKPOINT, ident, ident, *fence(claim), optional(result), duration(lease)))


def complete(
    on: ScriptSession, claim: Claim, *, result: bytes | None, note: NoResultReason | None, unique_for: float | None
) -> bool:
    """Done, success."""
    ident = identity(claim.key)
    return _wrote(
        on.call(_COMPLETE, ident, ident, *fence(claim), optional(result), optional(note), duration(unique_for))
    )


def fail(on: ScriptSession, holder: Holder, *, error: str, unique_for: float | None, is_retry: bool) -> bool:
    """Done, failure."""
    ident, text = identity(holder.key), storable(error)
    answer = on.call(_FAIL, ident, ident, *fence(holder), text, duration(unique_for))
    if _wrote(answer) or (isinstance(holder, Owner) and not is_retry):
        return _wrote(answer)
    # An owner that was found dead and abandoned ends so too, under the same token: the error tells them apart.
    row = _row(holder.key, answer)
    return row is not None and held_by(row, holder) and _failed(row, text)


def retry(on: ScriptSession, holder: Holder, message: NewMessage, *, is_retry: bool) -> bool:
    """Back to pending, for the next attempt."""
    ident = identity(holder.key)
    answer = on.call(_RETRY, ident, ident, *fence(holder), *message_arguments(message))
    if _wrote(answer) or not is_retry:
        return _wrote(answer)
    row = _row(holder.key, answer)
    return row is not None and held_by(row, holder) and (row.status, row.attempt) == (Status.PENDING, message.attempt)


def release(on: ScriptSession, holder: Holder, *, is_retry: bool) -> bool:
    """Back to pending, for the same attempt."""
    ident = identity(holder.key)
    answer = on.call(_RELEASE, ident, ident, *fence(holder))
    if _wrote(answer) or not is_retry:
        return _wrote(answer)
    row = _row(holder.key, answer)
    return row is not None and held_by(row, holder) and row.status is Status.PENDING


def expire(on: ScriptSession, holder: Holder) -> bool:
    """End the lease now."""
    ident = identity(holder.key)
    return _wrote(on.call(_EXPIRE, ident, ident, *fence(holder)))


def abandon(on: ScriptSession, row: Row, *, error: str, unique_for: float | None, is_retry: bool) -> bool:
    """Done, failure, on behalf of an owner whose lease ran out."""
    ident, text = identity(row.key), storable(error)
    processed = b"" if row.processed_status is None else row.processed_status.encode()
    answer = on.call(_ABANDON, ident, ident, row.token, processed, text, duration(unique_for))
    if _wrote(answer) or not is_retry:
        return _wrote(answer)
    found = _row(row.key, answer)
    return found is not None and found.token == row.token and _failed(found, text)


def cancel(
    on: ScriptSession, key: MessageKey, *, task_id: str, error: str, unique_for: float | None, is_retry: bool
) -> bool:
    """Done, failure, without having run."""
    ident, text = identity(key), storable(error)
    answer = on.call(_CANCEL, ident, ident, encoded(task_id), text, duration(unique_for))
    if _wrote(answer) or not is_retry:
        return _wrote(answer)
    found = _row(key, answer)
    return found is not None and found.task_id == task_id and _failed(found, text)


def forbid(on: ScriptSession, row: Row, *, error: str) -> bool:
    """Not to run again."""
    ident = identity(row.key)
    return _wrote(on.call(_FORBID, ident, ident, row.token, storable(error)))


def _wrote(answer: Any) -> bool:
    return isinstance(answer, int) and answer == 1


def _row(key: MessageKey, answer: Any) -> Row | None:
    return None if answer is None else row_of(key, answer)


def _failed(row: Row, error: bytes) -> bool:
    failed = row.status is Status.DONE and row.processed_status is ProcessedStatus.FAILURE
    return failed and row.error is not None and storable(row.error) == error
