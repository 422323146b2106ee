import { existsSync } from 'node:fs'
import type { Config } from '../config.ts'
import { giveOrder } from './admin-socket.ts'
import { directoryOf, openConnection, openOutbox } from '../outbox/open.ts'
import { operate, OrderError } from './admin.ts'
import { DirectoryInUse } from '../outbox/outbox.ts'

const nothing = () => {}
const silent = { debug: nothing, info: nothing, warn: nothing, error: nothing }

/**
 * `outbox list | dead | replay | drop` from the command line: see `operate`. A directory that a relay has open is left
 * to it, and asked for; Redis is open to all.
 */
export async function * command (config: Config, order: string[]): AsyncGenerator<string> {
  const directory = directoryOf(config)
  if (directory !== undefined && !existsSync(directory)) throw new OrderError(`There is no ${directory}.`)
  const redis = config.OUTBOX === 'redis' ? await openConnection(config, silent) : undefined
  try {
    const outbox = await openOutbox(config, redis, silent)
    if (outbox === undefined) throw new OrderError('OUTBOX is off: there is nothing to look at.')
    try {
      yield * operate(outbox, config, order)
    } finally {
      await outbox.close()
    }
  } catch (error) {
    if (!(error instanceof DirectoryInUse)) throw error
    yield * giveOrder(String(directory), order)
  } finally {
    redis?.disconnect()
  }
}
