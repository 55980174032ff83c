"""The scripts that the server runs, each one verb in one atomic step.

What is stored, all of it under one prefix in braces, so that a cluster keeps it in one slot:

| key | holds |
|---|---|
| `{prefix}:h:<key>` | a record: its version, 16 hexadecimal digits, then the snapshot as JSON text |
| `{prefix}:keys` | the keys of all records but tombstones, in the order of their bytes, that is of their code points |
| `{prefix}:stored` | the keys of the histories, by the time of their last save; not marks, nor states of circuits |
| `{prefix}:ends` | the keys of what may be dropped some day, by that time |
| `{prefix}:graves` | the keys of tombstones, by the time at which their histories were dropped |
| `{prefix}:w:<writer>` | the receipt of a writer's last write, kept for some minutes |

A version is 63 random bits, made by who writes. So it never comes back: not with a key that was removed, not after
FLUSHALL, not when an older snapshot of the server is restored or a replica that lagged takes over, whatever the clocks
say. No counter could promise that, because a counter is lost with the rest. A tombstone has the version of its history:
it says nothing that whoever knows that one does not know.

A write leaves its version as its writer's receipt. A write that arrives a second time, because the answer to the first
was lost on its way, finds its own receipt and changes nothing: even if others have written to the key since, or have
removed it. A writer has one write under way at a time, so receipts take the place of as many writes as run at once.

Every answer begins with the server's time, 17 characters: the clock that all who share the store go by.
"""

from __future__ import annotations

from hashlib import sha1
from typing import Final

import attrs

from retrykit.tombstone import CLOSING, CUT, SEAM
from retrykit.value import Value

CHUNK: Final = 1_000
"""So many snapshots at most are dropped by one script: it holds up the server for 10 to 30 milliseconds."""

MANY: Final = 10_000
"""So many histories are always looked through for those of one template: it takes the server some milliseconds."""

RECEIPTS: Final = 300
"""For so many seconds the receipt of a writer that writes no more is kept; its last write may arrive again so late."""

# Names by position would say nothing: each script gives its own to KEYS and ARGV.
_HEAD = """
local moment = redis.call('TIME')
local now = string.format('%010d.%06d', moment[1], moment[2])
"""

# The key is what follows `{prefix}:h:` in the name of its record; the index `{prefix}:keys` shows how long that is.
_MEMBER = """
local member = string.sub(record, #keys - 1)
"""

_DROP = """
local function drop(members)
  local records, space = {}, string.sub(keys, 1, -5) .. 'h:'
  for number, name in ipairs(members) do
    records[number] = space .. name
  end
  redis.call('UNLINK', unpack(records))
  redis.call('ZREM', keys, unpack(members))
  redis.call('ZREM', stored, unpack(members))
  redis.call('ZREM', ends, unpack(members))
  redis.call('ZREM', graves, unpack(members))
end
"""

# What is left of a record is its beginning, up to where its writer has prepared the cut (`retrykit.tombstone`). What is
# no object with something in it stays as it is, which nobody can read either. The script around it gives the
# indexes, and `most` and `lasts`: how many tombstones there may be (empty: nobody looks), and for how many seconds.
_BURY = f"""
local function epitaph_of(text, epitaph)
  if string.sub(text, 17) == '{{}}' then
    return string.sub(text, 1, 17) .. string.sub(epitaph, 2)
  end
  if string.sub(text, 17, 17) ~= '{{' or string.sub(text, -1) ~= '}}' or not string.find(text, '"', 17, true) then
    return text
  end
  local cut = string.find(text, {CUT!r}, 17, true)
  if cut then
    return string.sub(text, 1, cut - 1) .. '{CLOSING[:-1]}' .. epitaph
  end
  local seam = string.find(text, {SEAM!r}, 17, true)
  if seam then
    return string.sub(text, 1, seam - 1) .. epitaph
  end
  return string.sub(text, 1, -2) .. epitaph
end
local function bury(members, at, by)
  if #members == 0 then
    return
  end
  if most == '0' then
    return drop(members)
  end
  local space, records = string.sub(keys, 1, -5) .. 'h:', {{}}
  for number, name in ipairs(members) do
    records[number] = space .. name
  end
  local epitaph = ',"evicted":{{"at":' .. at .. ',"by":"' .. by .. '"}}}}'
  local graved, ended = {{}}, {{}}
  local till = lasts ~= '' and string.format('%.6f', at + lasts)
  for number, text in ipairs(redis.call('MGET', unpack(records))) do
    if text then
      redis.call('SET', records[number], epitaph_of(text, epitaph))
      local place = #graved
      graved[place + 1], graved[place + 2] = at, members[number]
      ended[place + 1], ended[place + 2] = till, members[number]
    end
  end
  redis.call('ZREM', keys, unpack(members))
  redis.call('ZREM', stored, unpack(members))
  redis.call('ZREM', ends, unpack(members))
  if #graved > 0 then
    redis.call('ZADD', graves, unpack(graved))
    if till then
      redis.call('ZADD', ends, unpack(ended))
    end
  end
end
"""

_SWEEP = """
local function sweep(at, limit)
  local over = redis.call('ZRANGEBYSCORE', ends, '-inf', at, 'LIMIT', 0, limit)
  local histories, others = {}, {}
  for _, name in ipairs(over) do
    local kind = redis.call('ZSCORE', stored, name) and histories or others
    kind[#kind + 1] = name
  end
  if #others > 0 then
    drop(others)
  end
  bury(histories, at, 'time_to_live')
  return #over
end
"""

# Those in the index of keys were made histories again by somebody who knows nothing of tombstones.
_TRIM = """
local function trim()
  local surplus = most ~= '' and redis.call('ZCARD', graves) - most or 0
  if surplus <= 0 then
    return false
  end
  for _, name in ipairs(redis.call('ZRANGE', graves, 0, math.min(surplus, CHUNK) - 1)) do
    if redis.call('ZSCORE', keys, name) then
      redis.call('ZREM', graves, name)
    else
      drop({name})
    end
  end
  return surplus > CHUNK
end
"""


@attrs.frozen(eq=False, repr=False)
class Script(Value):
    """A script, and the name under which a server that has seen it knows it."""

    text: bytes
    sha: bytes


def _script(*parts: str) -> Script:
    text = "".join(parts)
    for name, number in (("CHUNK", CHUNK), ("MANY", MANY), ("RECEIPTS", RECEIPTS)):
        text = text.replace(name, str(number))
    encoded = text.strip().encode()
    # Not for security: it is what Redis calls a script.
    return Script(encoded, sha1(encoded, usedforsecurity=False).hexdigest().encode())


# A key that is in the index while its record is not was taken by the server itself (maxmemory-policy), or by hand.
LOAD: Final = _script(
    "local record, keys, stored, ends, graves = unpack(KEYS)",
    _HEAD,
    _DROP,
    _MEMBER,
    """
local found = redis.call('GET', record)
if found then
  return now .. '+' .. found
end
if redis.call('ZSCORE', keys, member) then
  drop({member})
  return now .. '?'
end
return now .. '-'
""",
)

SAVE: Final = _script(
    "local record, keys, stored, ends, graves, receipt = unpack(KEYS)\n",
    "local version, expected, snapshot, kind, till, later, capacity, swept, given, most, lasts = unpack(ARGV)",
    _HEAD,
    _DROP,
    _BURY,
    _SWEEP,
    _TRIM,
    _MEMBER,
    """
if redis.call('GET', receipt) == version then
  return now .. '+'
end
if redis.call('GETRANGE', record, 0, 15) ~= expected then
  return now .. '-'
end
local at = given ~= '' and given or now
local evicted = {}
local is_tombstone = redis.call('ZSCORE', graves, member) and not redis.call('ZSCORE', keys, member)
if swept ~= '0' then
  sweep(at, swept)
end
if expected == '' or is_tombstone then
  local room = tonumber(capacity)
  if kind ~= 'mark' and room then
    local surplus = redis.call('ZCARD', stored) - room + 1
    if surplus > 0 then
      for _ = 1, 10 do
        if surplus <= 0 or sweep(at, CHUNK) == 0 then
          break
        end
        surplus = redis.call('ZCARD', stored) - room + 1
      end
    end
    if surplus > 0 then
      if kind ~= 'evict' then
        return now .. '!'
      end
      evicted = redis.call('ZRANGE', stored, 0, math.min(surplus, CHUNK) - 1)
      bury(evicted, at, 'capacity')
    end
  end
end
-- Whatever was swept: a key that is stored is in the index of keys.
redis.call('ZADD', keys, 0, member)
redis.call('SET', record, version .. snapshot)
redis.call('ZREM', graves, member)
if kind == 'mark' then
  redis.call('ZREM', stored, member)
else
  redis.call('ZADD', stored, now + later, member)
end
if till == '' then
  redis.call('ZREM', ends, member)
else
  if string.sub(till, 1, 1) == '+' then
    till = string.format('%.6f', at + till)
  end
  redis.call('ZADD', ends, till, member)
end
redis.call('SET', receipt, version, 'EX', RECEIPTS)
trim()
if #evicted > 0 then
  return {now .. '+', unpack(evicted)}
end
return now .. '+'
""",
)

REMOVE: Final = _script(
    "local record, keys, stored, ends, graves, receipt = unpack(KEYS)\n",
    "local token, expected = unpack(ARGV)",
    _HEAD,
    _DROP,
    _MEMBER,
    """
if redis.call('GET', receipt) == token then
  return now .. '+'
end
local version = redis.call('GETRANGE', record, 0, 15)
if version == '' or (expected ~= '' and version ~= expected) then
  return now .. '-'
end
drop({member})
redis.call('SET', receipt, token, 'EX', RECEIPTS)
return now .. '+'
""",
)

PAGE: Final = _script(
    "local keys, stored, ends, graves = unpack(KEYS)\n",
    "local first, last, limit = unpack(ARGV)",
    _HEAD,
    _DROP,
    """
local members = redis.call('ZRANGEBYLEX', keys, first, last, 'LIMIT', 0, limit)
if #members == 0 then
  return {now, {}, {}}
end
local records, space = {}, string.sub(keys, 1, -5) .. 'h:'
for number, name in ipairs(members) do
  records[number] = space .. name
end
local found = redis.call('MGET', unpack(records))
local gone = {}
for number, name in ipairs(members) do
  if not found[number] then
    gone[#gone + 1] = name
  end
end
if #gone > 0 then
  drop(gone)
end
return {now, members, found}
""",
)

EXPIRE: Final = _script(
    "local keys, stored, ends, graves = unpack(KEYS)\n",
    "local limit, given, most, lasts = unpack(ARGV)",
    _HEAD,
    _DROP,
    _BURY,
    _SWEEP,
    _TRIM,
    """
local dropped = sweep(given ~= '' and given or now, limit)
return now .. (trim() and '+' or '-') .. dropped
""",
)

# Tombstones have no index by key: all are gone through, a bit at a time, and whoever wants them in order sorts them.
GRAVES: Final = _script(
    "local graves = KEYS[1]\n",
    _HEAD,
    """
local found = redis.call('ZSCAN', graves, ARGV[1], 'COUNT', CHUNK)
local members = {}
for number = 1, #found[2], 2 do
  local name = found[2][number]
  if string.sub(name, 1, #ARGV[2]) == ARGV[2] then
    members[#members + 1] = name
  end
end
return {now, found[1], members}
""",
)

# Those that are no tombstones any more are left out.
EVICTED: Final = _script(
    "local keys, graves = unpack(KEYS)\n",
    _HEAD,
    """
local found, space = {now}, string.sub(keys, 1, -5) .. 'h:'
for number, name in ipairs(ARGV) do
  local text = redis.call('ZSCORE', graves, name) and not redis.call('ZSCORE', keys, name) and
    redis.call('GET', space .. name)
  if text then
    found[#found + 1] = tostring(number)
    found[#found + 1] = text
  end
end
return found
""",
)

# A snapshot that says "veto" somewhere is sent; whoever reads it looks where.
VETOED: Final = _script(
    _HEAD,
    """
local found = {now}
for number, record in ipairs(KEYS) do
  local text = redis.call('GET', record)
  if text and string.find(text, '"veto":', 17, true) then
    found[#found + 1] = tostring(number)
    found[#found + 1] = text
  end
end
return found
""",
)

# The indexes by time are those of histories and tombstones alone: looked through as a whole, unless that is too much.
OPEN: Final = _script(
    "local keys, stored, graves = unpack(KEYS)\n",
    "local prefix, limit = ARGV[1], tonumber(ARGV[2])",
    _HEAD,
    """
local found = {}
if redis.call('ZCARD', stored) + redis.call('ZCARD', graves) > math.max(10 * limit, MANY) then
  return now .. '!'
end
for _, index in ipairs({stored, graves}) do
  for _, name in ipairs(redis.call('ZRANGE', index, 0, -1)) do
    local is_one = index == stored or not redis.call('ZSCORE', keys, name)
    if is_one and string.sub(name, 1, #prefix) == prefix then
      found[#found + 1] = name
    end
  end
end
if #found > limit then
  return now .. '!'
end
return {now, found}
""",
)
