import type { Redis } from 'ioredis'
import type { Log } from './log.ts'

export type { Redis }

/** No request waits longer for Redis. */
const COMMAND_TIMEOUT_MS = 200

/**
 * A connection to Redis that answers soon or fails soon: a command takes at most 200 ms, and while the connection is
 * lost it fails at once. ioredis comes back by itself; nothing is ever sent twice. Loads ioredis; rejects with a cause
 * that holds no secret when Redis cannot be reached now.
 */
export async function connectRedis (url: string, log: Log): Promise<Redis> {
  const { Redis } = await import('ioredis')
  const redis = new Redis(url, {
    lazyConnect: true,
    connectTimeout: 500,
    commandTimeout: COMMAND_TIMEOUT_MS,
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
    if (isUp) log.error({ cause }, 'Redis is lost')
    isUp = false
  })
  redis.on('ready', () => {
    isUp = true
    log.info({}, 'Redis is back')
  })
  return redis
}

/**
 * To be told of every failed command. A Redis that does not answer is left, and until it answers again its commands
 * fail at once: only the first callers have waited for it.
 */
export function lost (redis: Redis, error: Error): void {
  if (error.message === 'Command timed out' && redis.status === 'ready') redis.disconnect(true)
}

/** A second connection to the same Redis, whose commands may take `ms`. Its creator must disconnect it. */
export async function connectPatient (redis: Redis, ms: number): Promise<Redis> {
  const patient = redis.duplicate({ commandTimeout: ms })
  // The first connection says that Redis is lost.
  patient.on('error', () => {})
  await patient.connect()
  return patient
}
