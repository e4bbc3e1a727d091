"""The verbs that only read: a row, rows, counts; and what ran lately.

There is no index by task or by the moment of recording. So ``rows`` and ``counts`` look at every row, some hundreds at a time: it takes a
while in a large log, and holds up no other client. They are no snapshot: a row that changes meanwhile is seen as it was before or as it is
after. They read the indexes in the order in which rows move through them, so that a row that moves on is not missed.
"""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

import fnmatch
import heapq
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from celery_idempotent.core.records import FORGOTTEN, MessageKey, ProcessedStatus, Row, RowFilter, Status, TaskCount
from celery_idempotent.stores.batches import in_batches
from celery_idempotent.stores.faults import statuses_of
from celery_idempotent.stores.redis.layout import SHARDS, identity, key_of
from celery_idempotent.stores.redis.recovering import fetch, first_of_all
from celery_idempotent.stores.redis.rows import row_of
from celery_idempotent.stores.redis.scripts import Script
from celery_idempotent.stores.redis.session import ScriptSession
from celery_idempotent.stores.redis.verbs import Verbs, ask, verb

__all__ = ["Reading"]

_FIND = Script("return tell(ARGV[1])")

_FETCH_SMALL = Script("""
local answers = {}
for i = 1, #KEYS do
  local flat = redis.call('HGETALL', KEYS[i] .. ':row:' .. ARGV[i])
  answers[i] = #flat > 0 and {at(now), flat, {}}
end
return answers
""")

_RUNNING = Script("return redis.call('ZREVRANGE', tag .. ':running', 0, ARGV[1] - 1, 'WITHSCORES')")
_RECENT = Script("return redis.call('ZREVRANGE', tag .. ':recent', 0, ARGV[1] - 1, 'WITHSCORES')")

_QUEUES = Script("return redis.call('SMEMBERS', tag .. ':queues')")

# Where to go on; and of each row its identity, both statuses, its duplicates, when it was recorded, its age, its error.
_LOOK = Script("""
local found = redis.call('ZSCAN', tag .. ARGV[1], ARGV[2], 'COUNT', 500)
local looked = {}
for i = 1, #found[2], 2 do
  local ident = found[2][i]
  local row = redis.call('HMGET', tag .. ':row:' .. ident,
    'status', 'processed_status', 'duplicates', 'created_timestamp', 'processed_timestamp', 'error', 'queue')
  if row[1] then
    local since = tonumber(row[5] or row[4] or 0)
    looked[#looked + 1] = {ident, row[1], row[2] or '', row[3] or '0', row[4] or '0', at(now - since), row[6] or '',
      row[7] and '=' .. row[7] or ''}
  end
end
return {found[1], looked}
""")

#: The indexes that rows of a status are in; pending ones besides in those of the queues.
_INDEXES = {Status.PENDING: (b":unsent",), Status.PROCESSING: (b":running",), Status.DONE: (b":kept", b":done")}


class Reading(Verbs):
    """Finds rows, lists them and counts them."""

    @verb
    def find(self, on: ScriptSession, key: MessageKey) -> Row | None:
        answer = ask(on, _FIND, key)
        return None if answer is None else row_of(key, answer)

    def find_all(self, keys: Collection[MessageKey]) -> list[Row]:
        return [row for some in in_batches(keys) for row in self._find_some(some)]

    @verb
    def _find_some(self, on: ScriptSession, keys: Sequence[MessageKey]) -> list[Row]:
        return fetch(on, [identity(key) for key in keys], _FETCH_SMALL)

    @verb
    def rows(self, on: ScriptSession, where: RowFilter) -> Iterator[Row]:
        matches_id, matches_task, matches_queue, matches_error = map(
            _matches, (where.message_id, where.task_name, where.queue, where.error)
        )
        chosen: dict[bytes, int] = {}
        for seen in _look(on, where.status):
            key = key_of(seen.ident)
            if (
                matches_id(key.message_id)
                and matches_task(key.task_name)
                and where.status in {None, seen.status}
                and (
                    where.processed_status is None
                    or (where.processed_status is seen.processed_status and seen.error != FORGOTTEN)
                )
                and (where.older_than is None or seen.age >= where.older_than)
                and (where.newer_than is None or seen.age < where.newer_than)
                and (where.queue is None or (seen.queue is not None and matches_queue(seen.queue)))
                and (where.error is None or (seen.error is not None and matches_error(seen.error)))
            ):
                chosen[seen.ident] = seen.created
                if len(chosen) >= 2 * where.limit + 1000:
                    chosen = dict(_first(chosen, where))
        return iter(fetch(on, [ident for ident, _ in _first(chosen, where)], _FETCH_SMALL))

    @verb
    def newest(self, on: ScriptSession, *, limit: int) -> list[Row]:
        # Of those that run the ones whose leases last longest: they were claimed or renewed last.
        running = fetch(on, first_of_all(on, _RUNNING, limit, limit=limit, last=True), _FETCH_SMALL)
        ended = fetch(on, first_of_all(on, _RECENT, limit, limit=limit, last=True), _FETCH_SMALL)
        claimed = {row.key: row for row in (*running, *ended) if row.worker is not None}
        return sorted(claimed.values(), key=lambda row: row.created_timestamp, reverse=True)

    @verb
    def counts(self, on: ScriptSession) -> list[TaskCount]:
        rows: Counter[tuple[str, Status, ProcessedStatus | None]] = Counter()
        duplicates: Counter[tuple[str, Status, ProcessedStatus | None]] = Counter()
        for seen in _look(on, None):
            if seen.error == FORGOTTEN:
                continue
            kind = (key_of(seen.ident).task_name, seen.status, seen.processed_status)
            rows[kind] += 1
            duplicates[kind] += seen.duplicates
        counts = [TaskCount(*kind, rows=number, duplicates=duplicates[kind]) for kind, number in rows.items()]
        return sorted(counts, key=lambda count: (count.task_name, count.status, count.processed_status or ""))


@dataclass(frozen=True, slots=True)
class _Seen:
    """A row as a scan sees it; its age in seconds."""

    ident: bytes
    status: Status
    processed_status: ProcessedStatus | None
    duplicates: int
    created: int
    age: float
    error: str | None
    queue: str | None


def _look(on: ScriptSession, status: Status | None) -> Iterator[_Seen]:
    """Every row of a status, or at all, a few hundred at a time."""
    for shard in range(SHARDS):
        indexes: list[bytes] = []
        for each in Status if status is None else (status,):
            if each is Status.PENDING:
                indexes += on.call_each(_QUEUES, [(shard, ())])[0]
            indexes += _INDEXES[each]
        seen: set[bytes] = set()
        for index in indexes:
            cursor: bytes | None = b"0"
            while cursor is not None:
                ((cursor, found),) = on.call_each(_LOOK, [(shard, (index, cursor or b"0"))])
                for ident, *columns in found:
                    if ident not in seen:
                        seen.add(ident)
                        status_, processed, duplicates, created, age, text, queue = columns
                        key = key_of(ident)
                        of = (key.message_id, key.task_name)
                        yield _Seen(
                            ident,
                            *statuses_of(status_.decode(), processed.decode() or None, of=of),
                            int(duplicates),
                            int(created),
                            int(age) / 1_000_000,
                            text.decode("utf-8", "surrogatepass") or None,
                            queue[1:].decode("utf-8", "surrogatepass") if queue else None,
                        )
                if cursor == b"0":
                    cursor = None


def _first(created: dict[bytes, int], where: RowFilter) -> list[tuple[bytes, int]]:
    """Return the rows that come first, in their order."""
    sign = 1 if where.oldest_first else -1
    return heapq.nsmallest(where.limit, created.items(), key=lambda item: (sign * item[1], item[0]))


def _matches(pattern: str | None) -> Callable[[str], bool]:
    """Return whether a text is what is looked for: exactly, or by a pattern with ``*`` and ``?`` and no other wildcards."""
    if pattern is None:
        return lambda _: True
    if "*" not in pattern and "?" not in pattern:
        return lambda text: text == pattern
    compiled = re.compile(fnmatch.translate(pattern.replace("[", "[[]")))
    return lambda text: compiled.match(text) is not None
