import type { Redis } from 'ioredis'
import type { Log } from './log.ts'

export type { Redis }

/** No request waits longer for Redis. */
export const FOREGROUND_TIMEOUT_MS = 200

/** For what ioredis asks by itself when it connects. */
const CONNECT_COMMAND_TIMEOUT_MS = 1000

/**
 * A connection to Redis for commands that come `inTime`; while it is lost they fail at once. ioredis comes back by
 * itself; nothing is ever sent twice. Loads ioredis; rejects with a cause that holds no secret when Redis cannot be
 * reached now.
 */
export async function connectRedis (url: string, log: Log): Promise<Redis> {
  const { Redis } = await import('ioredis')
  const redis = new Redis(url, {
    lazyConnect: true,
    connectTimeout: 500,
    commandTimeout: CONNECT_COMMAND_TIMEOUT_MS,
    enableOfflineQueue: false,
    maxRetriesPerRequest: 0,
    autoResendUnfulfilledCommands: false,
    // It was a primary, and may be one elsewhere now.
    reconnectOnError: ({ message }) => message.startsWith('READONLY'),
    retryStrategy: attempts => Math.min(attempts * 50, 1000)
  })
  let cause = 'the connection was closed'
  let isUp = false
  redis.on('error', (error: NodeJS.ErrnoException) => { cause = error.code ?? error.message })
  await redis.connect().catch(() => {
    redis.disconnect()
    throw new Error(`REDIS_URL: Redis cannot be reached (${cause})`)
  })
  isUp = true
  redis.on('close', () => {
    if (isUp) log.error({ cause }, 'Redis connection lost')
    isUp = false
  })
  redis.on('ready', () => {
    isUp = true
    log.info({}, 'Redis connection restored')
  })
  return redis
}

/**
 * What `command`, sent by `redis`, resolves with, if that comes within `ms`; else a rejection, and the connection,
 * which may be dead without a word, is left for a new one: only the first callers wait. After a stall of this process
 * timers are due before sockets are read; what has arrived by then has come in time.
 */
export function withTimeout<Result> (redis: Redis, ms: number, command: Promise<Result>): Promise<Result> {
  let timer: NodeJS.Timeout | undefined
  let afterReading: NodeJS.Immediate | undefined
  const lateness = new Promise<never>((_resolve, reject) => {
    const giveUp = () => {
      redis.stream.destroy()
      reject(new Error('Redis did not answer in time'))
    }
    timer = setTimeout(() => { afterReading = setImmediate(giveUp) }, ms)
  })
  return Promise.race([command, lateness]).finally(() => {
    clearTimeout(timer)
    clearImmediate(afterReading)
  })
}

/** A second connection to the same Redis, for commands that may take `ms`. Its creator must disconnect it. */
export async function connectBackground (redis: Redis, ms: number): Promise<Redis> {
  const background = redis.duplicate({ commandTimeout: 2 * ms })
  // The first connection says that Redis is lost.
  background.on('error', () => {})
  await background.connect()
  return background
}
