"""The operators' verbs besides reading: forget a row, count what may be purged, report the health of the log."""

# ruff: noqa: D102 - the verbs are documented in the port

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from celery_idempotent.core.records import FORGOTTEN, MAY_HAVE_RUN, LogHealth, ProcessedStatus, Row
from celery_idempotent.stores import took_effect
from celery_idempotent.stores.redis.layout import SHARDS, encoded
from celery_idempotent.stores.redis.recovering import PURGEABLE, chosen_by
from celery_idempotent.stores.redis.rows import optional_moment
from celery_idempotent.stores.redis.scripts import Script
from celery_idempotent.stores.redis.session import ScriptSession
from celery_idempotent.stores.redis.verbs import Verbs, ask, shows, verb, wrote

__all__ = ["Admin"]

_FORGET = Script("""
local ident, row = ARGV[1], read(ARGV[1])
if not (row and row.status == ARGV[2] and (row.token or '0') == ARGV[3] and row.task_id == ARGV[4]) then
  return tell(ident)
end
local columns = ended('failure', ARGV[5], '0')
-- How long ago it was done counts, for a purge.
columns.processed_timestamp = row.processed_timestamp or at(now)
columns.available_at = false
columns.fingerprint = false
move(ident, row, columns)
redis.call('UNLINK', tag .. ':big:' .. ident)
return 1
""")

# How many, of five hundred that no id keeps and of five hundred whose ids are free again; and how many were looked at, or all counted.
_PURGEABLE = Script(f"""{PURGEABLE}
local before, first = now - tonumber(ARGV[1]), ARGV[5]
local count, looked = 0, 0
if not everything then
  local done = redis.call('ZRANGEBYSCORE', tag .. ':done', '-inf', at(before), 'LIMIT', first, 500)
  for _, ident in ipairs(done) do
    if is_old(ident) then count = count + 1 end
  end
  looked = #done
elseif first == '0' then
  count = redis.call('ZCOUNT', tag .. ':done', '-inf', at(before))
end
local free = redis.call('ZRANGEBYSCORE', tag .. ':kept', '-inf', at(now), 'LIMIT', first, 500)
for _, ident in ipairs(free) do
  local processed = redis.call('HGET', tag .. ':row:' .. ident, 'processed_timestamp')
  if processed and tonumber(processed) <= before and is_old(ident) then count = count + 1 end
end
return {{count, math.max(looked, #free)}}
""")

# The clock, and the moments of a LogHealth; empty for none.
_CONDITION = Script(
    f"local MAY_HAVE_RUN = '{MAY_HAVE_RUN}'"
    """
local function first_of(index, last, found)
  local start = 0
  repeat
    local some = redis.call('ZRANGEBYSCORE', tag .. index, '-inf', last, 'WITHSCORES', 'LIMIT', start, 500)
    for i = 1, #some, 2 do
      if found(tag .. ':row:' .. some[i], tonumber(some[i + 1])) then return some[i + 1] end
    end
    start = start + 500
  until #some < 1000
  return ''
end
local due = now
for _, index in ipairs(redis.call('SMEMBERS', tag .. ':queues')) do
  local last = redis.call('ZREVRANGE', tag .. index, 0, 0, 'WITHSCORES')
  if #last > 0 then due = math.max(due, tonumber(last[2])) end
end
local lapsed = first_of(':running', at(now), function (key, lease)
  local row = redis.call('HMGET', key, 'status', 'published_at', 'error')
  -- Nobody is expected to publish what may have run without the guard.
  return row[1] == 'processing' and tonumber(row[2] or 0) < lease and row[3] ~= MAY_HAVE_RUN
end)
local unsent = first_of(':unsent', '+inf', function (key)
  local row = redis.call('HMGET', key, 'status', 'lease_expires_at')
  return row[1] == 'pending' and tonumber(row[2] or 0) <= now
end)
local done = redis.call('ZRANGE', tag .. ':done', 0, 0, 'WITHSCORES')[2] or ''
for _, ident in ipairs(redis.call('ZRANGEBYSCORE', tag .. ':kept', '-inf', at(now), 'LIMIT', 0, 500)) do
  local processed = redis.call('HGET', tag .. ':row:' .. ident, 'processed_timestamp')
  if processed and (done == '' or tonumber(processed) < tonumber(done)) then done = processed end
end
return {at(now), due > now and at(due) or '', lapsed, unsent, done}
"""
)

#: The commands that return settings. An account may be allowed only one of them, which suffices.
_ASK = (
    (b"CONFIG", b"GET", b"append*"),
    (b"CONFIG", b"GET", b"maxmemory*"),
    (b"INFO", b"persistence"),
    (b"INFO", b"memory"),
)
_SETTINGS = ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy")
_FROM_INFO: Mapping[str, tuple[str, Callable[[str], str]]] = {
    "aof_enabled": ("appendonly", lambda value: "yes" if value == "1" else "no"),
    "maxmemory": ("maxmemory", str),
    "maxmemory_policy": ("maxmemory-policy", str),
}


class Admin(Verbs):
    """The verbs that forget rows, and report the health of the log and the settings of its servers."""

    @verb
    def forget(self, on: ScriptSession, row: Row) -> bool:
        read = (row.status.encode(), row.token, encoded(row.task_id))
        answer = ask(on, _FORGET, row.key, *read, FORGOTTEN.encode())
        return wrote(answer) or (on.is_retry and shows(row.key, answer, lambda found: took_effect.forget(found, row)))

    @verb
    def purgeable(
        self,
        on: ScriptSession,
        *,
        older_than: float,
        failures_older_than: float | None = None,
        task_name: str | None = None,
        processed_status: ProcessedStatus | None = None,
    ) -> int:
        chosen = chosen_by(older_than, failures_older_than, task_name, processed_status)
        counted, shards, first = 0, list(range(SHARDS)), 0
        while shards:
            answers = on.call_each(_PURGEABLE, [(shard, (*chosen, first)) for shard in shards])
            counted += sum(count for count, _ in answers)
            shards = [shard for shard, (_, looked_at) in zip(shards, answers, strict=True) if looked_at == 500]
            first += 500
        return counted

    def health(self) -> LogHealth:
        every = [(shard, ()) for shard in range(SHARDS)]
        answers = self._run(lambda on: on.call_each(_CONDITION, every), prepared=False)
        now, *moments = zip(*([optional_moment(value) for value in answer] for answer in answers), strict=True)
        last_due, lapsed_since, unsent_since, done_since = moments
        read_at = _which(max, now)
        assert read_at is not None, "every script tells the clock"
        return LogHealth(
            read_at,
            last_due=_which(max, last_due),
            lapsed_since=_which(min, lapsed_since),
            unsent_since=_which(min, unsent_since),
            done_since=_which(min, done_since),
        )

    def configuration(self) -> Mapping[str, str]:
        settings: dict[str, str] = {}
        for node, answers in self._run(lambda on: on.command_each(_ASK), prepared=False).items():
            for name, value in _settings(answers).items():
                if settings.setdefault(name, value) != value:
                    settings[f"{name} [{node}]"] = value
        return settings


def _which(pick: Callable[[list[datetime]], datetime], moments: Iterable[datetime | None]) -> datetime | None:
    known = [moment for moment in moments if moment is not None]
    return pick(known) if known else None


def _settings(answers: list[Any]) -> dict[str, str]:
    """Return the settings of one server; none if it refused."""
    settings: dict[str, str] = {}
    for answer in answers:
        if isinstance(answer, bytes):  # INFO, which has less than CONFIG
            lines = (line.partition(":") for line in answer.decode(errors="replace").splitlines())
            for name, _, value in lines:
                if name in _FROM_INFO:
                    setting, read = _FROM_INFO[name]
                    settings.setdefault(setting, read(value))
        elif not isinstance(answer, Exception):
            pairs = answer.items() if isinstance(answer, Mapping) else zip(answer[::2], answer[1::2], strict=True)
            settings.update({name.decode(): value.decode() for name, value in pairs if name.decode() in _SETTINGS})
    return settings
