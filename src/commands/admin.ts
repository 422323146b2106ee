import { setImmediate } from 'node:timers/promises'
import type { Config } from '../config.ts'
import { parseEvent } from '../identity/event.ts'
import type { DeadLetter, Entry, Outbox } from '../outbox/outbox.ts'
import { isTooOld } from '../relay/plan.ts'

/** The number of entries in one read. */
const PAGE = 500

/** A mistake in an operator's command. `message` is a sentence for the operator. */
export class UsageError extends Error {
  override readonly name = 'UsageError'
}

/**
 * Runs an admin command and yields whole lines to print. `['list']` and `['dead']` list queued events and dead letters
 * as JSON, oldest first. `['replay', …]` and `['drop', …]` take ids or `all`. They queue dead letters again, through
 * `/import` when too old for `/track`, or delete them. Throws a UsageError before it has changed anything.
 */
export async function * runAdminCommand (outbox: Outbox, config: Config, args: string[]): AsyncGenerator<string> {
  const [action = '', ...operands] = args
  const ids = operands.map(operand => operand === '--all' ? 'all' : operand)
  const takesIds = action === 'replay' || action === 'drop'
  if (!takesIds && action !== 'list' && action !== 'dead') {
    throw new UsageError('outbox takes list, dead, replay or drop.')
  }
  if (takesIds && ids.length === 0) throw new UsageError(`outbox ${action} takes ids, or all.`)
  if (ids.length > 1 && ids.includes('all')) throw new UsageError(`outbox ${action} takes ids, or all, not both.`)
  if (!takesIds && ids.length > 0) throw new UsageError(`outbox ${action} takes no ids.`)
  if (!takesIds) return yield * lines(action === 'list' ? outbox.waiting : outbox.dead)

  let changed = 0
  let byImport = 0
  // The command leaves out dead letters that are added while it runs.
  let remaining = outbox.counts().dead
  for await (const page of pages(outbox.dead)) {
    const letters = page.filter(({ id }) => ids[0] === 'all' || ids.includes(id))
      .map(({ id, event }) => ({ id, ...isTooOld({ event }, config) && { endpoint: 'import' as const } }))
    byImport += letters.filter(({ endpoint }) => endpoint === 'import').length
    if (letters.length > 0) changed += await (action === 'replay' ? outbox.replay(letters) : outbox.drop(letters))
    remaining -= page.length
    if (remaining <= 0) break
    // Lets the relay serve requests between two pages.
    await setImmediate()
  }
  yield action === 'drop'
    ? `${changed} dropped.\n`
    : `${changed} queued again${byImport > 0 ? `, ${byImport} of them for /import: too old for /track` : ''}.\n`
  const unknown = ids[0] === 'all' ? 0 : new Set(ids).size - changed
  if (unknown > 0) yield `${unknown} unknown: see outbox dead.\n`
}

async function * pages<T extends { id: string }> (read: (count: number, after?: string) => Promise<T[]>) {
  let last: T | undefined
  do {
    const page = await read(PAGE, last?.id)
    if (page.length > 0) yield page
    last = page.at(-1)
  } while (last !== undefined)
}

async function * lines (read: (count: number, after?: string) => Promise<(Entry | DeadLetter)[]>) {
  for await (const page of pages(read)) {
    for (const { event, ...rest } of page) {
      const { $identified_id: identified, $anon_id: anon } = parseEvent(event).properties
      const accepted = new Date(event.time * 1000)
      const line = { ...rest, accepted, insert_id: event.insertId, identified_id: identified, anon_id: anon }
      yield `${JSON.stringify(line)}\n`
    }
  }
}
