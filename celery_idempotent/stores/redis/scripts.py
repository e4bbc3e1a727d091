"""Scripts: what each verb runs inside of the server, and what they all begin with.

A script is atomic, and decides by the server's clock: ``now`` is read once, and what travels are durations. It is given the shard of
each message as a key and everything else as an argument; the keys of the rows and the indexes are made from the shard's tag, so that
they are in its slot. Lua's numbers are doubles, which tell microseconds since 1970 exactly until 2255; they are written by
``at``, never by Lua's own conversion, which rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha1

__all__ = ["Script"]

_PRELUDE = """
local tag = KEYS[1]
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])

-- A moment as rows have it.
local function at(microseconds)
  return string.format('%.0f', microseconds)
end

-- So many microseconds from a moment; false, which is null, for none.
local function from(moment, duration)
  return duration ~= '' and at(moment + tonumber(duration))
end

-- An argument that may be missing: false, which is null, or what follows its mark.
local function optional(argument)
  return argument ~= '' and string.sub(argument, 2)
end

-- The columns of a row; nil when there is none.
local function read(ident)
  local flat = redis.call('HGETALL', tag .. ':row:' .. ident)
  if #flat == 0 then return nil end
  local row = {}
  for i = 1, #flat, 2 do row[flat[i]] = flat[i + 1] end
  return row
end

-- A row with all that is in it, for the caller; false when there is none.
local function tell(ident)
  local flat = redis.call('HGETALL', tag .. ':row:' .. ident)
  if #flat == 0 then return false end
  return {at(now), flat, redis.call('HGETALL', tag .. ':big:' .. ident)}
end

-- Whether the id of a row may be taken by a new message.
local function is_free(row)
  return row.status == 'done' and row.expires_at and tonumber(row.expires_at) <= now
end

-- Whether a delivery is no copy of the message that ended here, which never runs again: see `Row.is_free_for`.
local function is_free_for(row, task_id, first)
  if not is_free(row) then return false end
  if row.error == 'forgotten' then return true end
  first = optional(first) or task_id
  for _, of in ipairs({row.task_id, row.ran_task_id or row.task_id}) do
    if of == task_id or of == first then return false end
  end
  return true
end

local function lease_ran_out(row)
  return not row.lease_expires_at or tonumber(row.lease_expires_at) <= now
end

local function waiting(row)
  return row.queue and ':waiting:' .. row.queue or ':waiting'
end

-- Take a row out of the index that it is in.
local function leave(ident, row)
  if row.status == 'processing' then
    redis.call('ZREM', tag .. ':running', ident)
  elseif row.status == 'pending' and row.published_at then
    local index = waiting(row)
    redis.call('ZREM', tag .. index, ident)
    if redis.call('EXISTS', tag .. index) == 0 then redis.call('SREM', tag .. ':queues', index) end
  elseif row.status == 'pending' then
    redis.call('ZREM', tag .. ':unsent', ident)
  else
    redis.call('ZREM', tag .. ':done', ident)
    redis.call('ZREM', tag .. ':kept', ident)
    redis.call('ZREM', tag .. ':recent', ident)
  end
end

-- Put a row into the index that it belongs in.
local function enter(ident, row)
  if row.status == 'processing' then
    redis.call('ZADD', tag .. ':running', row.lease_expires_at, ident)
  elseif row.status == 'pending' and row.published_at then
    local index, since = waiting(row), tonumber(row.published_at)
    if row.available_at then since = math.max(since, tonumber(row.available_at)) end
    redis.call('ZADD', tag .. index, at(since), ident)
    redis.call('SADD', tag .. ':queues', index)
  elseif row.status == 'pending' then
    redis.call('ZADD', tag .. ':unsent', row.created_timestamp, ident)
  else
    if row.expires_at then
      redis.call('ZADD', tag .. ':kept', row.expires_at, ident)
    else
      redis.call('ZADD', tag .. ':done', row.processed_timestamp, ident)
    end
    if row.worker then
      redis.call('ZADD', tag .. ':recent', row.processed_timestamp, ident)
      redis.call('ZREMRANGEBYRANK', tag .. ':recent', 0, -1001)
    end
  end
end

-- The identities in an index up to a place in it, each followed by its place. `wanted` gets a row's key and its place, and says whether to
-- return it; or nil if it does not belong in this index, because its row was evicted or deleted. Such an entry is removed, with what is left
-- of its row: it would count as one that is there.
local function look(index, last, limit, wanted)
  local found, stale, start, page = {}, {}, 0, math.min(limit, 500)
  repeat
    local some = redis.call('ZRANGEBYSCORE', tag .. index, '-inf', last, 'WITHSCORES', 'LIMIT', start, page)
    for i = 1, #some, 2 do
      local is = wanted(tag .. ':row:' .. some[i], tonumber(some[i + 1]))
      if is == nil then
        stale[#stale + 1] = some[i]
      elseif is then
        found[#found + 1] = some[i]
        found[#found + 1] = some[i + 1]
        if #found == 2 * limit then break end
      end
    end
    start = start + page
  until #some < 2 * page or #found == 2 * limit
  for _, ident in ipairs(stale) do
    redis.call('ZREM', tag .. index, ident)
    if redis.call('EXISTS', tag .. ':row:' .. ident) == 0 then redis.call('UNLINK', tag .. ':big:' .. ident) end
  end
  if #stale > 0 and redis.call('EXISTS', tag .. index) == 0 then redis.call('SREM', tag .. ':queues', index) end
  return found
end

-- Write columns; false is null.
local function write(ident, row, changes)
  local put, gone = {}, {}
  for column, value in pairs(changes) do
    if value then
      put[#put + 1] = column
      put[#put + 1] = value
    elseif row[column] then
      gone[#gone + 1] = column
    end
    row[column] = value or nil
  end
  if #put > 0 then redis.call('HSET', tag .. ':row:' .. ident, unpack(put)) end
  if #gone > 0 then redis.call('HDEL', tag .. ':row:' .. ident, unpack(gone)) end
end

-- Write columns, by which the row may belong in another index. Even of one that stays where it is this is the way to write: a server
-- that has no memory left refuses a script whose first write may need some, and none that begins by taking something out.
local function move(ident, row, changes)
  leave(ident, row)
  write(ident, row, changes)
  enter(ident, row)
end

-- Write what is large; false is null.
local function write_big(ident, column, value)
  if value then
    redis.call('HSET', tag .. ':big:' .. ident, column, value)
  else
    redis.call('HDEL', tag .. ':big:' .. ident, column)
  end
end

-- The columns of a message that is recorded now, out of the arguments from i on (see message_arguments), and the message.
local function new(i, moment)
  local attempt = ARGV[i + 1]
  return {
    status = 'pending',
    created_timestamp = at(moment),
    task_id = ARGV[i],
    attempt = attempt ~= '0' and attempt,
    available_at = from(moment, ARGV[i + 2]),
    published_at = ARGV[i + 3] ~= '' and at(moment),
    lease_expires_at = from(moment, ARGV[i + 4]),
    queue = optional(ARGV[i + 5]),
    fingerprint = optional(ARGV[i + 6]),
  }, optional(ARGV[i + 7])
end

-- Begin a row, or begin it again: then only its token stays, to which the caller may add.
local function begin(ident, old, columns, message)
  if old then
    leave(ident, old)
    redis.call('UNLINK', tag .. ':row:' .. ident, tag .. ':big:' .. ident)
    columns.token = columns.token or old.token
  end
  local row = {}
  write(ident, row, columns)
  -- Of a row that was evicted this is left. Not before the row is written: a full server is to refuse that.
  if not old then redis.call('UNLINK', tag .. ':big:' .. ident) end
  if message then write_big(ident, 'message', message) end
  enter(ident, row)
end

-- Whether a running message is held by the one whose fence the arguments from i on are.
local function held(row, i)
  return row and row.status == 'processing' and row[ARGV[i]] == ARGV[i + 1]
end

-- Another process that ends a run knows that its worker died, but not whether its body had ended before.
local function held_for_ending(row, i)
  return held(row, i) and not (ARGV[i] == 'worker' and row.processed_status)
end

-- The columns of a message that is done as of now.
local function ended(how, error, unique_for)
  return {
    status = 'done',
    processed_status = how,
    processed_timestamp = at(now),
    lease_expires_at = false,
    expires_at = from(now, unique_for),
    error = error,
  }
end
"""


@dataclass(frozen=True, slots=True)
class Script:
    """A script, known to the server by its digest once it was loaded.

    Args:
        body: What follows the common beginning.
    """

    body: str
    #: All of it.
    text: bytes = field(init=False, repr=False)
    #: Its SHA-1 in hexadecimal digits.
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        text = f"{_PRELUDE}\n{self.body.strip()}\n".encode()
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "digest", sha1(text, usedforsecurity=False).hexdigest().encode())
