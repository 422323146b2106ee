import type { Redis } from 'ioredis'
import type { Log } from './log.ts'

export type { Redis }

const CLOSED = 'the connection was closed'

/** The longest time that a request waits for Redis. */
export const FOREGROUND_TIMEOUT_MS = 200

/** The timeout of the commands that ioredis itself sends when it connects. */
const CONNECT_COMMAND_TIMEOUT_MS = 1000

/** A connection that Redis closes while it is idle (its `timeout`) is back sooner, and is no loss. */
const LOSS_MS = 250

/**
 * Resolves with a connection to Redis, for commands under `withTimeout`. ioredis reconnects by itself and
 * sends no command twice. In the first moments after a loss commands wait for the next attempt to connect; later they
 * fail at once. Rejects, with a cause that holds no secret, when Redis cannot be reached now.
 */
export async function connectRedis (url: string, log: Log): Promise<Redis> {
  const { Redis } = await import('ioredis')
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
  try {
    await redis.connect()
    // ioredis ignores a database that does not exist, and uses the first one.
    if (redis.options.db) await redis.select(redis.options.db)
  } catch {
    redis.disconnect()
    throw new Error(`REDIS_URL: Redis cannot be reached (${cause})`)
  }
  let lossTimer: NodeJS.Timeout | undefined
  redis.on('close', () => {
    lossTimer ??= setTimeout(() => {
      log.error({ cause }, 'Redis connection lost')
      // From now on commands fail at once.
      redis.options.enableOfflineQueue = false
    }, LOSS_MS)
  })
  redis.on('end', () => clearTimeout(lossTimer))
  redis.on('ready', () => {
    clearTimeout(lossTimer)
    lossTimer = undefined
    cause = CLOSED
    if (!redis.options.enableOfflineQueue) log.info({}, 'Redis connection restored')
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
    command.then(resolve, reject).then(end)

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
