import type { FastifyRateLimitStore } from '@fastify/rate-limit'
import { throttledError, type Log } from '../../log.ts'
import { withTimeout, FOREGROUND_TIMEOUT_MS, type Redis } from '../../redis.ts'

/** How many callers are remembered. Beyond that the one whose window began first is forgotten. */
const MAX_CALLERS = 100_000

/** How often it is said that Redis does not count. */
const COMPLAINT_MS = 60_000

/** What a caller has used of its window, with what it asks for now, and how long the window still lasts in ms. */
export interface Usage { current: number, ttl: number }

interface Options {
  /** The most that a caller may use of one window, and the window's length in ms. */
  max: number
  windowMs: number
  /** Where all relays count together, and what its keys begin with. */
  redis?: { connection: Redis, prefix: string } | undefined
  log: Log
}

/**
 * KEYS: a caller's counter. ARGV: how much is asked for, the most, the window in ms. Counts it where that is allowed.
 * Returns { used, with what is asked for; ms until the window ends }.
 */
const COUNT = `
local used, asked = tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[1])
if used + asked <= tonumber(ARGV[2]) then redis.call('INCRBY', KEYS[1], asked) end
local left = redis.call('PTTL', KEYS[1])
if left < 0 then
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  left = tonumber(ARGV[3])
end
return { used + asked, left }`

export type RateLimitStore = FastifyRateLimitStore & {
  /**
   * Counts one request of a caller and returns true, if the limit allows it and Redis need not be asked; otherwise
   * `incr` must decide. It spares nearly every request the four promises that @fastify/rate-limit makes.
   */
  countNow: (key: string) => boolean
  /** Counts `amount` for a caller if the limit allows it, and resolves with what that makes. Never rejects. */
  add: (key: string, amount: number) => Promise<Usage>
  /** Counts `amount` for a caller, whatever the limit is: it has been spent. Never rejects. */
  charge: (key: string, amount: number) => Promise<Usage>
}

/**
 * The counters of @fastify/rate-limit: fixed windows, one for each caller and all routes. With Redis all relays count
 * together; while it fails or refuses, each goes by its own count, which it keeps all the time.
 */
export function createRateLimitStore ({ max, windowMs, redis, log }: Options): RateLimitStore {
  const countLocally = createCounter(windowMs)
  const logError = throttledError((what, message) => log.warn(what, message), COMPLAINT_MS)
  const countShared = redis && createSharedCounter(redis, windowMs)

  function add (key: string, amount: number, most = max): Usage | Promise<Usage> {
    const here = countLocally(key, amount, most)
    return countShared?.(key, amount, most).catch(error => {
      logError({ cause: error.message }, 'rate limit store unavailable')
      return here
    }) ?? here
  }

  const store: RateLimitStore = {
    incr (key, callback) {
      const usage = add(key, 1)
      if ('then' in usage) usage.then(found => callback(null, found), error => callback(error))
      else callback(null, usage)
    },
    countNow: key => redis === undefined && countLocally(key, 1, max).current <= max,
    // One budget for all routes.
    child: () => store,
    add: async (key, amount) => add(key, amount),
    charge: async (key, amount) => add(key, amount, Number.MAX_SAFE_INTEGER)
  }
  return store
}

/** Counts in this process, by a clock that nobody sets. */
function createCounter (windowMs: number): (key: string, amount: number, most: number) => Usage {
  /** The callers in the order in which their windows began. */
  const windows = new Map<string, { used: number, since: number }>()

  return (key, amount, most) => {
    const now = performance.now()
    let window = windows.get(key)
    if (window === undefined || now - window.since >= windowMs) {
      windows.delete(key)
      if (windows.size >= MAX_CALLERS) windows.delete(windows.keys().next().value as string)
      window = { used: 0, since: now }
      windows.set(key, window)
    }
    const current = window.used + amount
    if (current <= most) window.used = current
    return { current, ttl: window.since + windowMs - now }
  }
}

/** Counts in Redis. Rejects where Redis does not count, for whatever reason, within SOON_MS. */
function createSharedCounter (
  { connection, prefix }: NonNullable<Options['redis']>, windowMs: number
) {
  type Script = (key: string, ...args: number[]) => Promise<[current: number, ttl: number]>
  connection.defineCommand('identifyRateLimit', { numberOfKeys: 1, lua: COUNT })
  const { identifyRateLimit: count } = connection as unknown as { identifyRateLimit: Script }
  return async (key: string, amount: number, most: number): Promise<Usage> => {
    const command = count.call(connection, prefix + key, amount, most, windowMs)
    const [current, ttl] = await withTimeout(connection, FOREGROUND_TIMEOUT_MS, command)
    return { current, ttl }
  }
}
