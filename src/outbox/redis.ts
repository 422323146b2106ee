import { randomUUID } from 'node:crypto'
import { createBatcher } from '../batcher.ts'
import { claimOf, type IdentifyEvent } from '../event.ts'
import type { Log } from '../log.ts'
import { connectPatient, lost, type Redis } from '../redis.ts'
import { MAX_ENTRIES, MAX_TAKE_BYTES, seldom, type DeadLetter, type Entry, type Outbox } from './outbox.ts'
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
    const [waiting, dead, result] = await script.call(redis, ...keys, ...args)
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
  const complain = seldom(log)

  /** Resolves with undefined for each where Redis does not answer. */
  async function orUnknown (work: () => Promise<boolean[]>, count: number): Promise<(boolean | undefined)[]> {
    try {
      return await work()
    } catch (error) {
      lost(fast, error as Error)
      complain({ cause: (error as Error).message }, 'the outbox cannot be used')
      return Array.from({ length: count }, () => undefined)
    }
  }
  const puts = createBatcher<IdentifyEvent, boolean | undefined>({
    maxBatch: MAX_PUT,
    send: events => orUnknown(async () => {
      const entries = events.flatMap(event => [claimOf(event), JSON.stringify(event)])
      const isKept = await run(fast, 'PUT', maxEntries, ...entries) === 1
      if (!isKept) complain({ cause: `it holds ${maxEntries} entries` }, 'the outbox keeps nothing')
      return events.map(() => isKept)
    }, events.length)
  })
  const holds = createBatcher<string, boolean | undefined>({
    maxBatch: MAX_PUT,
    send: claims => orUnknown(async () => (await fast.hmget(CLAIMS, ...claims)).map(Boolean), claims.length)
  })

  const range = async (key: string, count: number, after?: string) =>
    patient.xrange(key, after === undefined ? '-' : `(${after}`, '+', 'COUNT', count) as Promise<Fields[]>

  return {
    // Neither batcher has a bound that it could refuse for.
    put: event => puts.add(event) as Promise<boolean | undefined>,
    holds: claim => holds.add(claim) as Promise<boolean | undefined>,
    async take (count, after) {
      const start = after === undefined ? '-' : `(${after}`
      return (await run<Fields[]>(patient, 'TAKE', me, leaseMs, start, count, MAX_TAKE_BYTES)).map(asEntry)
    },
    done: entries => run(patient, 'DONE', ...entries.flatMap(({ id, event }) => [id, claimOf(event)])),
    bury: letters => run(patient, 'BURY', Date.now(), ...letters.flatMap(({ entry: { id, event }, reason }) =>
      [id, claimOf(event), JSON.stringify(event), reason])),
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

function asEntry ([id, fields]: Fields): Entry {
  const [, , , event, , endpoint] = fields as [string, string, string, string, string?, string?]
  return { id, event: JSON.parse(event), ...endpoint === 'import' && { endpoint } }
}

function asLetter ([id, fields]: Fields): DeadLetter {
  const [, , , event, , reason, , died] = fields as [string, string, string, string, string, string, string, string]
  return { id, event: JSON.parse(event), reason, died: new Date(Number(died)) }
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
