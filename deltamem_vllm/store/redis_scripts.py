"""The Lua scripts of the Redis store: each runs as one atomic step, and reaches the append-only file as one.

Keys, under the store's namespace ``n`` (ids cannot hold NUL, so ``tenant NUL session`` is unambiguous):

    n:head:<tenant NUL session>      hash  v, i, r: version, incarnation, request id; m: its listing entry
    n:vers:<tenant NUL session>      hash  per kept version: b<v> record, m<v> listing entry, r<v> request id
    n:names:<tenant>                 zset  session ids, all with score 0, hence ordered by bytes
    n:used:<tenant>                  hash  sessions, bytes
    n:idle                           zset  tenant NUL session, by updated_at
    n:lease:<tenant NUL session>     its holder, until it expires; n:want:…, for a moment: somebody else asked for it

The comparison and the quotas are those of ``ledger``: a refused item comes back with what was stored, and the
caller makes the error from it by the same rules.
"""

PUT = """
local keep, most_sessions, most_bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local answers = {}
for item = 0, (#ARGV - 4) / 10 - 1 do
  local head, vers, names, used, idle, lease = unpack(KEYS, 6 * item + 1, 6 * item + 6)
  local member, session, version, incarnation, request, seen, life, updated, meta, blob =
    unpack(ARGV, 10 * item + 5, 10 * item + 14)
  local stored = redis.call('HMGET', head, 'v', 'i', 'r')
  local use = redis.call('HMGET', used, 'sessions', 'bytes')
  local sessions, bytes = tonumber(use[1] or 0), tonumber(use[2] or 0)
  local answer = 'refused'
  local same = stored[2] == incarnation and
    (stored[1] == version and stored[3] == request or redis.call('HGET', vers, 'r' .. version) == request)
  if same then
    answer = 'there'
  elseif (seen == '' and not stored[1]) or (seen ~= '' and stored[1] == seen and stored[2] == life
      and incarnation == life and tonumber(version) == tonumber(seen) + 1) then
    answer = 'stored'
  end
  local created, grown, trim = 0, #blob, {}
  if answer == 'stored' then
    if not stored[1] then created = 1 end
    for _, field in ipairs(redis.call('HKEYS', vers)) do
      local kept = string.match(field, '^b(%d+)$')
      if kept and tonumber(kept) <= tonumber(version) - keep then
        grown = grown - redis.call('HSTRLEN', vers, field)
        trim[#trim + 1] = kept
      end
    end
    if (created == 1 and most_sessions >= 0 and sessions + 1 > most_sessions)
        or (grown > 0 and most_bytes >= 0 and bytes + grown > most_bytes) then
      answer = 'quota'
    end
  end
  local holder, left = redis.call('GET', lease), 0
  if answer == 'stored' and holder and holder ~= ARGV[4] then
    answer, left = 'leased', redis.call('PTTL', lease)
  end
  if answer == 'stored' then
    redis.call('HSET', head, 'v', version, 'i', incarnation, 'r', request, 'm', meta)
    for _, kept in ipairs(trim) do redis.call('HDEL', vers, 'b' .. kept, 'm' .. kept, 'r' .. kept) end
    redis.call('HSET', vers, 'b' .. version, blob, 'm' .. version, meta, 'r' .. version, request)
    redis.call('HINCRBY', used, 'sessions', created)
    redis.call('HINCRBY', used, 'bytes', grown)
    redis.call('ZADD', names, 0, session)
    redis.call('ZADD', idle, updated, member)
  end
  answers[#answers + 1] =
    {answer, stored[1] or '', stored[2] or '', stored[3] or '', created, grown, sessions, bytes, left}
end
return answers
"""
"""KEYS: six per item. ARGV: keep, quotas (-1: none), our name as a holder of leases, then ten per item."""

GET = """
local stored = redis.call('HMGET', KEYS[1], 'v', 'i', 'r')
if not stored[1] then return false end
return {stored[1], stored[2], stored[3], redis.call('HGET', KEYS[2], 'b' .. stored[1])}
"""
"""KEYS: head, vers."""

GET_VERSION = """
local life = redis.call('HGET', KEYS[1], 'i')
local found = redis.call('HMGET', KEYS[2], 'r' .. ARGV[1], 'b' .. ARGV[1])
if not life or not found[1] then return false end
return {ARGV[1], life, found[1], found[2]}
"""
"""KEYS: head, vers. ARGV: version. A session's kept versions are of one life."""

HISTORY = """
local found = {}
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.sub(field, 1, 1) == 'm' then found[#found + 1] = redis.call('HGET', KEYS[1], field) end
end
return found
"""
"""KEYS: vers."""

DELETE = """
if not redis.call('HGET', KEYS[1], 'v') then return 0 end
if ARGV[3] ~= '' and tonumber(redis.call('ZSCORE', KEYS[5], ARGV[1]) or 'inf') > tonumber(ARGV[3]) then return 0 end
local bytes = 0
for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do
  if string.sub(field, 1, 1) == 'b' then bytes = bytes + redis.call('HSTRLEN', KEYS[2], field) end
end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[6])
redis.call('ZREM', KEYS[3], ARGV[2])
redis.call('ZREM', KEYS[5], ARGV[1])
redis.call('HINCRBY', KEYS[4], 'bytes', -bytes)
if redis.call('HINCRBY', KEYS[4], 'sessions', -1) <= 0 then redis.call('DEL', KEYS[4]) end
return 1
"""
"""KEYS: head, vers, names, used, idle, lease. ARGV: member, session, latest updated_at or ''."""

RESEAL = """
if redis.call('HGET', KEYS[2], 'b' .. ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[2], 'b' .. ARGV[1], ARGV[3], 'm' .. ARGV[1], ARGV[4])
if redis.call('HGET', KEYS[1], 'v') == ARGV[1] then redis.call('HSET', KEYS[1], 'm', ARGV[4]) end
redis.call('HINCRBY', KEYS[3], 'bytes', #ARGV[3] - #ARGV[2])
return 1
"""
"""KEYS: head, vers, used. ARGV: version, old record, new record, new listing entry."""

ACQUIRE = """
local answers = {}
for item = 1, #KEYS, 2 do
  local holder = redis.call('GET', KEYS[item])
  if holder and holder ~= ARGV[1] then
    redis.call('SET', KEYS[item + 1], '1', 'PX', ARGV[3], 'NX')
    answers[#answers + 1] = {0, math.max(redis.call('PTTL', KEYS[item]), 0), 0}
  else
    redis.call('SET', KEYS[item], ARGV[1], 'PX', ARGV[2])
    answers[#answers + 1] = {1, tonumber(ARGV[2]), redis.call('EXISTS', KEYS[item + 1])}
  end
end
return answers
"""
"""KEYS: lease, want per session. ARGV: holder, milliseconds of a lease, of a want."""

RELEASE = """
for _, lease in ipairs(KEYS) do
  if redis.call('GET', lease) == ARGV[1] then redis.call('DEL', lease) end
end
return 1
"""
"""KEYS: leases. ARGV: holder."""
