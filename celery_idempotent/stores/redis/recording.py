"""The producer's verbs: record one or many, withdraw, resubmit, republish, count a duplicate."""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery_idempotent.core.records import Duplicate, Inserted, MessageKey, NewMessage, Row
from celery_idempotent.stores import took_effect
from celery_idempotent.stores.batches import in_batches
from celery_idempotent.stores.redis.layout import encoded, identity
from celery_idempotent.stores.redis.rows import Argument, message_arguments, moment, row_of
from celery_idempotent.stores.redis.scripts import Script
from celery_idempotent.stores.redis.session import ScriptSession
from celery_idempotent.stores.redis.verbs import Verbs, ask, shows, verb, wrote

__all__ = ["Recording"]

# By the clock of the server, or of the one that said `base`; and in the order of the list, although all at one moment.
_RECORD = Script("""
local base, answers = ARGV[1], {}
base = base == '' and now or tonumber(base)
for i = 1, #KEYS do
  tag = KEYS[i]
  local a = 2 + (i - 1) * 10
  local ident = ARGV[a]
  local row = read(ident)
  if row and not is_free(row) then
    answers[i] = tell(ident)
  else
    local columns, message = new(a + 2, base + tonumber(ARGV[a + 1]))
    begin(ident, row, columns, message)
    answers[i] = 1
  end
end
return answers
""")

_CLOCK = Script("return at(now)")

_WITHDRAW = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not (row and row.status == 'pending' and not row.worker and row.task_id == ARGV[2]) then return tell(ident) end
if not row.token then
  leave(ident, row)
  redis.call('UNLINK', tag .. ':row:' .. ident, tag .. ':big:' .. ident)
else
  -- A row that was started again keeps its token, which an old run may still hold. So it becomes free instead of being deleted.
  local columns = ended('failure', 'withdrawn: the message could not be published', '0')
  columns.lease_expires_at = nil
  move(ident, row, columns)
  write_big(ident, 'message', false)
  write_big(ident, 'steps', false)
end
return 1
""")

_RESUBMIT = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not (row and row.status == 'done' and row.processed_status == 'failure'
    and (row.token or '0') == ARGV[2] and row.task_id == ARGV[3]) then
  return tell(ident)
end
local columns, message = new(4, now)
columns.created_timestamp = nil
columns.processed_status = false
columns.processed_timestamp = false
columns.worker = false
columns.expires_at = false
columns.error = false
move(ident, row, columns)
write_big(ident, 'result', false)
write_big(ident, 'message', message)
return 1
""")

_REPUBLISH = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not (row and row.status == ARGV[2] and lease_ran_out(row)
    and (row.token or '0') == ARGV[3] and (row.published_at or '') == ARGV[4]) then
  return tell(ident)
end
-- Never the same value twice: it is compared and set, and any clock can be set back.
local published = row.published_at and math.max(now, tonumber(row.published_at) + 1) or now
move(ident, row, {published_at = at(published)})
return 1
""")

_COUNT_DUPLICATE = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if row then move(ident, row, {duplicates = at(tonumber(row.duplicates or 0) + 1)}) end
return 1
""")


class Recording(Verbs):
    """Records calls, and takes them back."""

    @verb
    def record(self, on: ScriptSession, message: NewMessage) -> Inserted | Duplicate:
        ident = identity(message.key)
        (answer,) = on.call(_RECORD, ident, b"", ident, 0, *message_arguments(message))
        return _recorded(message, answer, is_retry=on.is_retry)

    def record_all(self, messages: Sequence[NewMessage]) -> list[Inserted | Duplicate]:
        return [answer for some in in_batches(messages) for answer in self._record_some(some)]

    @verb
    def _record_some(self, on: ScriptSession, messages: Sequence[NewMessage]) -> list[Inserted | Duplicate]:
        idents = [identity(message.key) for message in messages]
        # The nodes of a cluster have a clock each. One of them sets the order.
        base = b"" if on.whole else on.call(_CLOCK, b"")
        items: list[tuple[bytes, tuple[Argument, ...]]] = [
            (ident, (ident, place, *message_arguments(message)))
            for place, (ident, message) in enumerate(zip(idents, messages, strict=True))
        ]
        answers = on.call_all(_RECORD, [base], items)
        recorded: list[Inserted | Duplicate] = []
        seen: set[MessageKey] = set()
        for message, answer in zip(messages, answers, strict=True):
            # If this list has a message twice, the second one finds the first.
            recorded.append(_recorded(message, answer, is_retry=on.is_retry and message.key not in seen))
            seen.add(message.key)
        return recorded

    @verb
    def withdraw(self, on: ScriptSession, key: MessageKey, *, task_id: str) -> bool:
        answer = ask(on, _WITHDRAW, key, encoded(task_id))
        if wrote(answer) or not on.is_retry:
            return wrote(answer)
        return took_effect.withdraw(None if answer is None else row_of(key, answer), task_id=task_id)

    @verb
    def resubmit(self, on: ScriptSession, row: Row, message: NewMessage) -> bool:
        answer = ask(on, _RESUBMIT, row.key, row.token, encoded(row.task_id), *message_arguments(message))
        return wrote(answer) or (
            on.is_retry and shows(row.key, answer, lambda found: took_effect.resubmit(found, row, message))
        )

    @verb
    def republish(self, on: ScriptSession, row: Row) -> bool:
        answer = ask(on, _REPUBLISH, row.key, row.status.encode(), row.token, moment(row.published_at))
        return wrote(answer) or (
            on.is_retry and shows(row.key, answer, lambda found: took_effect.republish(found, row))
        )

    @verb
    def count_duplicate(self, on: ScriptSession, key: MessageKey) -> None:
        # Counted twice if the connection breaks after the server has counted.
        ask(on, _COUNT_DUPLICATE, key)


def _recorded(message: NewMessage, answer: Any, *, is_retry: bool) -> Inserted | Duplicate:
    if wrote(answer):
        return Inserted()
    row = row_of(message.key, answer)
    return Inserted() if is_retry and took_effect.record(row, message) else Duplicate(row)
