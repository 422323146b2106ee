/** The keys of the outbox, in the order of KEYS. */
export const KEYS = ['waiting', 'dead', 'claims', 'lease', 'bytes', 'paused', 'version'] as const

/** The version of the format; the first release wrote none, and no bytes. */
export const VERSION = 1

/**
 * The operations of the outbox, each an atomic script. KEYS: the stream of queued entries, the stream of dead letters,
 * a hash with the number of queued entries of each anonKey, the lease of the relay that delivers, the bytes of all
 * events, whether delivery is paused, and the version. Each script returns { queued entries, dead letters, bytes,
 * paused (1 or 0), result }.
 */
const script = (lua: string) => `
local waiting, dead, claims, lease, bytes, paused, version = unpack(KEYS)
local result = (function ()${lua}end)()
if type(result) == 'table' and result.err then return result end
local queued, letters = redis.call('XLEN', waiting), redis.call('XLEN', dead)
-- A relay of the first release, which may run beside this one, does not count bytes.
if queued + letters == 0 then redis.call('DEL', bytes) end
return { queued, letters, tonumber(redis.call('GET', bytes) or 0), redis.call('EXISTS', paused), result }`

/** Deletes a queued entry; returns false if it is gone already. `size`: its bytes, or 0 if they stay in the outbox. */
const REMOVE = `
local function remove (id, claim, size)
  if redis.call('XDEL', waiting, id) == 0 then return false end
  if size ~= 0 then redis.call('DECRBY', bytes, size) end
  if redis.call('HINCRBY', claims, claim, -1) <= 0 then redis.call('HDEL', claims, claim) end
  -- Entries that were deleted by hand leave counts behind; these are reset when the stream is empty.
  if redis.call('XLEN', waiting) == 0 then redis.call('DEL', claims) end
  return true
end`

/**
 * ARGV: the version. Fails if the outbox has a later one. It writes, so that a Redis in which the relay may not write,
 * or run scripts, is found at start. DEL comes first: a Redis out of memory refuses a script that begins with SET.
 */
const OPEN = script(`
  if tonumber(redis.call('GET', version) or 0) > tonumber(ARGV[1]) then
    return redis.error_reply('the outbox is of a later release of the relay')
  end
  redis.call('DEL', version)
  redis.call('SET', version, ARGV[1])
`)

/** ARGV: the most entries, then anonKey, event, bytes and the most bytes of each. Returns 1 for each stored, else 0. */
const PUT = script(`
  local count = redis.call('XLEN', waiting) + redis.call('XLEN', dead)
  local used = count == 0 and 0 or tonumber(redis.call('GET', bytes) or 0)
  local stored, added = {}, 0
  for i = 2, #ARGV, 4 do
    local size = tonumber(ARGV[i + 2])
    if count < tonumber(ARGV[1]) and used + added + size <= tonumber(ARGV[i + 3]) then
      redis.call('XADD', waiting, '*', 'claim', ARGV[i], 'event', ARGV[i + 1])
      redis.call('HINCRBY', claims, ARGV[i], 1)
      count, added = count + 1, added + size
      table.insert(stored, 1)
    else
      table.insert(stored, 0)
    end
  end
  if added > 0 then redis.call('SET', bytes, used + added) end
  return stored
`)

/**
 * ARGV: this relay's id, the lease in ms, the first entry id, the most entries, the most bytes, the version. Returns
 * the entries, none while another relay has the lease, and how many events are gone: -1 if all keys are, so that only
 * those know who counted before. The consumer groups of streams would divide the entries of one anonKey among relays.
 */
const NEXT = script(`
  local gone = 0
  if redis.call('EXISTS', version) == 0 then
    redis.call('DEL', lease)
    redis.call('SET', version, ARGV[6])
    gone = -1
  elseif redis.call('XLEN', waiting) == 0 and redis.call('EXISTS', claims) == 1 then
    for _, count in ipairs(redis.call('HVALS', claims)) do gone = gone + tonumber(count) end
    redis.call('DEL', claims)
  end
  local owner = redis.call('GET', lease)
  if owner and owner ~= ARGV[1] or redis.call('EXISTS', paused) == 1 then return { {}, gone } end
  -- Redis that is out of memory refuses a script that begins with SET. Delivery must go on, as it frees memory.
  redis.call('DEL', lease)
  redis.call('SET', lease, ARGV[1], 'PX', ARGV[2])
  local entries, bytes, start = {}, 0, ARGV[3]
  while #entries < tonumber(ARGV[4]) and bytes < tonumber(ARGV[5]) do
    local page = redis.call('XRANGE', waiting, start, '+', 'COUNT', 20)
    if #page == 0 then break end
    for _, entry in ipairs(page) do
      if #entries == tonumber(ARGV[4]) or bytes >= tonumber(ARGV[5]) then break end
      table.insert(entries, entry)
      bytes = bytes + #entry[2][4]
    end
    start = '(' .. page[#page][1]
  end
  return { entries, gone }
`)

/** ARGV: this relay's id. Releases the lease. */
const RELEASE = script(`
  if redis.call('GET', lease) == ARGV[1] then redis.call('DEL', lease) end
`)

/** ARGV: id, anonKey and bytes of each. Returns how many existed. */
const ACK = script(`
  ${REMOVE}
  local removed = 0
  for i = 1, #ARGV, 3 do if remove(ARGV[i], ARGV[i + 1], ARGV[i + 2]) then removed = removed + 1 end end
  return removed
`)

/** ARGV: now (ms), then id, anonKey, event and reason of each. */
const DEAD_LETTER = script(`
  ${REMOVE}
  for i = 2, #ARGV, 4 do
    if remove(ARGV[i], ARGV[i + 1], 0) then
      redis.call('XADD', dead, '*', 'claim', ARGV[i + 1], 'event', ARGV[i + 2], 'reason', ARGV[i + 3], 'died', ARGV[1])
    end
  end
`)

/** ARGV: id and endpoint (or '') of each. Returns how many existed. */
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

/** ARGV: ids. Returns how many existed. */
const DROP = script(`
  local dropped = 0
  for _, id in ipairs(ARGV) do
    local letter = redis.call('XRANGE', dead, id, id)[1]
    if letter then
      redis.call('XDEL', dead, id)
      redis.call('DECRBY', bytes, #letter[2][4])
      dropped = dropped + 1
    end
  end
  return dropped
`)

/** ARGV: a time (ms), and the most entries. Deletes dead letters from before it: an id begins with its time. */
const EXPIRE = script(`
  local letters = redis.call('XRANGE', dead, '-', '(' .. ARGV[1], 'COUNT', ARGV[2])
  for _, letter in ipairs(letters) do
    redis.call('XDEL', dead, letter[1])
    redis.call('DECRBY', bytes, #letter[2][4])
  end
  return #letters
`)

/** ARGV: 1 to pause delivery, 0 to resume it. */
const PAUSE = script(`
  redis.call('DEL', paused)
  if ARGV[1] == '1' then redis.call('SET', paused, 1) end
`)

export const SCRIPTS = { OPEN, PUT, NEXT, RELEASE, ACK, DEAD_LETTER, REPLAY, DROP, EXPIRE, PAUSE }
