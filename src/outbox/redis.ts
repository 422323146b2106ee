import { randomUUID } from 'node:crypto'
import { createBatcher } from '../batcher.ts'
import { claimOf, type IdentifyEvent } from '../event.ts'
import { lost, type Redis } from '../redis.ts'
import { MAX_ENTRIES, seldom, type DeadLetter, type Entry, type Outbox, type StoreLog } from './outbox.ts'
import { SCRIPTS } from './scripts.ts'

/** In one script, which holds up everybody else at Redis. */
const MAX_PUT = 500

/** A caller is told that nothing was kept after 200 ms; what Redis runs later, because it was stopped, must not be. */
const PUT_WITHIN_MS = 150

/** The most that one `take` asks for. */
const MAX_TAKE = 2000

type Fields = [id: string, fields: string[]]

/**
 * An outbox in Redis for several relays of one project: streams, with a consumer group that one relay at a time takes
 * from. `claimAfterMs` must be longer than a relay may need to deliver what it took. `redis` stays its creator's to
 * close. Rejects when Redis cannot be asked.
 */
export async function openRedis (
  redis: Redis, project: string, log: StoreLog, claimAfterMs: number, maxEntries = MAX_ENTRIES
): Promise<Outbox> {
  // Braces: in a cluster the three live on one node.
  const keys = ['waiting', 'dead', 'claims'].map(name => `{identify-relay:${project}}:${name}`)
  const [WAITING, DEAD, CLAIMS] = keys as [string, string, string]
  const me = `relay-${randomUUID()}`
  let counts = { waiting: 0, dead: 0 }
  /** Redis's clock minus ours, in ms. */
  let offset = 0

  for (const [name, lua] of Object.entries(SCRIPTS)) redis.defineCommand(name, { numberOfKeys: keys.length, lua })
  type Script = (...args: (string | number)[]) => Promise<[waiting: number, dead: number, result: unknown]>
  async function run<Result> (name: keyof typeof SCRIPTS, ...args: (string | number)[]): Promise<Result> {
    const script = (redis as unknown as Record<string, Script>)[name] as Script
    const [waiting, dead, result] = await script.call(redis, ...keys, ...args).catch(error => {
      lost(redis, error)
      throw error
    })
    counts = { waiting, dead }
    return result as Result
  }

  async function greet (): Promise<void> {
    const [seconds, micros] = await redis.time()
    offset = Number(seconds) * 1000 + Number(micros) / 1000 - Date.now()
    counts = { waiting: await redis.xlen(WAITING), dead: await redis.xlen(DEAD) }
    await reportDurability(redis, log)
  }
  const greetAgain = () => greet().catch(error => log.error({ cause: error.message }, 'Redis cannot be asked'))
  await greet()
  redis.on('ready', greetAgain)

  const complain = seldom(log)

  /** Resolves with `failed` for each where Redis does not answer. */
  async function orElse<Result> (work: () => Promise<Result[]>, count: number, failed: Result): Promise<Result[]> {
    try {
      return await work()
    } catch (error) {
      lost(redis, error as Error)
      complain({ cause: (error as Error).message }, 'the outbox cannot be used')
      return Array.from({ length: count }, () => failed)
    }
  }
  const puts = createBatcher<IdentifyEvent, boolean>({
    maxBatch: MAX_PUT,
    send: events => orElse(async () => {
      const latest = Math.floor(Date.now() + offset + PUT_WITHIN_MS)
      const result = await run('PUT', maxEntries, latest,
        ...events.flatMap(event => [claimOf(event), JSON.stringify(event)]))
      if (result !== 'kept') complain({ cause: result }, 'the outbox keeps nothing')
      return events.map(() => result === 'kept')
    }, events.length, false)
  })
  const holds = createBatcher<string, boolean | undefined>({
    maxBatch: MAX_PUT,
    send: claims => orElse<boolean | undefined>(
      async () => (await redis.hmget(CLAIMS, ...claims)).map(count => count !== null), claims.length, undefined)
  })

  const range = async (key: string, count: number, after?: string) =>
    redis.xrange(key, after === undefined ? '-' : `(${after}`, '+', 'COUNT', count) as Promise<Fields[]>

  return {
    // Neither batcher has a bound that it could refuse for.
    put: event => puts.add(event) as Promise<boolean>,
    holds: claim => holds.add(claim) as Promise<boolean | undefined>,
    take: async count => (await run<Fields[]>('TAKE', me, Math.min(count, MAX_TAKE), claimAfterMs)).map(asEntry),
    done: entries => run('DONE', ...entries.flatMap(({ id, event }) => [id, claimOf(event)])),
    bury: letters => run('BURY', Date.now(), ...letters.flatMap(({ entry: { id, event }, reason }) =>
      [id, claimOf(event), JSON.stringify(event), reason])),
    counts: () => counts,
    waiting: async (count, after) => (await range(WAITING, count, after)).map(asEntry),
    dead: async (count, after) => (await range(DEAD, count, after)).map(asLetter),
    replay: letters => run('REPLAY', ...letters.flatMap(({ id, endpoint = '' }) => [id, endpoint])),
    drop: letters => run('DROP', ...letters.map(({ id }) => id)),
    async close () {
      redis.off('ready', greetAgain)
      await Promise.all([puts.idle(), holds.idle()])
      // Without it another relay waits until we are taken for dead.
      await run('RELEASE', me, MAX_TAKE).catch(() => {})
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
async function reportDurability (redis: Redis, log: StoreLog): Promise<void> {
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
