"""The verbs of recovery: leases that ran out, messages that wait, rows past retention.

Each query reads one index per shard. One round trip asks all shards; a single server answers for one moment, so that no row is missed that
was recorded earlier than one that is found. A second round trip reads the rows that come first of all.
"""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime

from celery_idempotent.core.records import MAY_HAVE_RUN, MessageKey, ProcessedStatus, Row, Status
from celery_idempotent.core.store import LARGE_MESSAGE
from celery_idempotent.stores.batches import in_batches
from celery_idempotent.stores.redis.layout import SHARDS, VERSION, encoded, identity, key_of
from celery_idempotent.stores.redis.rows import Argument, duration, moment, row_of
from celery_idempotent.stores.redis.scripts import Script
from celery_idempotent.stores.redis.session import ScriptSession
from celery_idempotent.stores.redis.verbs import Verbs, ask, verb, wrote

__all__ = ["PURGEABLE", "Recovering", "chosen_by", "fetch", "first_of_all"]

# Whether a row, by its key, is of one of the tasks that the arguments from some place on name, or there are none.
_WANTED = """
local function wanted(first)
  if #ARGV < first then return function () return true end end
  local tasks = {}
  for i = first, #ARGV do tasks[ARGV[i]] = true end
  return function (key)
    local ident = string.sub(key, #tag + 6)
    local length = string.match(ident, '^%d+')
    return tasks[string.sub(ident, #length + 2, #length + 1 + tonumber(length))] or false
  end
end
"""

# Whether a row's error leaves it out, by the argument in some place that says so.
_DOUBTED = f"""
local function is_left_out(says, error)
  return ARGV[says] == '' and error == '{MAY_HAVE_RUN}'
end
"""

# An identity and its place in the order, one after the other; the same for each script that looks into an index.
_LAPSED = Script(f"""{_WANTED}{_DOUBTED}
local again_after, is_wanted = tonumber(ARGV[1]), wanted(4)
return look(':running', at(now), tonumber(ARGV[2]), function (key, lease)
  local row = redis.call('HMGET', key, 'status', 'published_at', 'error')
  if row[1] ~= 'processing' then return nil end
  local published = tonumber(row[2] or 0)
  return is_wanted(key) and not is_left_out(3, row[3]) and (published < lease or published <= now - again_after)
end)
""")

_WAITING = Script(f"""{_WANTED}{_DOUBTED}
local before, limit, queues = now - tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[4]
local indexes, last = {{}}, {{}}
if queues == '' then
  indexes = redis.call('SMEMBERS', tag .. ':queues')
else
  for i = 5, 4 + 2 * tonumber(queues), 2 do
    local index = ':waiting:' .. ARGV[i]
    indexes[#indexes + 1] = index
    last[index] = tonumber(ARGV[i + 1]) - 1
  end
end
local found, is_wanted = {{}}, wanted(5 + 2 * (tonumber(queues) or 0))
for _, index in ipairs(indexes) do
  local some = look(index, at(math.min(before, last[index] or before)), limit, function (key)
    local row = redis.call('HMGET', key, 'status', 'published_at', 'error')
    if row[1] ~= 'pending' or not row[2] then return nil end
    return is_wanted(key) and not is_left_out(3, row[3])
  end)
  for i = 1, #some do found[#found + 1] = some[i] end
end
return found
""")

_UNSENT = Script(f"""{_WANTED}
local is_wanted = wanted(2)
return look(':unsent', '+inf', tonumber(ARGV[1]), function (key)
  local row = redis.call('HMGET', key, 'status', 'published_at')
  if row[1] ~= 'pending' or row[2] then return nil end
  return is_wanted(key)
end)
""")

_FETCH = Script(f"""
local answers = {{}}
for i = 1, #KEYS do
  tag = KEYS[i]
  local row, big = tag .. ':row:' .. ARGV[i], tag .. ':big:' .. ARGV[i]
  local flat, large = redis.call('HGETALL', row), {{}}
  if #flat > 0 then
    local length = redis.call('HSTRLEN', big, 'message')
    if length > 0 and length <= {LARGE_MESSAGE} then large = {{'message', redis.call('HGET', big, 'message')}} end
    answers[i] = {{at(now), flat, large}}
  else
    answers[i] = false
  end
end
return answers
""")

_RELAY = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not (row and row.status == 'pending' and not row.published_at
    and (row.token or '0') == ARGV[2] and lease_ran_out(row)) then
  return 0
end
move(ident, row, {lease_expires_at = from(now, ARGV[3])})
return 1
""")

# Of a row that runs the lease is its owner's.
_RELAYED = Script("""
local answers = {}
for i = 1, #KEYS do
  tag = KEYS[i]
  local ident, row = ARGV[i + 1], read(ARGV[i + 1])
  answers[i] = 0
  if row and row.status == 'pending' and not row.published_at then
    move(ident, row, {published_at = ARGV[1] ~= '' and at(now), lease_expires_at = false})
    answers[i] = 1
  end
end
return answers
""")

_DOUBT = Script(f"""
local answers = {{}}
for i = 1, #KEYS do
  tag = KEYS[i]
  local ident = ARGV[i]
  local row = read(ident)
  answers[i] = 0
  if row and not row.error and ((row.status == 'pending' and row.published_at)
      or (row.status == 'processing' and not row.processed_status and lease_ran_out(row))) then
    move(ident, row, {{error = '{MAY_HAVE_RUN}'}})
    answers[i] = 1
  end
end
return answers
""")

_NOT_PUBLISHED = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if row and row.status ~= 'done' and (row.token or '0') == ARGV[2] then move(ident, row, {published_at = false}) end
return 1
""")

#: What a purge is for, by the arguments from the second on: failures of what age, which end, and a pattern of the task's name.
PURGEABLE = """
local failures, how, pattern = ARGV[2] ~= '' and tonumber(ARGV[2]), ARGV[3], ARGV[4]
local everything = not failures and how == '' and pattern == ''
local function is_old(ident)
  if everything then return true end
  local row = redis.call('HMGET', tag .. ':row:' .. ident, 'processed_status', 'processed_timestamp')
  if how ~= '' and row[1] ~= how then return false end
  if pattern ~= '' then
    local length = string.match(ident, '^%d+')
    local name = string.sub(ident, #length + 2, #length + 1 + tonumber(length))
    if not string.find(name, pattern) then return false end
  end
  if failures and row[1] == 'failure' and tonumber(row[2] or 0) > now - failures then
    return redis.call('HEXISTS', tag .. ':big:' .. ident, 'message') == 0
  end
  return true
end
"""

# How many were deleted, and whether there may be more.
_PURGE = Script(f"""{PURGEABLE}
local limit = tonumber(ARGV[5])
-- An id that was to stay taken for longer than retention kept its row; one that is free again is like any other.
local free = redis.call('ZRANGEBYSCORE', tag .. ':kept', '-inf', at(now), 'LIMIT', 0, limit)
for _, ident in ipairs(free) do
  local processed = redis.call('HGET', tag .. ':row:' .. ident, 'processed_timestamp')
  redis.call('ZREM', tag .. ':kept', ident)
  if processed then redis.call('ZADD', tag .. ':done', processed, ident) end
end
local before, kept, old = at(now - tonumber(ARGV[1])), 0, {{}}
repeat
  local some = redis.call('ZRANGEBYSCORE', tag .. ':done', '-inf', before, 'LIMIT', kept, everything and limit or 500)
  for _, ident in ipairs(some) do
    if #old < limit and is_old(ident) then
      redis.call('ZREM', tag .. ':done', ident)
      redis.call('ZREM', tag .. ':recent', ident)
      redis.call('UNLINK', tag .. ':row:' .. ident, tag .. ':big:' .. ident)
      old[#old + 1] = ident
    else
      kept = kept + 1
    end
  end
until #some == 0 or #old == limit
-- If the server was emptied under running processes, mark again of which layout the rows are that they write then.
if ARGV[6] ~= '' and redis.call('EXISTS', tag .. ':layout') == 0 then redis.call('SETNX', tag .. ':layout', ARGV[6]) end
return {{#old, (#old == limit or #free == limit) and 1 or 0}}
""")


class Recovering(Verbs):
    """Lists what is due for recovery, and notes what was done about it."""

    @verb
    def lapsed(
        self,
        on: ScriptSession,
        *,
        again_after: float,
        limit: int,
        tasks: Collection[str] | None = None,
        doubted: bool = True,
    ) -> list[Row]:
        said = b"1" if doubted else b""
        found = first_of_all(on, _LAPSED, duration(again_after), limit, said, *_names(tasks), limit=limit)
        return [row for row in fetch(on, found) if row.status is Status.PROCESSING and row.lease_left <= 0]

    @verb
    def waiting(
        self,
        on: ScriptSession,
        *,
        older_than: float,
        limit: int,
        before: Mapping[str, datetime] | None = None,
        tasks: Collection[str] | None = None,
        doubted: bool = True,
    ) -> list[Row]:
        queues: list[Argument] = [b""]
        if before is not None:
            pairs = [(encoded(queue), moment(last)) for queue, last in before.items()]
            queues = [len(pairs), *(argument for pair in pairs for argument in pair)]
        asked = (duration(older_than), limit, b"1" if doubted else b"", *queues, *_names(tasks))
        found = first_of_all(on, _WAITING, *asked, limit=limit)
        return [row for row in fetch(on, found) if row.status is Status.PENDING and row.published_at is not None]

    @verb
    def unsent(self, on: ScriptSession, *, limit: int, tasks: Collection[str] | None = None) -> list[Row]:
        found = first_of_all(on, _UNSENT, limit, *_names(tasks), limit=limit)
        return [row for row in fetch(on, found) if row.status is Status.PENDING and row.published_at is None]

    @verb
    def relay(self, on: ScriptSession, row: Row, *, lease: float) -> bool:
        # A retry cannot tell whether its first attempt took the right. If it did, the row is relayed after that has run out.
        return wrote(ask(on, _RELAY, row.key, row.token, duration(lease)))

    def relayed(self, keys: Sequence[MessageKey], *, published: bool) -> None:
        for some in in_batches(keys):
            self._relayed_some(some, published=published)

    @verb
    def _relayed_some(self, on: ScriptSession, keys: Sequence[MessageKey], *, published: bool) -> None:
        idents = [identity(key) for key in keys]
        on.call_all(_RELAYED, [b"1" if published else b""], [(ident, (ident,)) for ident in idents])

    def doubt(self, keys: Sequence[MessageKey]) -> None:
        for some in in_batches(keys):
            self._doubt_some(some)

    @verb
    def _doubt_some(self, on: ScriptSession, keys: Sequence[MessageKey]) -> None:
        idents = [identity(key) for key in keys]
        on.call_all(_DOUBT, (), [(ident, (ident,)) for ident in idents])

    @verb
    def not_published(self, on: ScriptSession, key: MessageKey, *, token: int) -> None:
        ask(on, _NOT_PUBLISHED, key, token)

    @verb
    def purge(
        self,
        on: ScriptSession,
        *,
        older_than: float,
        limit: int,
        failures_older_than: float | None = None,
        task_name: str | None = None,
        processed_status: ProcessedStatus | None = None,
    ) -> int:
        # So many in each shard that it is no more than asked for.
        chosen = chosen_by(older_than, failures_older_than, task_name, processed_status)
        purged, shards = 0, list(range(SHARDS))
        while shards and purged < limit:
            share, rest = divmod(limit - purged, len(shards))
            shares = [(shard, share + (place < rest)) for place, shard in enumerate(shards)]
            asked = [(shard, some) for shard, some in shares if some]
            answers = on.call_each(
                _PURGE, [(shard, (*chosen, some, b"" if shard else VERSION)) for shard, some in asked]
            )
            purged += sum(deleted for deleted, _ in answers)
            exhausted = {shard for (shard, _), (_, more) in zip(asked, answers, strict=True) if not more}
            shards = [shard for shard in shards if shard not in exhausted]
        return purged


def _names(tasks: Collection[str] | None) -> list[bytes]:
    """Tasks as the scripts are given them: any, or these; a name that none has stands for none."""
    return [] if tasks is None else [encoded(name) for name in tasks] or [b""]


def chosen_by(
    older_than: float,
    failures_older_than: float | None,
    task_name: str | None,
    processed_status: ProcessedStatus | None,
) -> list[Argument]:
    """Return what is to be purged, as the scripts are given it; see ``Store.purge``."""
    keeps = failures_older_than is not None and failures_older_than > older_than
    pattern = b""
    if task_name is not None:
        parts = re.split(r"([*?])", task_name)
        pattern = b"^" + b"".join(_WILDCARDS.get(part) or _lua_escaped(encoded(part)) for part in parts) + b"$"
    return [
        duration(older_than),
        duration(failures_older_than) if keeps else b"",
        b"" if processed_status is None else processed_status.encode(),
        pattern,
    ]


_WILDCARDS = {"*": b".*", "?": b"."}


def _lua_escaped(text: bytes) -> bytes:
    return re.sub(rb"([^A-Za-z0-9\x80-\xff])", rb"%\1", text)


def first_of_all(
    on: ScriptSession, script: Script, *arguments: Argument, limit: int, last: bool = False
) -> list[bytes]:
    """Look into an index of every shard, for the identities that come first of all (or last, and then in that order)."""
    answers = on.call_each(script, [(shard, arguments) for shard in range(SHARDS)])
    found = [(float(score), ident) for some in answers for ident, score in zip(some[::2], some[1::2], strict=True)]
    pick: Callable[..., list[tuple[float, bytes]]] = heapq.nlargest if last else heapq.nsmallest
    return [ident for _, ident in pick(limit, found)]


def fetch(on: ScriptSession, idents: Sequence[bytes], script: Script = _FETCH) -> list[Row]:
    """Rows by their identities, in that order; those that are gone are left out."""
    rows: list[Row] = []
    for some in in_batches(idents):
        answers = on.call_all(script, (), [(ident, (ident,)) for ident in some])
        rows += [row_of(key_of(ident), answer) for ident, answer in zip(some, answers, strict=True) if answer]
    return rows
