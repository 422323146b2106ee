import { existsSync, statfsSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { projectOf, type Config } from '../config.ts'
import type { Log } from '../log.ts'
import type { Metrics } from '../metrics.ts'
import { connectRedis, type Redis } from '../redis.ts'
import { DirectoryInUse, MAX_ENTRIES, type Outbox } from './outbox.ts'

/** A relay that is silent for DEADLINE_MS plus this is dead, or waits for Mixpanel: it delivers nothing. */
const LEASE_AFTER_DEADLINE_MS = 5000

/**
 * Resolves with a connection to REDIS_URL; undefined if it is not set. Rejects when Redis refuses it, and when it is
 * down and shall hold the outbox. Rate limits can do without it.
 */
export async function openConnection (
  { REDIS_URL: url, OUTBOX: outbox }: Config, log: Log
): Promise<Redis | undefined> {
  if (url === undefined) return undefined
  const isRequired = outbox === 'redis'
  return connectRedis(url, log, { isRequired, uses: ['rate limits', ...isRequired ? ['outbox'] : []] })
}

/** Returns the relay's own directory in the one that OUTBOX names: its mode is 0700, whatever that of the other. */
export function directoryOf ({ OUTBOX: outbox }: Config): string | undefined {
  return outbox.startsWith('file:') ? join(outbox.slice('file:'.length), 'relay') : undefined
}

/** Returns true if `directory`, a `directoryOf`, or files of the first release beside it exist. */
export const hasOutbox = (directory: string) =>
  existsSync(directory) || existsSync(join(dirname(directory), 'outbox.db'))

/** File systems that forget files, or lack the locks or the fsync that SQLite needs, by their type in statfs(2). */
const WEAK_FILE_SYSTEMS = new Map([
  [0x01021994, 'tmpfs'], [0x858458f6, 'ramfs'], [0x6969, 'NFS'], [0x517b, 'SMB'], [0xff534d42, 'CIFS'],
  [0xfe534d42, 'SMB 2'], [0x01021997, '9p']
])

/** Returns the name of a directory's file system if a 202 is worth less there, otherwise undefined. */
export const weakFileSystem = (directory: string) => WEAK_FILE_SYSTEMS.get(statfsSync(directory).type)

/** Logs a warning when a 202 is worth less on the file system of a directory. */
function reportFileSystem (directory: string, log: Log): void {
  const name = weakFileSystem(directory)
  const risk = 'queued identities may be lost when the machine or its network fails'
  if (name !== undefined) log.warn({ file_system: name, risk }, 'outbox on a weak file system')
}

/** Resolves with the configured outbox, if any, and loads only its modules. Rejects when it cannot be used. */
export async function openOutbox (
  config: Config, redis: Redis | undefined, log: Log, metrics?: Metrics
): Promise<Outbox | undefined> {
  const directory = directoryOf(config)
  if (directory !== undefined) {
    const { openSqlite } = await import('./sqlite.ts')
    try {
      const outbox = await openSqlite(directory, projectOf(config), log, { maxEntries: MAX_ENTRIES }, metrics)
      reportFileSystem(directory, log)
      return outbox
    } catch (error) {
      if (error instanceof DirectoryInUse) throw error
      throw new Error(`OUTBOX: ${dirname(directory)} cannot be used: ${(error as Error).message}`)
    }
  }
  if (config.OUTBOX === 'off' || redis === undefined) return undefined
  const { openRedis } = await import('./redis.ts')
  const leaseMs = config.DEADLINE_MS + LEASE_AFTER_DEADLINE_MS
  return openRedis(redis, projectOf(config), log, { leaseMs, maxEntries: MAX_ENTRIES }, metrics)
}
