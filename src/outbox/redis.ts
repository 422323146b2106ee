import { randomUUID } from 'node:crypto'
import type { Project, ProjectNames } from '../config.ts'
import type { Log } from '../log.ts'
import { NO_METRICS, type Metrics } from '../metrics.ts'
import { connectBackground, redisOutage, withTimeout, FOREGROUND_TIMEOUT_MS, type Redis } from '../redis.ts'
import { groupCalls } from './grouped.ts'
import {
  MAX_NEXT_BYTES, NO_CLAIM, OTHER_MODE,
  type Counts, type DeadLetter, type Entry, type Limits, type Outbox, type PutResult
} from './outbox.ts'
import { listed, readRows, UNREADABLE } from './rows.ts'
import { KEYS, SCRIPTS, VERSION } from './scripts.ts'

/** The most events in one script; a script blocks all other clients of Redis. */
const MAX_GROUP = 100

/** The timeout of commands that no caller waits for, and whose answers may have a megabyte. */
const BACKGROUND_TIMEOUT_MS = 5000

type Fields = [id: string, fields: string[]]

/**
 * Opens an outbox in Redis, for several relays of one project: two streams, and a lease that lets one relay at a time
 * deliver. `leaseMs` should exceed the time that a relay needs to deliver a round. `foreground` is the connection for
 * commands that callers wait for; its creator closes it. Rejects when Redis does not answer, or refuses a script.
 */
export async function openRedis (
  foreground: Redis, project: Project, log: Log, { leaseMs, maxEntries }: Limits & { leaseMs: number },
  metrics: Metrics = NO_METRICS
): Promise<Outbox> {
  const keys = await keysOf(foreground, project)
  await refuseOtherMode(foreground, project)
  const [WAITING, DEAD] = keys as [string, string]
  const CLAIMS = keys[2] as string
  const relayId = randomUUID()
  let counts: Counts = { waiting: 0, dead: 0, bytes: 0, paused: false }
  const background = await connectBackground(foreground, BACKGROUND_TIMEOUT_MS)
  for (const redis of [foreground, background]) {
    for (const [name, lua] of Object.entries(SCRIPTS)) redis.defineCommand(name, { numberOfKeys: keys.length, lua })
  }
  type Reply = [waiting: number, dead: number, bytes: number, paused: number, result: unknown]
  type Script = (...args: (string | number)[]) => Promise<Reply>
  async function run<Result> (
    redis: Redis, name: keyof typeof SCRIPTS, ...args: (string | number)[]
  ): Promise<Result> {
    const script = (redis as unknown as Record<string, Script>)[name] as Script
    const ms = redis === foreground ? FOREGROUND_TIMEOUT_MS : BACKGROUND_TIMEOUT_MS
    const [waiting, dead, bytes, paused, result] = await withTimeout(redis, ms, script.call(redis, ...keys, ...args))
    counts = { waiting, dead, bytes: Math.max(0, bytes), paused: paused === 1 }
    return result as Result
  }

  async function refresh (): Promise<void> {
    await run(background, 'OPEN', VERSION)
    await reportDurability(background, log)
  }
  try {
    await refresh()
  } catch (error) {
    background.disconnect()
    throw new Error(`REDIS_URL: Redis cannot hold the outbox: ${(error as Error).message}`)
  }
  // A refresh that fails is repeated after the next reconnection.
  background.on('ready', () => refresh().catch(() => {}))

  const groups = groupCalls({
    maxGroup: MAX_GROUP,
    store: events => {
      const args = events.flatMap(({ event: { anonKey = NO_CLAIM, json, bytes }, maxBytes }) =>
        [anonKey, json, bytes, maxBytes])
      return run<number[]>(foreground, 'PUT', maxEntries, ...args).then(stored => ({
        results: stored.map((isStored): PutResult => isStored === 1 ? 'stored' : 'rejected'),
        ...stored.includes(0) && { cause: `full: ${counts.waiting + counts.dead} entries, ${counts.bytes} bytes` }
      }), error => ({ results: events.map((): PutResult => 'rejected'), cause: refusalOf(error) }))
    },
    async lookUp (anonKeys) {
      const found = await withTimeout(foreground, FOREGROUND_TIMEOUT_MS, foreground.hmget(CLAIMS, ...anonKeys))
      return found.map(count => count !== null)
    }
  }, log)

  async function range (key: string, count: number, after?: string): Promise<Fields[]> {
    const command = background.xrange(key, startOf(after), '+', 'COUNT', count)
    return await inTime(background, command) as Fields[]
  }

  const remove = (entries: Entry[]) =>
    run<number>(background, 'ACK', ...entries.flatMap(({ id, event }) => [id, event.anonKey ?? NO_CLAIM, event.bytes]))
  const deadLetter = (letters: { id: string, claim: string, json: string, reason: string }[]) => {
    const args = letters.flatMap(({ id, claim, json, reason }) => [id, claim, json, reason])
    return run<void>(background, 'DEAD_LETTER', Date.now(), ...args)
  }

  return {
    put: groups.put,
    has: groups.has,
    async next (count, after) {
      const before = counts.waiting + counts.dead
      const [rows, gone] = await run<[Fields[], number]>(
        background, 'NEXT', relayId, leaseMs, startOf(after), count, MAX_NEXT_BYTES, VERSION)
      const lost = gone === -1 ? before : gone
      if (lost > 0) {
        metrics.outbox('lost', 'redis', lost)
        log.error({ identities: lost }, 'queued identities are gone from Redis')
      }
      return readRows(rows.map(asRow), unreadable =>
        deadLetter(unreadable.map(row => ({ ...row, reason: UNREADABLE }))), log, metrics)
    },
    async ack (entries) { await remove(entries) },
    deadLetter: letters => deadLetter(letters.map(({ entry: { id, event }, reason }) =>
      ({ id, claim: event.anonKey ?? NO_CLAIM, json: event.json, reason }))),
    disk: async () => undefined,
    outage () {
      const outage = redisOutage(foreground)
      return outage && { part: 'Redis', since: outage.since }
    },
    counts: () => counts,
    waiting: async (count, after) => (await range(WAITING, count, after)).map(fields => listed(asRow(fields))),
    dead: async (count, after) => (await range(DEAD, count, after)).map(asLetter),
    replay: letters => run(background, 'REPLAY', ...letters.flatMap(({ id, endpoint = '' }) => [id, endpoint])),
    drop: letters => run(background, 'DROP', ...letters.map(({ id }) => id)),
    async expire (before) {
      let dropped = 0
      for (let count = MAX_GROUP; count === MAX_GROUP; dropped += count) {
        count = await run<number>(background, 'EXPIRE', before.getTime(), MAX_GROUP)
      }
      return dropped
    },
    erase: remove,
    pause: isPaused => run(background, 'PAUSE', isPaused ? 1 : 0),
    async close () {
      await groups.idle()
      // Otherwise another relay would have to wait until the lease expires.
      await run(foreground, 'RELEASE', relayId).catch(() => {})
      background.disconnect()
    }
  }
}

/** Resolves with the result of a command that no caller waits for. */
const inTime = <Result> (redis: Redis, command: Promise<Result>) => withTimeout(redis, BACKGROUND_TIMEOUT_MS, command)

const pointerOf = (fingerprint: string) => `identify-relay:${fingerprint}:outbox`
const nameKeys = (fingerprint: string) => KEYS.map(name => `{identify-relay:${fingerprint}}:${name}`)

/**
 * Returns the names of the keys. With MIXPANEL_PROJECT_ID they outlive a change of the token, so the name that the
 * project had first is kept in Redis. The braces keep all keys on one node of a cluster.
 */
async function keysOf (redis: Redis, { fingerprint, earlier }: ProjectNames): Promise<string[]> {
  if (earlier.length === 0) return nameKeys(fingerprint)
  const pointer = pointerOf(fingerprint)
  let name = await inTime(redis, redis.get(pointer))
  if (name === null) {
    const found = await Promise.all(earlier.map(one => inTime(redis, redis.exists(...nameKeys(one).slice(0, 2)))))
    await inTime(redis, redis.set(pointer, earlier[Math.max(0, found.findIndex(count => count > 0))] as string, 'NX'))
    name = await inTime(redis, redis.get(pointer))
  }
  return nameKeys(name as string)
}

/** Rejects when a relay with another MIXPANEL_ID_MERGE has left events of the project. */
async function refuseOtherMode (redis: Redis, { otherMode }: Project): Promise<void> {
  const { fingerprint, earlier } = otherMode
  const pointer = await inTime(redis, redis.get(pointerOf(fingerprint)))
  const names = [fingerprint, ...earlier, ...pointer === null ? [] : [pointer]]
  const streams = names.flatMap(name => nameKeys(name).slice(0, 2))
  const lengths = await Promise.all(streams.map(name => inTime(redis, redis.xlen(name))))
  if (lengths.some(length => length > 0)) throw new Error(`OUTBOX=redis: ${OTHER_MODE}`)
}

/** Returns the message of an error that Redis answered: nothing was stored. Throws any other, after which it may be. */
function refusalOf (error: Error): string {
  if (error.name === 'ReplyError') return error.message
  throw error
}

const startOf = (after: string | undefined) => after === undefined ? '-' : `(${after}`

function asRow ([id, fields]: Fields) {
  const [, claim = '', , json = '', , endpoint] = fields
  return { id, claim, json, ...endpoint === 'import' && { endpoint } as const }
}

function asLetter ([id, fields]: Fields): DeadLetter {
  const [, , , json = '', , reason = '', , died] = fields
  return { ...listed({ id, json }), reason, died: new Date(Number(died)) }
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
