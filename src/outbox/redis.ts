import { randomUUID } from 'node:crypto'
import { createBatcher } from '../concurrency/batcher.ts'
import { storedEvent, type PendingEvent } from '../identity/event.ts'
import { throttledError, type Log } from '../log.ts'
import { connectBackground, withTimeout, FOREGROUND_TIMEOUT_MS, type Redis } from '../redis.ts'
import {
  MAX_ENTRIES, MAX_NEXT_BYTES, type DeadLetter, type Entry, type HasResult, type Outbox, type PutResult
} from './outbox.ts'
import { SCRIPTS } from './scripts.ts'

/** The most events in one script; a script blocks all other clients of Redis. */
const MAX_PUT = 100

/** The timeout of commands that no caller waits for, and whose answers may have a megabyte. */
const BACKGROUND_TIMEOUT_MS = 5000

type Fields = [id: string, fields: string[]]

/**
 * Opens an outbox in Redis, for several relays of one project: two streams, and a lease that lets one relay at a time
 * deliver. `leaseMs` should exceed the time that a relay needs to deliver a round. `foreground` is the connection for
 * commands that callers wait for; its creator closes it. Rejects when Redis does not answer.
 */
export async function openRedis (
  foreground: Redis, project: string, log: Log, leaseMs: number, maxEntries = MAX_ENTRIES
): Promise<Outbox> {
  // The braces keep all keys on one node of a cluster.
  const keys = ['waiting', 'dead', 'claims', 'lease'].map(name => `{identify-relay:${project}}:${name}`)
  const [WAITING, DEAD, CLAIMS] = keys as [string, string, string]
  const relayId = randomUUID()
  let counts = { waiting: 0, dead: 0 }
  const background = await connectBackground(foreground, BACKGROUND_TIMEOUT_MS)
  for (const redis of [foreground, background]) {
    for (const [name, lua] of Object.entries(SCRIPTS)) redis.defineCommand(name, { numberOfKeys: keys.length, lua })
  }
  type Script = (...args: (string | number)[]) => Promise<[waiting: number, dead: number, result: unknown]>
  async function run<Result> (
    redis: Redis, name: keyof typeof SCRIPTS, ...args: (string | number)[]
  ): Promise<Result> {
    const script = (redis as unknown as Record<string, Script>)[name] as Script
    const ms = redis === foreground ? FOREGROUND_TIMEOUT_MS : BACKGROUND_TIMEOUT_MS
    const [waiting, dead, result] = await withTimeout(redis, ms, script.call(redis, ...keys, ...args))
    counts = { waiting, dead }
    return result as Result
  }

  async function refresh (): Promise<void> {
    counts = { waiting: await background.xlen(WAITING), dead: await background.xlen(DEAD) }
    await reportDurability(background, log)
  }
  await refresh()
  // A refresh that fails is repeated after the next reconnection.
  background.on('ready', () => refresh().catch(() => {}))
  const logError = throttledError((what, message) => log.error(what, message), 1000)

  const unknownFor = (items: unknown[]) => (error: Error) => {
    logError({ cause: error.message }, 'outbox unavailable')
    return items.map(() => 'unknown' as const)
  }

  /** Stores all of the events or none. */
  async function store (events: PendingEvent[]): Promise<PutResult[]> {
    const entries = events.flatMap(({ anonKey, json }) => [anonKey, json])
    const refusal = await run(foreground, 'PUT', maxEntries, ...entries)
      .then(stored => stored === 1 ? undefined : `full: ${maxEntries} entries`, refusalOf)
    if (refusal !== undefined) logError({ cause: refusal }, 'outbox write rejected')
    return events.map(() => refusal === undefined ? 'stored' : 'rejected')
  }

  async function lookUp (anonKeys: string[]): Promise<HasResult[]> {
    const counts = await withTimeout(foreground, FOREGROUND_TIMEOUT_MS, foreground.hmget(CLAIMS, ...anonKeys))
    return counts.map(count => count === null ? 'no' : 'yes')
  }

  const puts = createBatcher<PendingEvent, PutResult>({
    maxBatch: MAX_PUT, send: events => store(events).catch(unknownFor(events))
  })
  const lookups = createBatcher<string, HasResult>({
    maxBatch: MAX_PUT, send: anonKeys => lookUp(anonKeys).catch(unknownFor(anonKeys))
  })

  async function range (key: string, count: number, after?: string): Promise<Fields[]> {
    const command = background.xrange(key, startOf(after), '+', 'COUNT', count)
    return await withTimeout(background, BACKGROUND_TIMEOUT_MS, command) as Fields[]
  }

  return {
    // A batcher without maxItems never returns undefined.
    put: event => puts.add(event),
    has: anonKey => lookups.add(anonKey),
    next: async (count, after) =>
      (await run<Fields[]>(background, 'NEXT', relayId, leaseMs, startOf(after), count, MAX_NEXT_BYTES)).map(asEntry),
    ack: entries => run(background, 'ACK', ...entries.flatMap(({ id, event }) => [id, event.anonKey])),
    deadLetter: letters => run(background, 'DEAD_LETTER', Date.now(), ...letters.flatMap(
      ({ entry: { id, event }, reason }) => [id, event.anonKey, event.json, reason]
    )),
    counts: () => counts,
    waiting: async (count, after) => (await range(WAITING, count, after)).map(asEntry),
    dead: async (count, after) => (await range(DEAD, count, after)).map(asLetter),
    replay: letters => run(background, 'REPLAY', ...letters.flatMap(({ id, endpoint = '' }) => [id, endpoint])),
    drop: letters => run(background, 'DROP', ...letters.map(({ id }) => id)),
    async close () {
      await Promise.all([puts.idle(), lookups.idle()])
      // Otherwise another relay would have to wait until the lease expires.
      await run(foreground, 'RELEASE', relayId).catch(() => {})
      background.disconnect()
    }
  }
}

/** Returns the message of an error with which Redis refused to run a script; throws any other error. */
function refusalOf (error: Error): string {
  if (/\b(OOM|READONLY|MISCONF|NOREPLICAS) /.test(error.message)) return error.message
  throw error
}

const startOf = (after: string | undefined) => after === undefined ? '-' : `(${after}`

function asEntry ([id, fields]: Fields): Entry {
  const [, , , event, , endpoint] = fields as [string, string, string, string, string?, string?]
  return { id, event: storedEvent(event), ...endpoint === 'import' && { endpoint } }
}

function asLetter ([id, fields]: Fields): DeadLetter {
  const [, , , event, , reason, , died] = fields as [string, string, string, string, string, string, string, string]
  return { id, event: storedEvent(event), reason, died: new Date(Number(died)) }
}

/** Logs whether a 202 survives a power failure at Redis: at start and after each reconnection. */
async function reportDurability (redis: Redis, log: Log): Promise<void> {
  const setting = async (name: string) => (await redis.config('GET', name).catch(() => []) as string[])[1] ?? 'unknown'
  const names = ['appendonly', 'appendfsync', 'maxmemory-policy']
  const [appendonly, appendfsync, policy] = await Promise.all(names.map(setting))
  const settings = { appendonly, appendfsync, 'maxmemory-policy': policy }
  if (appendonly === 'yes' && appendfsync === 'always' && policy === 'noeviction') {
    log.info(settings, 'Redis durability sufficient')
  } else {
    // With appendfsync everysec a power failure may lose two seconds of events.
    const required = { appendonly: 'yes', appendfsync: 'always', 'maxmemory-policy': 'noeviction' }
    const message = appendonly === 'unknown' ? 'Redis durability unknown' : 'Redis durability insufficient'
    log.warn({ ...settings, required }, message)
  }
}
