"""The verbs of a run and its end: keep steps, checkpoint, complete, fail, retry, release, expire, abandon, cancel, forbid.

Each is a single script, fenced by the holder. It answers 1; or, if it wrote nothing, with the row as it stands, so that an ending that was
already written can be told from one that came too late.
"""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

from celery_idempotent.core.records import Claim, Holder, MessageKey, NewMessage, NoResultReason, Row
from celery_idempotent.core.storable import storable_error
from celery_idempotent.stores import took_effect
from celery_idempotent.stores.redis.layout import encoded
from celery_idempotent.stores.redis.rows import duration, fence, message_arguments, optional
from celery_idempotent.stores.redis.scripts import Script
from celery_idempotent.stores.redis.session import ScriptSession
from celery_idempotent.stores.redis.verbs import Verbs, ask, shows, verb, wrote

__all__ = ["Transitions"]

_CHECKPOINT = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not held(row, 2) then return tell(ident) end
move(ident, row, {processed_status = 'success', lease_expires_at = from(now, ARGV[5]) or nil})
write_big(ident, 'result', optional(ARGV[4]))
return 1
""")

_KEEP_STEPS = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not held(row, 2) then return 0 end
write_big(ident, 'steps', ARGV[4])
return 1
""")

_COMPLETE = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not held(row, 2) then
  -- No other run can have ended it so under this token.
  return row and row[ARGV[2]] == ARGV[3] and row.status == 'done' and row.processed_status == 'success' and 1 or 0
end
move(ident, row, ended('success', optional(ARGV[5]), ARGV[6]))
local result = optional(ARGV[4])
redis.call('HDEL', tag .. ':big:' .. ident, 'message', 'steps')
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
write_big(ident, 'result', false)
write_big(ident, 'message', message)
return 1
""")

# The broker has it again from now on: the time that it ran does not count as waiting.
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


class Transitions(Verbs):
    """The verbs that write how a run, or a message, ended."""

    @verb
    def checkpoint(self, on: ScriptSession, claim: Claim, *, result: bytes | None, lease: float | None = None) -> bool:
        return wrote(ask(on, _CHECKPOINT, claim.key, *fence(claim), optional(result), duration(lease)))

    @verb
    def keep_steps(self, on: ScriptSession, claim: Claim, *, steps: bytes) -> bool:
        return wrote(ask(on, _KEEP_STEPS, claim.key, *fence(claim), steps))

    @verb
    def complete(
        self,
        on: ScriptSession,
        claim: Claim,
        *,
        result: bytes | None,
        note: NoResultReason | None = None,
        unique_for: float | None = None,
    ) -> bool:
        ended = (optional(result), optional(note), duration(unique_for))
        return wrote(ask(on, _COMPLETE, claim.key, *fence(claim), *ended))

    @verb
    def fail(self, on: ScriptSession, holder: Holder, *, error: str, unique_for: float | None = None) -> bool:
        answer = ask(on, _FAIL, holder.key, *fence(holder), _error(error), duration(unique_for))
        if wrote(answer) or not (on.is_retry or isinstance(holder, Claim)):
            return wrote(answer)
        return shows(holder.key, answer, lambda row: took_effect.fail(row, holder, error=error))

    @verb
    def retry(self, on: ScriptSession, holder: Holder, message: NewMessage) -> bool:
        answer = ask(on, _RETRY, holder.key, *fence(holder), *message_arguments(message))
        return wrote(answer) or (
            on.is_retry and shows(holder.key, answer, lambda row: took_effect.retry(row, holder, message))
        )

    @verb
    def release(self, on: ScriptSession, holder: Holder) -> bool:
        answer = ask(on, _RELEASE, holder.key, *fence(holder))
        return wrote(answer) or (
            on.is_retry and shows(holder.key, answer, lambda row: took_effect.release(row, holder))
        )

    @verb
    def expire(self, on: ScriptSession, holder: Holder) -> bool:
        return wrote(ask(on, _EXPIRE, holder.key, *fence(holder)))

    @verb
    def abandon(self, on: ScriptSession, row: Row, *, error: str, unique_for: float | None = None) -> bool:
        processed = b"" if row.processed_status is None else row.processed_status.encode()
        answer = ask(on, _ABANDON, row.key, row.token, processed, _error(error), duration(unique_for))
        return wrote(answer) or (
            on.is_retry and shows(row.key, answer, lambda found: took_effect.abandon(found, row, error=error))
        )

    @verb
    def cancel(
        self, on: ScriptSession, key: MessageKey, *, task_id: str, error: str, unique_for: float | None = None
    ) -> bool:
        answer = ask(on, _CANCEL, key, encoded(task_id), _error(error), duration(unique_for))
        return wrote(answer) or (
            on.is_retry and shows(key, answer, lambda row: took_effect.cancel(row, task_id=task_id, error=error))
        )

    @verb
    def forbid(self, on: ScriptSession, row: Row, *, error: str) -> bool:
        return wrote(ask(on, _FORBID, row.key, row.token, _error(error)))


def _error(text: str) -> bytes:
    return storable_error(text).encode()
