import { hash } from 'node:crypto'
import { projectOf, SECRETS, type Config } from '../config.ts'
import type { Snapshot } from '../metrics.ts'
import { baseUrl } from '../mixpanel/client.ts'
import { MAX_ENTRIES, type Disk, type Outbox } from '../outbox/outbox.ts'
import type { RedisOutage } from '../redis.ts'
import type { Relay } from '../relay/relay.ts'
import type { SecretState } from '../secrets.ts'

/** An entry of the outbox should not wait longer than this. */
const MAX_AGE_MS = 300_000

/** An outbox that is fuller than this is nearly full. */
const NEARLY_FULL = 0.9

/** The outbox refuses events at 16 MiB of free space, or at a tenth of a small disk. */
const MIN_FREE_BYTES = 64 * 1024 * 1024
const MIN_FREE_SHARE = 0.2

/** How long a report waits for the outbox. What it then lacks is taken from the report before. */
const REFRESH_TIMEOUT_MS = 500

/** Why the relay is degraded. */
interface Reason { code: string, detail: string, since?: string }

export interface StatusSources {
  config: Config
  version: string
  relay: Relay
  outbox?: Outbox | undefined
  /** Returns the outage of Redis, if it has one. */
  redis?: (() => RedisOutage | undefined) | undefined
  /** Returns `stale` while the keys of users' tokens cannot be fetched. */
  jwks?: (() => string | undefined) | undefined
  secrets: () => SecretState[]
  droppedLogLines: () => number
  load: () => { connections: number, bytes_in_flight: number }
  isShuttingDown: () => boolean
}

/** What only the store of the outbox knows. */
interface OutboxFacts { oldest?: Date | undefined, disk?: Disk | undefined }

export type Status = ReturnType<typeof createStatus>

/** The state of the relay, for operators and for Prometheus: what works, what does not, and since when. */
export function createStatus (sources: StatusSources) {
  const { config, version, relay, outbox, redis, jwks, secrets, droppedLogLines, load, isShuttingDown } = sources
  const started = new Date()
  let facts: OutboxFacts = {}
  let refreshing: Promise<void> | undefined

  /** Asks the outbox, once at a time. */
  async function refresh (store: Outbox): Promise<void> {
    try {
      const [[oldest], disk] = await Promise.all([store.waiting(1), store.disk()])
      facts = { oldest: oldest?.event && new Date(oldest.event.time * 1000), disk }
    } catch {
      // `outage` reports it.
    } finally {
      refreshing = undefined
    }
  }

  async function readOutbox (): Promise<OutboxFacts> {
    if (outbox === undefined) return {}
    refreshing ??= refresh(outbox)
    let timer: NodeJS.Timeout | undefined
    const timeout = new Promise<void>(resolve => { timer = setTimeout(resolve, REFRESH_TIMEOUT_MS) })
    await Promise.race([refreshing, timeout])
    clearTimeout(timer)
    // What was oldest may have been delivered since.
    return { ...facts, oldest: outbox.counts().waiting === 0 ? undefined : facts.oldest }
  }

  function reasons ({ oldest, disk }: OutboxFacts): Reason[] {
    const { mixpanel, mixpanel_unavailable_since: openSince, last_verdict: last, outbox: stored } = relay.state()
    const failingSince = relay.failingSince()
    const outage = redis?.()
    const broken = secrets().filter(({ problem }) => problem !== undefined)
    const isOpen = mixpanel === 'unavailable'
    const failure = [last?.code, last?.cause].filter(Boolean).join(', ')
    const rules: [isBroken: boolean, code: string, detail: string, since?: string | undefined][] = [
      [isShuttingDown(), 'shutting_down', 'The relay is shutting down.'],
      [isOpen, 'mixpanel_unavailable', `Mixpanel keeps failing and gets only probes: ${failure}.`, openSince],
      [!isOpen && failingSince !== undefined, 'mixpanel_failing',
        `The last requests to Mixpanel failed: ${failure}.`, failingSince?.toISOString()],
      [stored?.unavailable_since !== undefined, 'outbox_unavailable',
        `The outbox waits for its ${stored?.waits_for}.`, stored?.unavailable_since],
      [stored?.rejecting_since !== undefined, 'outbox_rejecting',
        'The outbox is full or cannot write.', stored?.rejecting_since],
      [isFull(stored?.waiting, stored?.dead, stored?.bytes), 'outbox_nearly_full',
        `The outbox has ${stored?.waiting} identities, ${stored?.dead} dead letters and ${stored?.bytes} bytes.`],
      [oldest !== undefined && Date.now() - oldest.getTime() > MAX_AGE_MS, 'outbox_delayed',
        `The oldest of ${stored?.waiting} queued identities waits for more than ${MAX_AGE_MS / 1000} s` +
        `${stored?.paused ? ', because an operator has paused the delivery' : ''}.`, oldest?.toISOString()],
      [disk !== undefined && disk.free < Math.min(MIN_FREE_BYTES, disk.size * MIN_FREE_SHARE), 'disk_nearly_full',
        `The disk of the outbox has ${disk?.free} free bytes.`],
      [outage !== undefined, 'redis_away', `Redis is away: ${outage?.cause}.`, outage?.since.toISOString()],
      [broken.length > 0, 'secret_file_unusable',
        broken.map(({ variable, problem }) => `${variable}_FILE: ${problem}`).join('; ')],
      [jwks?.() === 'stale', 'jwks_stale', 'JWT_JWKS_URL cannot be read. The known keys stay valid.']
    ]
    return rules.flatMap(([isBroken, code, detail, since]) =>
      isBroken ? [{ code, detail, ...since !== undefined && { since } }] : [])
  }

  const isFull = (waiting = 0, dead = 0, bytes = 0) =>
    waiting + dead > NEARLY_FULL * MAX_ENTRIES || bytes > NEARLY_FULL * config.OUTBOX_MAX_BYTES

  const about = {
    version,
    started: started.toISOString(),
    mode: config.MIXPANEL_ID_MERGE,
    region: config.MIXPANEL_REGION,
    host: new URL(baseUrl(config)).host,
    endpoint: config.MIXPANEL_ENDPOINT,
    config_fingerprint: fingerprintOf(config),
    project_fingerprint: projectOf(config).fingerprint
  }

  return {
    /** Resolves with the report of `GET /status`: `degraded` with the reasons, or `ok`. It has no id and no secret. */
    async report () {
      const outboxFacts = await readOutbox()
      const { oldest, disk } = outboxFacts
      const found = reasons(outboxFacts)
      const { outbox: stored, id_merge: _, ...state } = relay.state()
      return {
        status: found.length > 0 ? 'degraded' : 'ok',
        reasons: found,
        ...about,
        uptime_seconds: secondsSince(started),
        ...state,
        ...load(),
        mixpanel_failing_since: relay.failingSince()?.toISOString() ?? null,
        clock_skew_seconds: relay.clockSkew() ?? null,
        ...stored && { outbox: { ...stored, oldest: oldest?.toISOString() ?? null, ...disk && { disk } } },
        ...redis && { redis: redis() === undefined ? 'connected' : 'away' },
        ...jwks?.() !== undefined && { jwks: jwks() },
        secrets: secrets().map(({ variable, readAt, problem }) =>
          ({ variable, age_seconds: secondsSince(readAt), problem: problem ?? null })),
        log_lines_dropped: droppedLogLines()
      }
    },

    /** Resolves with what is measured at a scrape. */
    async snapshot (): Promise<Snapshot> {
      const outboxFacts = await readOutbox()
      const { oldest, disk } = outboxFacts
      const { in_flight: inFlight, mixpanel, outbox: stored } = relay.state()
      const { connections, bytes_in_flight: bytesInFlight } = load()
      const failingSince = relay.failingSince()
      return {
        gauges: {
          degraded: Number(reasons(outboxFacts).length > 0),
          in_flight: inFlight,
          in_flight_max: config.MAX_IN_FLIGHT,
          bytes_in_flight: bytesInFlight,
          bytes_in_flight_max: config.MAX_BYTES_IN_FLIGHT,
          connections,
          connections_max: config.MAX_CONNECTIONS,
          breaker_open: Number(mixpanel === 'unavailable'),
          mixpanel_failing_seconds: failingSince === undefined ? 0 : secondsSince(failingSince),
          clock_skew_seconds: relay.clockSkew(),
          outbox_waiting: stored?.waiting,
          outbox_oldest_seconds: stored && (oldest === undefined ? 0 : secondsSince(oldest)),
          outbox_dead_letters: stored?.dead,
          outbox_bytes: stored?.bytes,
          outbox_bytes_max: stored && config.OUTBOX_MAX_BYTES,
          outbox_paused: stored && Number(stored.paused),
          outbox_disk_free_bytes: disk?.free,
          redis_up: redis && Number(redis() === undefined),
          jwks_stale: jwks?.() === undefined ? undefined : Number(jwks() === 'stale')
        },
        droppedLogLines: droppedLogLines(),
        secrets: secrets().map(({ variable, readAt, problem }) =>
          ({ variable, age: secondsSince(readAt), isBroken: problem !== undefined }))
      }
    }
  }
}

const secondsSince = (time: Date) => Math.max(0, Math.round((Date.now() - time.getTime()) / 1000))

/** Returns a name of the configuration, secrets aside: relays that are set up alike have the same one. */
function fingerprintOf (config: Config): string {
  const settings = Object.entries(config).filter(([name]) => !SECRETS.includes(name)).toSorted()
  return hash('sha256', JSON.stringify(settings)).slice(0, 12)
}
