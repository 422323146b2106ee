import type { Redis } from 'ioredis'
import { throttled, type Log } from './log.ts'

export type { Redis }

const CLOSED = 'the connection was closed'

/** The longest time that a request waits for Redis. */
export const FOREGROUND_TIMEOUT_MS = 200

/** The timeout of the commands that ioredis itself sends when it connects. */
const CONNECT_COMMAND_TIMEOUT_MS = 1000

/** A connection that Redis closes while it is idle (its `timeout`) is back sooner, and is no loss. */
const LOSS_MS = 250

/** Since when Redis is away, and the code or the message of the last error. */
export interface RedisOutage { since: Date, cause: string }

const outages = new WeakMap<Redis, RedisOutage>()

/** Returns the outage of Redis; undefined while `redis` is connected. */
export const redisOutage = (redis: Redis): RedisOutage | undefined => outages.get(redis)

interface ConnectOptions {
  /** What uses Redis, for the log. */
  uses?: string[]
  /** False where the relay can do without Redis: then one that is down is no error, and is connected later. */
  isRequired?: boolean
}

/**
 * Resolves with a connection to Redis, for commands under `withTimeout`. ioredis reconnects by itself and
 * sends no command twice. In the first moments after a loss commands wait for the next attempt to connect; later they
 * fail at once. Rejects, with a cause that holds no secret, when Redis refuses the connection, or is down but required.
 */
export async function connectRedis (
  url: string, log: Log, { uses, isRequired = true }: ConnectOptions = {}
): Promise<Redis> {
  const { default: { Redis } } = await import('ioredis')
  const redis = new Redis(url, {
    lazyConnect: true,
    connectTimeout: 500,
    commandTimeout: CONNECT_COMMAND_TIMEOUT_MS,
    maxRetriesPerRequest: 1,
    // Otherwise its first answer, which may be the reason of a refusal, is ignored.
    disableClientInfo: true,
    autoResendUnfulfilledCommands: false,
    // After a failover the address may lead to the new primary. A script wraps the word in words of its own.
    reconnectOnError: ({ message }) => /\bREADONLY\b/.test(message),
    retryStrategy: attempts => Math.min((attempts - 1) * 50, 1000)
  })
  let cause = CLOSED
  redis.on('error', (error: NodeJS.ErrnoException) => { cause = error.code ?? error.message })
  const warnOfLoss = throttled(log, 'warn', 'Redis connection lost')
  const warnOfReturn = throttled(log, 'warn', 'Redis connection restored')
  let lossTimer: NodeJS.Timeout | undefined

  function reportLoss (since: Date): void {
    outages.set(redis, { since, cause })
    warnOfLoss({ cause, since: since.toISOString(), uses })
    // From now on commands fail at once.
    redis.options.enableOfflineQueue = false
  }

  try {
    await redis.connect()
    // ioredis ignores a database that does not exist, and uses the first one.
    if (redis.options.db) await redis.select(redis.options.db)
  } catch {
    // Words are a refusal by Redis, such as a wrong password; a code is an error of the connection.
    const isDown = /^[A-Z_]+$/.test(cause)
    if (isRequired || !isDown) {
      redis.disconnect()
      throw new Error(`REDIS_URL: Redis cannot be reached (${cause})`)
    }
    reportLoss(new Date())
  }
  redis.on('close', () => {
    lossTimer ??= setTimeout(since => { if (!outages.has(redis)) reportLoss(since) }, LOSS_MS, new Date())
  })
  redis.on('end', () => clearTimeout(lossTimer))
  redis.on('ready', () => {
    clearTimeout(lossTimer)
    lossTimer = undefined
    cause = CLOSED
    const outage = outages.get(redis)
    outages.delete(redis)
    if (outage !== undefined) warnOfReturn({ since: outage.since.toISOString(), uses })
    redis.options.enableOfflineQueue = true
  })
  return redis
}

/**
 * Resolves with the result of `command`, which `redis` has sent. Rejects after `ms` and drops the connection, which may
 * be dead without an error; ioredis opens a new one, so only the first callers wait. After a stall of this process
 * timers run before sockets are read; a result that has arrived by then is in time.
 */
export function withTimeout<Result> (redis: Redis, ms: number, command: Promise<Result>): Promise<Result> {
  // While the connection is lost, the command waits for the next one.
  const stream = redis.status === 'ready' ? redis.stream : undefined
  stream?.setMaxListeners(0)
  return new Promise((resolve, reject) => {
    let afterReading: NodeJS.Immediate | undefined
    const timer = setTimeout(() => { afterReading = setImmediate(expire) }, ms)
    const onClose = () => fail(CLOSED)
    stream?.on('close', onClose)
    command.then(resolve, error => reject(AWAY.test(error.message) ? new Error('Redis is away') : error)).then(end)

    function end (): void {
      clearTimeout(timer)
      clearImmediate(afterReading)
      stream?.off('close', onClose)
    }

    function fail (cause: string): void {
      end()
      reject(new Error(cause))
    }

    function expire (): void {
      const silent = stream ?? redis.stream
      silent.destroy()
      fail('Redis did not answer in time')
    }
  })
}

/** What ioredis says of a command that it cannot send. */
const AWAY = /enableOfflineQueue|max retries per request/

/** The second connection of each. */
const seconds = new WeakMap<Redis, Redis>()

/**
 * Makes `redis` and its second connection use the user and the password in `url` from the next time they connect.
 * Returns false, and changes nothing, if it differs from `current` in anything else: the data would be elsewhere.
 */
export function useRedisCredentials (redis: Redis, current: string, url: string): boolean {
  const [now, next] = [new URL(current), new URL(url)]
  const [username, password] = [decodeURIComponent(next.username), decodeURIComponent(next.password)]
  for (const one of [now, next]) one.username = one.password = ''
  if (now.href !== next.href) return false
  for (const { options } of [redis, seconds.get(redis)].filter(one => one !== undefined)) {
    Object.assign(options, { username, password })
  }
  return true
}

/** Resolves with a second connection to the same Redis, for commands that may take `ms`. The caller disconnects it. */
export async function connectBackground (redis: Redis, ms: number): Promise<Redis> {
  const background = redis.duplicate({ commandTimeout: 2 * ms })
  // The first connection logs the loss of Redis.
  background.on('error', () => {})
  seconds.set(redis, background)
  await background.connect()
  return background
}
