import { existsSync } from 'node:fs'
import type { Config } from '../config.ts'
import { callAdminSocket } from './admin-socket.ts'
import { directoryOf, openConnection, openOutbox } from '../outbox/open.ts'
import { runAdminCommand, UsageError } from './admin.ts'
import { DirectoryInUse } from '../outbox/outbox.ts'

const noop = () => {}
const silent = { debug: noop, info: noop, warn: noop, error: noop }

/**
 * `outbox list | dead | replay | drop` from the command line: see `operate`. A directory that a relay has open is left
 * to it, and asked for; Redis is open to all.
 */
export async function * outboxCommand (config: Config, order: string[]): AsyncGenerator<string> {
  const directory = directoryOf(config)
  if (directory !== undefined && !existsSync(directory)) throw new UsageError(`There is no ${directory}.`)
  const redis = config.OUTBOX === 'redis' ? await openConnection(config, silent) : undefined
  try {
    const outbox = await openOutbox(config, redis, silent)
    if (outbox === undefined) throw new UsageError('OUTBOX is off: there is nothing to look at.')
    try {
      yield * runAdminCommand(outbox, config, order)
    } finally {
      await outbox.close()
    }
  } catch (error) {
    if (!(error instanceof DirectoryInUse)) throw error
    yield * callAdminSocket(String(directory), order)
  } finally {
    redis?.disconnect()
  }
}
