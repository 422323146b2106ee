/**
 * The operations of the outbox, each an atomic script. KEYS: the stream of queued entries, the stream of dead letters,
 * a hash with the number of queued entries of each anonKey, and the lease of the relay that delivers. Each script
 * returns { queued entries, dead letters, result }.
 */
const script = (lua: string) => `
local waiting, dead, claims, lease = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local result = (function ()${lua}end)()
return { redis.call('XLEN', waiting), redis.call('XLEN', dead), result }`

/** Deletes a queued entry; returns false if it is gone already. */
const REMOVE = `
local function remove (id, claim)
  if redis.call('XDEL', waiting, id) == 0 then return false end
  if redis.call('HINCRBY', claims, claim, -1) <= 0 then redis.call('HDEL', claims, claim) end
  -- Entries that were deleted by hand leave counts behind; these are reset when the stream is empty.
  if redis.call('XLEN', waiting) == 0 then redis.call('DEL', claims) end
  return true
end`

/** ARGV: the most entries, then anonKey and event of each. Returns 1 if all are stored, else 0. */
const PUT = script(`
  local count = redis.call('XLEN', waiting) + redis.call('XLEN', dead) + (#ARGV - 1) / 2
  if count > tonumber(ARGV[1]) then return 0 end
  for i = 2, #ARGV, 2 do
    redis.call('XADD', waiting, '*', 'claim', ARGV[i], 'event', ARGV[i + 1])
    redis.call('HINCRBY', claims, ARGV[i], 1)
  end
  return 1
`)

/**
 * ARGV: this relay's id, the lease in ms, the first entry id, the most entries, the most bytes. Returns no entry while
 * another relay has the lease. The consumer groups of streams would divide the entries of one anonKey among relays.
 */
const NEXT = script(`
  local owner = redis.call('GET', lease)
  if owner and owner ~= ARGV[1] then return {} end
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
  return entries
`)

/** ARGV: this relay's id. Releases the lease. */
const RELEASE = script(`
  if redis.call('GET', lease) == ARGV[1] then redis.call('DEL', lease) end
`)

/** ARGV: id and anonKey of each. */
const ACK = script(`
  ${REMOVE}
  for i = 1, #ARGV, 2 do remove(ARGV[i], ARGV[i + 1]) end
`)

/** ARGV: now (ms), then id, anonKey, event and reason of each. */
const DEAD_LETTER = script(`
  ${REMOVE}
  for i = 2, #ARGV, 4 do
    if remove(ARGV[i], ARGV[i + 1]) then
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
  return redis.call('XDEL', dead, unpack(ARGV))
`)

export const SCRIPTS = { PUT, NEXT, RELEASE, ACK, DEAD_LETTER, REPLAY, DROP }
