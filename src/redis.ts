import type { Redis } from 'ioredis'
import type { Log } from './log.ts'

export type { Redis }

const CLOSED = 'the connection was closed'

/** The longest time that a request waits for Redis. */
export const FOREGROUND_TIMEOUT_MS = 200

/** The timeout of the commands that ioredis itself sends when it connects. */
const CONNECT_COMMAND_TIMEOUT_MS = 1000

/**
 * Resolves with a connection to Redis, for commands under `withTimeout`. While the connection is lost, commands fail at
 * once. ioredis reconnects by itself and sends no command twice. Rejects, with a cause that holds no secret, when Redis
 * cannot be reached now.
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
    // After a failover the address may lead to the new primary.
    reconnectOnError: ({ message }) => message.startsWith('READONLY'),
    retryStrategy: attempts => Math.min(attempts * 50, 1000)
  })
  let cause = CLOSED
  let isConnected = false
  redis.on('error', (error: NodeJS.ErrnoException) => { cause = error.code ?? error.message })
  await redis.connect().catch(() => {
    redis.disconnect()
    throw new Error(`REDIS_URL: Redis cannot be reached (${cause})`)
  })
  isConnected = true
  redis.on('close', () => {
    if (isConnected) log.error({ cause }, 'Redis connection lost')
    isConnected = false
  })
  redis.on('ready', () => {
    isConnected = true
    cause = CLOSED
    log.info({}, 'Redis connection restored')
  })
  return redis
}

/**
 * Resolves with the result of `command`, which `redis` has sent. Rejects after `ms` and drops the connection, which may
 * be dead without an error; ioredis opens a new one, so only the first callers wait. After a stall of this process
 * timers run before sockets are read; a result that has arrived by then is in time.
 */
export function withTimeout<Result> (redis: Redis, ms: number, command: Promise<Result>): Promise<Result> {
  let timer: NodeJS.Timeout | undefined
  let afterReading: NodeJS.Immediate | undefined
  const timeout = new Promise<never>((_resolve, reject) => {
    const expire = () => {
      redis.stream.destroy()
      reject(new Error('Redis did not answer in time'))
    }
    timer = setTimeout(() => { afterReading = setImmediate(expire) }, ms)
  })
  return Promise.race([command, timeout]).finally(() => {
    clearTimeout(timer)
    clearImmediate(afterReading)
  })
}

/** Resolves with a second connection to the same Redis, for commands that may take `ms`. The caller disconnects it. */
export async function connectBackground (redis: Redis, ms: number): Promise<Redis> {
  const background = redis.duplicate({ commandTimeout: 2 * ms })
  // The first connection logs the loss of Redis.
  background.on('error', () => {})
  await background.connect()
  return background
}
