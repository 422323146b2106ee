import { setImmediate } from 'node:timers/promises'
import type { Config } from '../config.ts'
import { idsOf, type PendingEvent } from '../identity/event.ts'
import { NO_METRICS, type Metrics } from '../metrics.ts'
import type { DeadLetter, Entry, Listed, Outbox } from '../outbox/outbox.ts'
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
 * `/import` when too old for `/track`, or delete them. `['drop', '--user', id]` deletes all that is stored of a user.
 * `['pause']` stops delivery until `['resume']`. Throws a UsageError before it has changed anything.
 */
export async function * runAdminCommand (
  outbox: Outbox, config: Config, args: string[], metrics: Metrics = NO_METRICS
): AsyncGenerator<string> {
  const [action = '', ...operands] = args
  if (!ACTIONS.includes(action)) throw new UsageError(`outbox takes one of ${ACTIONS.join(', ')}.`)
  if (action === 'drop' && operands[0] === '--user') {
    const [, user, ...others] = operands
    if (!user || others.length > 0) throw new UsageError('outbox drop --user takes one id of a user.')
    return yield await eraseUser(outbox, user, metrics)
  }
  if (action === 'replay' || action === 'drop') {
    return yield * changeDeadLetters(outbox, config, action, operands, metrics)
  }
  if (operands.length > 0) throw new UsageError(`outbox ${action} takes no ids.`)
  if (action === 'list') return yield * lines(outbox.waiting)
  if (action === 'dead') return yield * lines(outbox.dead)
  await outbox.pause(action === 'pause')
  yield action === 'pause' ? 'Delivery is paused. Identities are queued until outbox resume.\n' : 'Delivery goes on.\n'
}

const ACTIONS = ['list', 'dead', 'replay', 'drop', 'pause', 'resume']

async function * changeDeadLetters (
  outbox: Outbox, config: Config, action: 'replay' | 'drop', operands: string[], metrics: Metrics
): AsyncGenerator<string> {
  const ids = operands.map(operand => operand === '--all' ? 'all' : operand)
  if (ids.length === 0) throw new UsageError(`outbox ${action} takes ids, or all.`)
  if (ids.length > 1 && ids.includes('all')) throw new UsageError(`outbox ${action} takes ids, or all, not both.`)
  let changed = 0
  let byImport = 0
  // The command leaves out dead letters that are added while it runs.
  let remaining = outbox.counts().dead
  for await (const page of pages(outbox.dead)) {
    const letters = page.filter(({ id }) => ids[0] === 'all' || ids.includes(id))
      .map(({ id, event }) => ({ id, ...event && isTooOld({ event }, config) && { endpoint: 'import' as const } }))
    byImport += letters.filter(({ endpoint }) => endpoint === 'import').length
    if (letters.length > 0) changed += await (action === 'replay' ? outbox.replay(letters) : outbox.drop(letters))
    remaining -= page.length
    if (remaining <= 0) break
    // Lets the relay serve requests between two pages.
    await setImmediate()
  }
  metrics.outbox(action === 'drop' ? 'dropped' : 'replayed', 'operator', changed)
  yield action === 'drop'
    ? `${changed} dropped.\n`
    : `${changed} queued again${byImport > 0 ? `, ${byImport} of them for /import: too old for /track` : ''}.\n`
  const unknown = ids[0] === 'all' ? 0 : new Set(ids).size - changed
  if (unknown > 0) yield `${unknown} unknown: see outbox dead.\n`
}

/** Deletes the queued events and dead letters of a user. What is under way to Mixpanel at this moment arrives. */
async function eraseUser (outbox: Outbox, user: string, metrics: Metrics): Promise<string> {
  const isOfUser = ({ event }: Listed) => event?.userId === user
  let queued = 0
  let dead = 0
  for await (const page of pages(outbox.waiting)) {
    const entries = page.filter((entry): entry is Entry => isOfUser(entry))
    if (entries.length > 0) queued += await outbox.erase(entries)
    await setImmediate()
  }
  for await (const page of pages(outbox.dead)) {
    const letters = page.filter(isOfUser)
    if (letters.length > 0) dead += await outbox.drop(letters)
    await setImmediate()
  }
  metrics.outbox('erased', 'operator', queued)
  metrics.outbox('dropped', 'operator', dead)
  return `${queued} queued and ${dead} dead letters dropped.\n`
}

async function * pages<T extends { id: string }> (read: (count: number, after?: string) => Promise<T[]>) {
  let last: T | undefined
  do {
    const page = await read(PAGE, last?.id)
    if (page.length > 0) yield page
    last = page.at(-1)
  } while (last !== undefined)
}

async function * lines (read: (count: number, after?: string) => Promise<(Listed | DeadLetter)[]>) {
  for await (const page of pages(read)) {
    for (const { event, ...rest } of page) yield `${JSON.stringify({ ...rest, ...event && describe(event) })}\n`
  }
}

function describe (event: PendingEvent) {
  const { userId: identified, anonId: anon } = idsOf(event)
  const validated = new Date(event.time * 1000)
  return { validated, insert_id: event.insertId, identified_id: identified, anon_id: anon }
}
