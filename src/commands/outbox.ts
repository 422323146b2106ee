import { dirname } from 'node:path'
import type { Config } from '../config.ts'
import { silentLog } from '../log.ts'
import { callAdminSocket } from './admin-socket.ts'
import { directoryOf, hasOutbox, openConnection, openOutbox } from '../outbox/open.ts'
import { runAdminCommand, UsageError } from './admin.ts'
import { DirectoryInUse } from '../outbox/outbox.ts'

/**
 * Runs an `outbox` command and yields the text to print: see `runAdminCommand`. A relay that has the outbox directory
 * open runs the command itself; Redis allows several processes. Throws a UsageError without an outbox.
 */
export async function * outboxCommand (config: Config, args: string[]): AsyncGenerator<string> {
  const directory = directoryOf(config)
  if (directory !== undefined && !hasOutbox(directory)) {
    throw new UsageError(`There is no outbox in ${dirname(directory)}.`)
  }
  const redis = config.OUTBOX === 'redis' ? await openConnection(config, silentLog) : undefined
  try {
    const outbox = await openOutbox(config, redis, silentLog)
    if (outbox === undefined) throw new UsageError('OUTBOX is off: there is no outbox.')
    try {
      yield * runAdminCommand(outbox, config, args)
    } finally {
      await outbox.close()
    }
  } catch (error) {
    if (!(error instanceof DirectoryInUse)) throw error
    yield * callAdminSocket(String(directory), args)
  } finally {
    redis?.disconnect()
  }
}
