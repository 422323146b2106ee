import type { FastifyRateLimitStore } from '@fastify/rate-limit'
import { makeRoom } from '../../concurrency/make-room.ts'
import { throttled, type Log } from '../../log.ts'
import { withTimeout, FOREGROUND_TIMEOUT_MS, type Redis } from '../../redis.ts'

/**
 * The most callers in memory below their limit, and as many at it. Beyond that those with the oldest windows are
 * forgotten. A flood of new addresses therefore frees no caller that is at its limit.
 */
const MAX_CALLERS = 100_000

/** The usage of a caller in its window, this request included, and the time until the window ends, in ms. */
export interface Usage { current: number, ttl: number }

interface Options {
  /** The limit of a caller in one window, and the length of the window in ms. */
  max: number
  windowMs: number
  /** The connection through which all relays count together, and the prefix of its keys. */
  redis?: { connection: Redis, prefix: string } | undefined
  log: Log
}

/**
 * KEYS: a caller's counter. ARGV: the amount, the limit, the window in ms. Adds the amount when the limit allows it.
 * Returns { usage with the amount, ms until the window ends }.
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
   * Counts one request and returns true when the limit allows it and there is no Redis. Otherwise `incr` must decide.
   * This saves nearly every request the four promises of @fastify/rate-limit.
   */
  countNow: (key: string) => boolean
  /** Adds `amount` when the limit allows it, and resolves with the usage. Never rejects. */
  add: (key: string, amount: number) => Promise<Usage>
  /** Adds `amount` even beyond the limit, and resolves with the usage. Never rejects. */
  charge: (key: string, amount: number) => Promise<Usage>
}

/**
 * Returns the store of @fastify/rate-limit: one fixed window for each caller, shared by all routes. With Redis all
 * relays count together. While Redis fails or refuses, each relay uses its own count, which it always keeps.
 */
export function createRateLimitStore ({ max, windowMs, redis, log }: Options): RateLimitStore {
  const countLocally = createCounter(windowMs)
  const warn = throttled(log, 'warn', 'rate limit store unavailable')
  const countShared = redis && createSharedCounter(redis, windowMs)

  function add (key: string, amount: number, limit = max): Usage | Promise<Usage> {
    const local = countLocally(key, amount, limit)
    return countShared?.(key, amount, limit).catch(error => {
      warn({ cause: error.message })
      return local
    }) ?? local
  }

  const store: RateLimitStore = {
    incr (key, callback) {
      const usage = add(key, 1)
      if ('then' in usage) usage.then(shared => callback(null, shared), error => callback(error))
      else callback(null, usage)
    },
    countNow: key => redis === undefined && countLocally(key, 1, max).current <= max,
    child: () => store,
    add: async (key, amount) => add(key, amount),
    charge: async (key, amount) => add(key, amount, Number.MAX_SAFE_INTEGER)
  }
  return store
}

/** Returns a counter in this process, on a monotonic clock. */
function createCounter (windowMs: number): (key: string, amount: number, limit: number) => Usage {
  interface Window { used: number, since: number }
  const below = new Map<string, Window>()
  const exhausted = new Map<string, Window>()

  function move (key: string, window: Window, from: Map<string, Window>, to: Map<string, Window>): void {
    from.delete(key)
    makeRoom(to, MAX_CALLERS)
    to.set(key, window)
  }

  return (key, amount, limit) => {
    const now = performance.now()
    let window = below.get(key) ?? exhausted.get(key)
    if (window === undefined || now - window.since >= windowMs) {
      below.delete(key)
      window = { used: 0, since: now }
      move(key, window, exhausted, below)
    }
    const current = window.used + amount
    if (current <= limit) window.used = current
    else if (below.has(key)) move(key, window, below, exhausted)
    return { current, ttl: window.since + windowMs - now }
  }
}

/** Returns a counter in Redis. It rejects when Redis does not count within FOREGROUND_TIMEOUT_MS, for any reason. */
function createSharedCounter (
  { connection, prefix }: NonNullable<Options['redis']>, windowMs: number
) {
  type Script = (key: string, ...args: number[]) => Promise<[current: number, ttl: number]>
  connection.defineCommand('identifyRateLimit', { numberOfKeys: 1, lua: COUNT })
  const { identifyRateLimit: count } = connection as unknown as { identifyRateLimit: Script }
  return async (key: string, amount: number, limit: number): Promise<Usage> => {
    const command = count.call(connection, prefix + key, amount, limit, windowMs)
    const [current, ttl] = await withTimeout(connection, FOREGROUND_TIMEOUT_MS, command)
    return { current, ttl }
  }
}
