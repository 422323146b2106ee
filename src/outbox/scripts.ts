/**
 * What the outbox does in Redis, one atomic script each. KEYS: the stream of those that wait, the stream of dead
 * letters, and a hash with how many wait for each claim. Every script returns { how many wait, how many are dead, … }.
 */
const script = (lua: string) => `
local waiting, dead, claims = KEYS[1], KEYS[2], KEYS[3]
local result = (function ()${lua}end)()
return { redis.call('XLEN', waiting), redis.call('XLEN', dead), result }`

/** Takes an entry out of those that wait, if nobody else did. */
const FORGET = `
local function forget (id, claim)
  redis.call('XACK', waiting, 'relays', id)
  if redis.call('XDEL', waiting, id) == 0 then return false end
  if redis.call('HINCRBY', claims, claim, -1) <= 0 then redis.call('HDEL', claims, claim) end
  return true
end`

/**
 * ARGV: the most entries, the last moment (ms of Redis's clock), then claim and event of each. 'kept', all of them; or
 * 'full'; or 'late', because its caller has been told by then that it was not kept.
 */
const PUT = script(`
  local now = redis.call('TIME')
  if now[1] * 1000 + now[2] / 1000 > tonumber(ARGV[2]) then return 'late' end
  local count = redis.call('XLEN', waiting) + redis.call('XLEN', dead) + (#ARGV - 2) / 2
  if count > tonumber(ARGV[1]) then return 'full' end
  for i = 3, #ARGV, 2 do
    redis.call('XADD', waiting, '*', 'claim', ARGV[i], 'event', ARGV[i + 1])
    redis.call('HINCRBY', claims, ARGV[i], 1)
  end
  return 'kept'
`)

/**
 * ARGV: this consumer, how many, and after how many ms of silence another one is taken for dead. What a dead one had
 * in hand is claimed. While a living one has anything in hand nothing can be taken: only so do claims keep their order.
 */
const TAKE = script(`
  local me, count = ARGV[1], ARGV[2]
  redis.pcall('XGROUP', 'CREATE', waiting, 'relays', '0', 'MKSTREAM')
  redis.call('XAUTOCLAIM', waiting, 'relays', me, ARGV[3], '0-0', 'COUNT', count, 'JUSTID')
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', waiting, 'relays')) do
    local name, pending, idle = consumer[2], consumer[4], consumer[6]
    if name ~= me and pending > 0 then return {} end
    if name ~= me and idle > 3600000 then redis.call('XGROUP', 'DELCONSUMER', waiting, 'relays', name) end
  end
  local inHand = redis.call('XREADGROUP', 'GROUP', 'relays', me, 'COUNT', count, 'STREAMS', waiting, '0')
  local entries = {}
  for _, entry in ipairs(inHand and inHand[1][2] or {}) do
    -- Somebody deleted it by hand.
    if entry[2] then table.insert(entries, entry) else redis.call('XACK', waiting, 'relays', entry[1]) end
  end
  if #entries > 0 then return entries end
  local new = redis.call('XREADGROUP', 'GROUP', 'relays', me, 'COUNT', count, 'STREAMS', waiting, '>')
  return new and new[1][2] or {}
`)

/** ARGV: this consumer, how many. What it has in hand can be claimed by another one at once. */
const RELEASE = script(`
  for _, entry in ipairs(redis.call('XPENDING', waiting, 'relays', '-', '+', ARGV[2], ARGV[1])) do
    redis.call('XCLAIM', waiting, 'relays', ARGV[1], 0, entry[1], 'IDLE', 86400000, 'JUSTID')
  end
`)

/** ARGV: id and claim of each. */
const DONE = script(`
  ${FORGET}
  for i = 1, #ARGV, 2 do forget(ARGV[i], ARGV[i + 1]) end
`)

/** ARGV: now (ms), then id, claim, event and reason of each. */
const BURY = script(`
  ${FORGET}
  for i = 2, #ARGV, 4 do
    if forget(ARGV[i], ARGV[i + 1]) then
      redis.call('XADD', dead, '*', 'claim', ARGV[i + 1], 'event', ARGV[i + 2], 'reason', ARGV[i + 3], 'died', ARGV[1])
    end
  end
`)

/** ARGV: id and endpoint (or '') of each. Returns how many there were. */
const REPLAY = script(`
  local replayed = 0
  for i = 1, #ARGV, 2 do
    local letter = redis.call('XRANGE', dead, ARGV[i], ARGV[i])[1]
    if letter then
      local claim, event = letter[2][2], letter[2][4]
      redis.call('XADD', waiting, '*', 'claim', claim, 'event', event, 'endpoint', ARGV[i + 1])
      redis.call('HINCRBY', claims, claim, 1)
      redis.call('XDEL', dead, ARGV[i])
      replayed = replayed + 1
    end
  end
  return replayed
`)

/** ARGV: ids. Returns how many there were. */
const DROP = script(`
  return redis.call('XDEL', dead, unpack(ARGV))
`)

export const SCRIPTS = { PUT, TAKE, RELEASE, DONE, BURY, REPLAY, DROP }
