import type { Gauge, Metric } from 'prom-client'
import { addProcessMetrics } from './process-metrics.ts'
import { createDurations, createTally } from './tally.ts'

/** Counts what happens. Each call costs a fraction of a microsecond. No label has an id or a text of a caller. */
export interface Metrics {
  /** Identities were answered. `code` is that of the verdict, or of the problem. */
  identities: (outcome: IdentityOutcome, code: string, count?: number) => void
  /** Events of Mixpanel's SDKs were answered. `kind` is how they merge, if they do. */
  events: (kind: EventKind, outcome: EventOutcome, reason: string, count?: number) => void
  /** A request was answered. `route` is its pattern; undefined when no route matches. */
  request: (method: string, route: string | undefined, status: number, ms: number) => void
  /** A caller exceeded its limit. */
  rateLimited: (caller: 'key' | 'user' | 'anonymous') => void
  /** A request to Mixpanel, which carried so many events, has its answer. */
  mixpanelRequest: (code: string, ms: number, events: number) => void
  retry: () => void
  breaker: (to: 'open' | 'closed') => void
  /** What became of identities in the outbox, and why. */
  outbox: (outcome: OutboxOutcome, reason: string, count?: number) => void
  mergeGuard: (rule: string, action: 'refused' | 'warned') => void
  secretReload: (variable: string, result: 'used' | 'refused') => void
}

/** `unread` events belong to a request that was refused as a whole, `invalid` ones are no events. */
export type EventKind = 'identify' | 'alias' | 'association' | 'ordinary' | 'invalid' | 'unread'
export type EventOutcome = 'accepted' | 'queued' | 'refused' | 'failed'

export type IdentityOutcome = 'accepted' | 'queued' | 'failed' | 'dry_run'

/**
 * `stored`, `rejected` and `unknown` are results of a write. `delivered`, `dead_lettered` and `erased` identities leave
 * the queue, `replayed` ones return to it, and `lost` ones have disappeared. `dropped` and `expired` are dead letters.
 */
export type OutboxOutcome = 'stored' | 'rejected' | 'unknown' | 'delivered' | 'dead_lettered' | 'replayed' | 'dropped' |
  'expired' | 'erased' | 'lost'

const noop = () => {}

/** Counts nothing. */
export const NO_METRICS: Metrics = {
  identities: noop,
  events: noop,
  request: noop,
  rateLimited: noop,
  mixpanelRequest: noop,
  retry: noop,
  breaker: noop,
  outbox: noop,
  mergeGuard: noop,
  secretReload: noop
}

/** What is measured at the moment of a scrape: the name of each gauge, and its text. */
const GAUGES = {
  in_flight: 'Identities that wait for their verdict.',
  in_flight_max: 'MAX_IN_FLIGHT.',
  bytes_in_flight: 'Bytes of all bodies that are arriving or whose answer has not left.',
  bytes_in_flight_max: 'MAX_BYTES_IN_FLIGHT.',
  connections: 'Open connections of callers.',
  connections_max: 'MAX_CONNECTIONS, or fewer where the limit of open files is lower.',
  breaker_open: '1 while Mixpanel keeps failing and gets only probes.',
  mixpanel_failing_seconds: 'The time since all requests to Mixpanel fail; 0 while they do not.',
  clock_skew_seconds: 'How far this clock is ahead of the Date of the last answer.',
  outbox_waiting: 'Identities that wait in the outbox.',
  outbox_oldest_seconds: 'The age of the oldest identity in the outbox; 0 when none waits.',
  outbox_dead_letters: 'Identities that will not be sent again: see outbox dead.',
  outbox_bytes: 'Bytes in the outbox, dead letters included.',
  outbox_bytes_max: 'OUTBOX_MAX_BYTES.',
  outbox_paused: '1 while an operator has paused the delivery.',
  outbox_disk_free_bytes: 'Free bytes of the disk of the outbox directory.',
  redis_up: '1 while Redis is connected.',
  jwks_stale: '1 while JWT_JWKS_URL cannot be read; the known keys stay valid.',
  degraded: '1 while GET /status answers 503.'
}

export type GaugeName = keyof typeof GAUGES

/** What is measured at the moment of a scrape. A gauge without a value is not printed. */
export interface Snapshot {
  gauges: Partial<Record<GaugeName, number | undefined>>
  /** Log lines that were dropped since the start. */
  droppedLogLines: number
  /** Each secret that is read from a file: the seconds since its value was read, and whether the file is broken now. */
  secrets: { variable: string, age: number, isBroken: boolean }[]
}

const SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]
const SIZES = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]

/** Resolves with counters, and with `render`, which returns all metrics as a text. It loads prom-client. */
export async function openMetrics (version: string) {
  const { default: promClient } = await import('prom-client')
  const { Counter, Gauge, Histogram, Registry } = promClient
  const registry = new Registry()
  const nameOf = (name: string) => `identify_relay_${name}`
  const counter = <Label extends string = never>(name: string, help: string, labelNames: Label[] = []) =>
    new Counter({ name: nameOf(name), help, labelNames, registers: [registry] })
  const histogram = <Label extends string = never>(
    name: string, help: string, buckets: number[], labelNames: Label[] = []
  ) => new Histogram({ name: nameOf(name), help, buckets, labelNames, registers: [registry] })
  const gauge = <Label extends string = never>(name: string, help: string, labelNames: Label[] = []) =>
    new Gauge({ name: nameOf(name), help, labelNames, registers: [registry] })

  addProcessMetrics(promClient, registry)
  gauge('build_info', 'The version.', ['version']).set({ version }, 1)
  const identities = createTally(nameOf('identities_total'), 'Identities by outcome.', ['outcome', 'code'])
  const events = counter('events_total', "Events of Mixpanel's SDKs.", ['kind', 'outcome', 'reason'])
  const requests = createTally(
    nameOf('http_requests_total'), 'Requests of callers, health aside.', ['method', 'route', 'status'])
  const durations = createDurations(
    nameOf('http_request_duration_seconds'), 'Time to the answer of a caller.', 'route', SECONDS)
  for (const { metric } of [identities, requests, durations]) registry.registerMetric(metric as unknown as Metric)
  const limited = counter('rate_limited_total', 'Requests beyond the limit of their caller.', ['caller'])
  const upstream = counter('mixpanel_requests_total', 'Requests to Mixpanel by the code of their answer.', ['code'])
  const upstreamDuration = histogram('mixpanel_request_duration_seconds', 'Time to an answer of Mixpanel.', SECONDS)
  const batchSize = histogram('mixpanel_batch_size', 'Events in one request to Mixpanel.', SIZES)
  const retries = counter('mixpanel_retries_total', 'Requests to Mixpanel that were sent again.')
  const transitions = counter('breaker_transitions_total', 'Openings and closings of the breaker.', ['to'])
  const outbox = counter('outbox_identities_total', 'What became of identities in the outbox.', ['outcome', 'reason'])
  const guard = counter('merge_guard_total', 'Identities that the merge guard found suspicious.', ['rule', 'action'])
  const reloads = counter('secret_reloads_total', 'Changes of files of secrets.', ['variable', 'result'])
  const droppedLines = counter('log_lines_dropped_total', 'Log lines that nothing has read in time.')
  const ages = gauge('secret_age_seconds', 'The time since a secret was read from its file.', ['variable'])
  const broken = gauge('secret_file_unusable', '1 while the file of a secret cannot be used.', ['variable'])
  // As in `announce`.
  for (const to of ['open', 'closed']) transitions.inc({ to }, 0)
  for (const rule of ['MAX_ANON_PER_USER', 'MAX_USERS_PER_ANON']) {
    for (const action of ['refused', 'warned']) guard.inc({ rule, action }, 0)
  }
  const gauges = new Map<GaugeName, Gauge>()

  function use ({ gauges: values, droppedLogLines, secrets }: Snapshot): void {
    for (const [name, value] of Object.entries(values) as [GaugeName, number | undefined][]) {
      if (value === undefined) continue
      const known = gauges.get(name) ?? gauge(name, GAUGES[name])
      gauges.set(name, known)
      known.set(value)
    }
    droppedLines.reset()
    droppedLines.inc(droppedLogLines)
    for (const { variable, age, isBroken } of secrets) {
      ages.set({ variable }, age)
      broken.set({ variable }, Number(isBroken))
    }
  }

  const metrics: Metrics = {
    identities: (outcome, code, count = 1) => identities.add(count, outcome, code),
    events: (kind, outcome, reason, count) => events.inc({ kind, outcome, reason }, count),
    request (method, route = 'none', status, ms) {
      requests.add(1, method, route, status)
      durations.add(route, ms / 1000)
    },
    rateLimited: caller => limited.inc({ caller }),
    mixpanelRequest (code, ms, events) {
      upstream.inc({ code })
      upstreamDuration.observe(ms / 1000)
      batchSize.observe(events)
    },
    retry: () => retries.inc(),
    breaker: to => transitions.inc({ to }),
    outbox: (outcome, reason, count) => outbox.inc({ outcome, reason }, count),
    mergeGuard: (rule, action) => guard.inc({ rule, action }),
    secretReload: (variable, result) => reloads.inc({ variable, result })
  }

  return {
    ...metrics,
    /** Prints the counters of these problem codes from the start: a rate needs a first value. */
    announce (codes: string[]): void {
      for (const outcome of ['accepted', 'queued']) identities.add(0, outcome, outcome)
      for (const code of codes) identities.add(0, 'failed', code)
      for (const code of ['accepted', ...codes.filter(code => /mixpanel/.test(code))]) upstream.inc({ code }, 0)
    },
    contentType: registry.contentType,
    /** Resolves with all metrics in Prometheus' text format. */
    render (snapshot: Snapshot): Promise<string> {
      use(snapshot)
      return registry.metrics()
    }
  }
}
