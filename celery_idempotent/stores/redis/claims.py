"""The consumer's verbs that begin and keep a run: claim, take over, renew."""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

from collections.abc import Callable, Sequence

from celery_idempotent.core.records import Claim, Claimed, Holder, NewMessage, NotClaimed, Row
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.stores import took_effect
from celery_idempotent.stores.batches import in_batches
from celery_idempotent.stores.redis.layout import encoded, identity
from celery_idempotent.stores.redis.rows import duration, fence, message_arguments, optional, row_of
from celery_idempotent.stores.redis.scripts import Script
from celery_idempotent.stores.redis.session import ScriptSession
from celery_idempotent.stores.redis.verbs import Verbs, ask, shows, verb, wrote

__all__ = ["Claims"]

#: How often a claim starts over because the row changed between two of its scripts. Each time another process made progress, so
#: this many in a row mean that something is wrong.
ROUNDS = 20

# The token; nothing for a message that is absent, or whose id is free again; or the row that stands in the way.
_CLAIM = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not row or is_free_for(row, ARGV[5], ARGV[8]) then return false end
local attempt, fingerprint = tonumber(ARGV[2]), optional(ARGV[3])
local waited = row.available_at and tonumber(row.available_at) <= now - tonumber(ARGV[7])
if row.status ~= 'pending'
    or not (tonumber(row.attempt or 0) <= attempt or waited)
    or (row.fingerprint and fingerprint and row.fingerprint ~= fingerprint) then
  return tell(ident)
end
local token = tonumber(row.token or 0) + 1
move(ident, row, {
  status = 'processing',
  worker = ARGV[4],
  ran_task_id = ARGV[5],
  lease_expires_at = from(now, ARGV[6]),
  token = at(token),
  attempt = attempt > tonumber(row.attempt or 0) and ARGV[2] or nil,
  processed_status = false,
  error = false,
  available_at = false,
  takeovers = false,
})
return token
""")

# The token, or the row that another process has made meanwhile.
_CLAIM_NEW = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if row and not is_free_for(row, ARGV[3], ARGV[5]) then return tell(ident) end
local token = tonumber(row and row.token or 0) + 1
local columns, message = new(6, now)
columns.status = 'processing'
columns.worker = ARGV[2]
columns.ran_task_id = ARGV[3]
columns.lease_expires_at = from(now, ARGV[4])
columns.available_at = false
columns.token = at(token)
begin(ident, row, columns, message)
return token
""")

_TAKE_OVER = Script("""
local ident, row = ARGV[1], read(ARGV[1])
-- A recovery point written since the row was read makes a rerun a replay.
if not (row and row.status == 'processing' and row.token == ARGV[2]
    and (row.processed_status or '') == ARGV[3] and lease_ran_out(row)) then
  return tell(ident)
end
move(ident, row, {
  worker = ARGV[4],
  ran_task_id = ARGV[5],
  lease_expires_at = from(now, ARGV[6]),
  attempt = tonumber(ARGV[7]) > tonumber(row.attempt or 0) and ARGV[7] or nil,
  token = at(tonumber(row.token) + 1),
  error = false,
  takeovers = at(tonumber(row.takeovers or 0) + 1),
})
return 1
""")

_RENEW = Script("""
local lease, answers = from(now, ARGV[1]), {}
for i = 1, #KEYS do
  tag = KEYS[i]
  local a = 2 + (i - 1) * 3
  local ident = ARGV[a]
  local row = read(ident)
  answers[i] = 0
  if held(row, a + 1) then
    answers[i] = 1
    if tonumber(row.lease_expires_at) <= tonumber(lease) then
      move(ident, row, {lease_expires_at = lease})
    end
  end
end
return answers
""")


class Claims(Verbs):
    """Grants claims and leases."""

    @verb
    def claim(
        self,
        on: ScriptSession,
        message: NewMessage,
        *,
        worker: str,
        lease: float,
        grace: float,
        adopt: Callable[[], NewMessage] | None = None,
    ) -> Claimed | NotClaimed:
        # One script for a message that was recorded, and another for one that was not.
        key = message.key
        ident = identity(key)
        who = (encoded(worker), encoded(message.task_id), duration(lease))
        first = optional(message.original_task_id)
        asked = (ident, message.attempt, optional(message.fingerprint), *who, duration(grace), first)
        whole: tuple[bytes, ...] | None = None
        for _ in range(ROUNDS):
            answer = on.call(_CLAIM, ident, *asked)
            if isinstance(answer, list):
                row = row_of(key, answer)
                if on.is_retry and took_effect.claim(row, worker=worker):
                    return Claimed(Claim(key, row.token))
                return NotClaimed(row)
            if answer is None:
                if whole is None:
                    whole = message_arguments(message if adopt is None else adopt())
                answer = on.call(_CLAIM_NEW, ident, ident, *who, first, *whole)
            if isinstance(answer, int):
                return Claimed(Claim(key, answer))
        raise StoreUnavailableError(f"message {key.message_id!r} could not be claimed: its row kept changing")

    @verb
    def take_over(
        self, on: ScriptSession, row: Row, *, task_id: str, worker: str, lease: float, attempt: int
    ) -> Claimed | None:
        processed = b"" if row.processed_status is None else row.processed_status.encode()
        who = (encoded(worker), encoded(task_id), duration(lease))
        answer = ask(on, _TAKE_OVER, row.key, row.token, processed, *who, attempt)
        taken = wrote(answer) or (
            on.is_retry and shows(row.key, answer, lambda found: took_effect.take_over(found, row, worker=worker))
        )
        return Claimed(Claim(row.key, row.token + 1)) if taken else None

    def renew(self, holders: Sequence[Holder], *, lease: float) -> list[Holder]:
        return [lost for some in in_batches(holders) for lost in self._renew_some(some, lease=lease)]

    @verb
    def _renew_some(self, on: ScriptSession, holders: Sequence[Holder], *, lease: float) -> list[Holder]:
        idents = [identity(holder.key) for holder in holders]
        items = [(ident, (ident, *fence(holder))) for ident, holder in zip(idents, holders, strict=True)]
        answers = on.call_all(_RENEW, [duration(lease)], items)
        return [holder for holder, kept in zip(holders, answers, strict=True) if not kept]
