import { projectFingerprint, type Config } from '../config.ts'
import type { Log } from '../log.ts'
import { connectRedis, type Redis } from '../redis.ts'
import { DirectoryInUse, type Outbox } from './outbox.ts'

/** A relay that is silent for DEADLINE_MS plus this is dead, or waits for Mixpanel: it delivers nothing. */
const LEASE_AFTER_DEADLINE_MS = 5000

/** Resolves with a connection to REDIS_URL; undefined if it is not set. Rejects when Redis cannot be reached. */
export async function openConnection ({ REDIS_URL: url }: Config, log: Log): Promise<Redis | undefined> {
  return url === undefined ? undefined : connectRedis(url, log)
}

/** Returns the directory that OUTBOX names; undefined for other stores. */
export function directoryOf ({ OUTBOX: outbox }: Config): string | undefined {
  return outbox.startsWith('file:') ? outbox.slice('file:'.length) : undefined
}

/** Resolves with the configured outbox, if any, and loads only its modules. Rejects when it cannot be used. */
export async function openOutbox (
  config: Config, redis: Redis | undefined, log: Log
): Promise<Outbox | undefined> {
  const directory = directoryOf(config)
  if (directory !== undefined) {
    const { openSqlite } = await import('./sqlite.ts')
    try {
      return openSqlite(directory, projectFingerprint(config), log)
    } catch (error) {
      if (error instanceof DirectoryInUse) throw error
      throw new Error(`${directory} cannot be used as the outbox: ${(error as Error).message}`)
    }
  }
  if (config.OUTBOX === 'off' || redis === undefined) return undefined
  const { openRedis } = await import('./redis.ts')
  return openRedis(redis, projectFingerprint(config), log, config.DEADLINE_MS + LEASE_AFTER_DEADLINE_MS)
}
