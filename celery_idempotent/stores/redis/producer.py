"""The producer's verbs: record one or many, withdraw, resubmit, republish, count a duplicate.

Each takes the connection to work on. ``is_retry`` says that it is a repeat: an earlier attempt of the same call broke off with
its connection, and may have taken effect. A repeat that finds what that attempt would have written answers as if it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery_idempotent.core.records import Duplicate, Inserted, MessageKey, NewMessage, Row, Status
from celery_idempotent.stores.redis.connection import ScriptSession
from celery_idempotent.stores.redis.layout import encoded, identity
from celery_idempotent.stores.redis.rows import Argument, message_arguments, moment, row_of
from celery_idempotent.stores.redis.scripts import Script

__all__ = ["count_duplicate", "record", "record_all", "republish", "resubmit", "withdraw"]

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
  -- A row that started anew has a token that must outlive it: an old run may still hold it. So it becomes free again
  -- rather than absent.
  local columns = ended('failure', 'withdrawn: the message could not be published', '0')
  columns.lease_expires_at = nil
  move(ident, row, columns)
  write_big(ident, 'message', false)
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
redis.call('UNLINK', tag .. ':big:' .. ident)
if message then write_big(ident, 'message', message) end
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


def record(on: ScriptSession, message: NewMessage, *, is_retry: bool) -> Inserted | Duplicate:
    """Begin a row, or report the one that is there."""
    ident = identity(message.key)
    (answer,) = on.call(_RECORD, ident, b"", ident, 0, *message_arguments(message))
    return _recorded(message, answer, is_retry)


def record_all(on: ScriptSession, messages: Sequence[NewMessage], *, is_retry: bool) -> list[Inserted | Duplicate]:
    """Begin those that are new, in the order of the list."""
    idents = [identity(message.key) for message in messages]
    # A cluster has as many clocks as nodes: one of them tells the order.
    base = b"" if on.whole else on.call(_CLOCK, b"")
    items: list[tuple[bytes, tuple[Argument, ...]]] = [
        (ident, (ident, place, *message_arguments(message)))
        for place, (ident, message) in enumerate(zip(idents, messages, strict=True))
    ]
    answers = on.call_all(_RECORD, [base], items)
    recorded: list[Inserted | Duplicate] = []
    seen: set[MessageKey] = set()
    for message, answer in zip(messages, answers, strict=True):
        # One that this very list has twice was not there before.
        recorded.append(_recorded(message, answer, is_retry and message.key not in seen))
        seen.add(message.key)
    return recorded


def _recorded(message: NewMessage, answer: Any, is_retry: bool) -> Inserted | Duplicate:
    if answer == 1:
        return Inserted()
    row = row_of(message.key, answer)
    if is_retry and row.status is Status.PENDING and row.worker is None and row.task_id == message.task_id:
        return Inserted()
    return Duplicate(row)


def withdraw(on: ScriptSession, key: MessageKey, *, task_id: str, is_retry: bool) -> bool:
    """Delete a pending row that was never claimed; free its id if the row had an earlier life."""
    ident = identity(key)
    answer = on.call(_WITHDRAW, ident, ident, encoded(task_id))
    if answer == 1:
        return True
    if not is_retry:
        return False
    if answer is None:
        return True
    row = row_of(key, answer)
    return row.status is Status.DONE and row.expired and row.task_id == task_id


def resubmit(on: ScriptSession, row: Row, message: NewMessage, *, is_retry: bool) -> bool:
    """Failed to pending, by compare and set."""
    ident = identity(row.key)
    answer = on.call(_RESUBMIT, ident, ident, row.token, encoded(row.task_id), *message_arguments(message))
    if answer == 1:
        return True
    if not is_retry or answer is None:
        return False
    found = row_of(row.key, answer)
    expected = (Status.PENDING, row.token, message.task_id)
    return (found.status, found.token, found.task_id) == expected and found.worker is None


def republish(on: ScriptSession, row: Row, *, is_retry: bool) -> bool:
    """Write a new ``published_at``, by compare and set."""
    ident = identity(row.key)
    answer = on.call(_REPUBLISH, ident, ident, row.status.encode(), row.token, moment(row.published_at))
    if answer == 1:
        return True
    if not is_retry or answer is None:
        return False
    # Whether this call or another wrote it cannot be told; a message published twice is absorbed by its claim, one
    # that nobody publishes is lost.
    found = row_of(row.key, answer)
    return (found.status, found.token) == (row.status, row.token)


def count_duplicate(on: ScriptSession, key: MessageKey) -> None:
    """One more. Counted twice if a connection breaks off between the writing and the answer."""
    ident = identity(key)
    on.call(_COUNT_DUPLICATE, ident, ident)
