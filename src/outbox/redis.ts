import { randomUUID } from 'node:crypto'
import { createBatcher } from '../concurrency/batcher.ts'
import { storedEvent, type PendingEvent } from '../identity/event.ts'
import { throttled, type Log } from '../log.ts'
import { connectPatient, inTime, SOON_MS, type Redis } from '../redis.ts'
import { MAX_ENTRIES, MAX_TAKE_BYTES, type DeadLetter, type Entry, type Outbox } from './outbox.ts'
import { SCRIPTS } from './scripts.ts'

/** In one script, which holds up everybody else at Redis. */
const MAX_PUT = 100

/** For what no caller waits for, and what may be a megabyte. */
const PATIENCE_MS = 5000

type Fields = [id: string, fields: string[]]

/**
 * An outbox in Redis for several relays of one project: streams, and a lease that lets one relay at a time deliver.
 * `leaseMs` should be longer than a relay may need to deliver what it took. `fast` is a connection for what callers
 * wait for, and stays its creator's to close. Rejects when Redis cannot be asked.
 */
export async function openRedis (
  fast: Redis, project: string, log: Log, leaseMs: number, maxEntries = MAX_ENTRIES
): Promise<Outbox> {
  // Braces: these live on one node, wherever there are several.
  const keys = ['waiting', 'dead', 'claims', 'lease'].map(name => `{identify-relay:${project}}:${name}`)
  const [WAITING, DEAD, CLAIMS] = keys as [string, string, string]
  const me = randomUUID()
  let counts = { waiting: 0, dead: 0 }
  const patient = await connectPatient(fast, PATIENCE_MS)
  for (const redis of [fast, patient]) {
    for (const [name, lua] of Object.entries(SCRIPTS)) redis.defineCommand(name, { numberOfKeys: keys.length, lua })
  }
  type Script = (...args: (string | number)[]) => Promise<[waiting: number, dead: number, result: unknown]>
  async function run<Result> (
    redis: Redis, name: keyof typeof SCRIPTS, ...args: (string | number)[]
  ): Promise<Result> {
    const script = (redis as unknown as Record<string, Script>)[name] as Script
    const ms = redis === fast ? SOON_MS : PATIENCE_MS
    const [waiting, dead, result] = await inTime(redis, ms, script.call(redis, ...keys, ...args))
    counts = { waiting, dead }
    return result as Result
  }

  async function greet (): Promise<void> {
    counts = { waiting: await patient.xlen(WAITING), dead: await patient.xlen(DEAD) }
    await reportDurability(patient, log)
  }
  await greet()
  // Whatever it cannot be asked now it says another time.
  patient.on('ready', () => greet().catch(() => {}))
  const complain = throttled((what, message) => log.error(what, message), 1000)

  /** What `work` resolves with for each, or `undefined` where Redis does not say. */
  async function orUnknown (count: number, work: () => Promise<boolean[]>): Promise<(boolean | undefined)[]> {
    try {
      return await work()
    } catch (error) {
      complain({ cause: (error as Error).message }, 'the outbox cannot be used')
      return Array.from({ length: count }, () => undefined)
    }
  }

  /** Whether all of them are kept. */
  async function keep (events: PendingEvent[]): Promise<boolean> {
    const entries = events.flatMap(({ anonKey, json }) => [anonKey, json])
    const refusal = await run(fast, 'PUT', maxEntries, ...entries)
      .then(isKept => isKept === 1 ? undefined : `it holds ${maxEntries} entries`, unlessRefused)
    if (refusal !== undefined) complain({ cause: refusal }, 'the outbox keeps nothing')
    return refusal === undefined
  }

  const puts = createBatcher<PendingEvent, boolean | undefined>({
    maxBatch: MAX_PUT,
    send: events => orUnknown(events.length, async () => {
      const isKept = await keep(events)
      return events.map(() => isKept)
    })
  })
  const holds = createBatcher<string, boolean | undefined>({
    maxBatch: MAX_PUT,
    send: claims => orUnknown(claims.length, async () =>
      (await inTime(fast, SOON_MS, fast.hmget(CLAIMS, ...claims))).map(Boolean))
  })

  const range = async (key: string, count: number, after?: string) =>
    inTime(patient, PATIENCE_MS, patient.xrange(key, from(after), '+', 'COUNT', count)) as Promise<Fields[]>

  return {
    // Neither batcher has a bound that it could refuse for.
    put: event => puts.add(event) as Promise<boolean | undefined>,
    holds: claim => holds.add(claim) as Promise<boolean | undefined>,
    take: async (count, after) =>
      (await run<Fields[]>(patient, 'TAKE', me, leaseMs, from(after), count, MAX_TAKE_BYTES)).map(asEntry),
    done: entries => run(patient, 'DONE', ...entries.flatMap(({ id, event }) => [id, event.anonKey])),
    bury: letters => run(patient, 'BURY', Date.now(), ...letters.flatMap(({ entry: { id, event }, reason }) =>
      [id, event.anonKey, event.json, reason])),
    counts: () => counts,
    waiting: async (count, after) => (await range(WAITING, count, after)).map(asEntry),
    dead: async (count, after) => (await range(DEAD, count, after)).map(asLetter),
    replay: letters => run(patient, 'REPLAY', ...letters.flatMap(({ id, endpoint = '' }) => [id, endpoint])),
    drop: letters => run(patient, 'DROP', ...letters.map(({ id }) => id)),
    async close () {
      await Promise.all([puts.idle(), holds.idle()])
      // Without it another relay would have to wait for the lease to end.
      await run(fast, 'RELEASE', me).catch(() => {})
      patient.disconnect()
    }
  }
}

/** Redis's own words for what it has not begun; other errors are thrown. */
function unlessRefused (error: Error): string {
  if (/\b(OOM|READONLY|MISCONF|NOREPLICAS) /.test(error.message)) return error.message
  throw error
}

/** The first id of a range of a stream. */
const from = (after: string | undefined) => after === undefined ? '-' : `(${after}`

function asEntry ([id, fields]: Fields): Entry {
  const [, , , event, , endpoint] = fields as [string, string, string, string, string?, string?]
  return { id, event: storedEvent(event), ...endpoint === 'import' && { endpoint } }
}

function asLetter ([id, fields]: Fields): DeadLetter {
  const [, , , event, , reason, , died] = fields as [string, string, string, string, string, string, string, string]
  return { id, event: storedEvent(event), reason, died: new Date(Number(died)) }
}

/** What a 202 is worth here: said at start and whenever Redis comes back. */
async function reportDurability (redis: Redis, log: Log): Promise<void> {
  const setting = async (name: string) => (await redis.config('GET', name).catch(() => []) as string[])[1] ?? 'unknown'
  const names = ['appendonly', 'appendfsync', 'maxmemory-policy']
  const [appendonly, appendfsync, policy] = await Promise.all(names.map(setting))
  const settings = { appendonly, appendfsync, 'maxmemory-policy': policy }
  if (appendonly === 'yes' && appendfsync === 'always' && policy === 'noeviction') {
    log.info(settings, 'a 202 survives the loss of power at Redis')
  } else if (appendonly === 'unknown') {
    log.warn(settings, 'Redis does not tell how it keeps its data: a 202 is worth what its appendfsync is')
  } else {
    log.warn(settings, 'a 202 may not survive the loss of power at Redis: ' +
      'it needs appendonly yes, appendfsync always (everysec may lose two seconds) and maxmemory-policy noeviction')
  }
}
