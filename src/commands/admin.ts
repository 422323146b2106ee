import { setImmediate } from 'node:timers/promises'
import type { Config } from '../config.ts'
import { parseEvent } from '../identity/event.ts'
import type { DeadLetter, Entry, Outbox } from '../outbox/outbox.ts'
import { isTooOld } from '../relay/plan.ts'

/** How many are read at a time. */
const PAGE = 500

/** A mistake of the operator's; `message` is a sentence for him. */
export class UsageError extends Error {
  override readonly name = 'UsageError'
}

/**
 * Carries out an operator's order and yields what to print, whole lines. `['list']` and `['dead']`: what waits and
 * what is dead, oldest first, as JSON. `['replay', …]` and `['drop', …]` with ids or `all`: dead letters wait again, by
 * `/import` where they are too old for `/track`, or are forgotten. Throws OrderError before it has done anything.
 */
export async function * runAdminCommand (outbox: Outbox, config: Config, args: string[]): AsyncGenerator<string> {
  const [action = '', ...words] = args
  const ids = words.map(word => word === '--all' ? 'all' : word)
  const takesIds = action === 'replay' || action === 'drop'
  if (!takesIds && action !== 'list' && action !== 'dead') throw new UsageError('outbox: list, dead, replay or drop?')
  if (takesIds && ids.length === 0) throw new UsageError(`outbox ${action} takes ids, or all.`)
  if (ids.length > 1 && ids.includes('all')) throw new UsageError(`outbox ${action} takes ids, or all, not both.`)
  if (!takesIds && ids.length > 0) throw new UsageError(`outbox ${action} takes no ids.`)
  if (!takesIds) return yield * lines(action === 'list' ? outbox.waiting : outbox.dead)

  let changed = 0
  let byImport = 0
  // Those that die meanwhile are not meant.
  let left = outbox.counts().dead
  for await (const page of pages(outbox.dead)) {
    const letters = page.filter(({ id }) => ids[0] === 'all' || ids.includes(id))
      .map(({ id, event }) => ({ id, ...isTooOld({ event }, config) && { endpoint: 'import' as const } }))
    byImport += letters.filter(({ endpoint }) => endpoint === 'import').length
    if (letters.length > 0) changed += await (action === 'replay' ? outbox.replay(letters) : outbox.drop(letters))
    left -= page.length
    if (left <= 0) break
    // Others have to be served as well.
    await setImmediate()
  }
  yield action === 'drop'
    ? `${changed} dropped.\n`
    : `${changed} wait again${byImport > 0 ? `, ${byImport} of them for /import, too old for /track` : ''}.\n`
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
