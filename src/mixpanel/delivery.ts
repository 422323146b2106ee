import { setTimeout as sleep } from 'node:timers/promises'
import { createSemaphore } from '../concurrency/semaphore.ts'
import type { Config } from '../config.ts'
import type { PendingEvent } from '../identity/event.ts'
import { throttled, type Log } from '../log.ts'
import { NO_METRICS, type Metrics } from '../metrics.ts'
import { createBreaker } from './breaker.ts'
import { MAX_SENDS, type Mixpanel } from './client.ts'
import { MAX_REQUEST_BYTES } from './encode.ts'
import { NEVER_SENT, type Verdict } from '../identity/verdict.ts'
import type { Answer } from './answer.ts'
import { createBisect, type SendResult } from './bisect.ts'
import { createUpstreamHealth } from './upstream-health.ts'

/** An event to send. `deadline` is by performance.now(), safe from clock changes; in a batch the earliest counts. */
export interface OutgoingEvent {
  event: PendingEvent
  isStrict: boolean
  deadline: number
  /** Overrides MIXPANEL_ENDPOINT; the same for all events of a batch. */
  endpoint?: 'import' | undefined
  /** How many requests have carried it; delivery counts them. */
  attempts?: number
}

/** The most bytes on the wire of all requests in flight; the last request may exceed it. */
export const MAX_SENT_BYTES = 16 * MAX_REQUEST_BYTES

/** The most retries in flight: a fifth of the sends, so that an outage does not double the traffic, but at least 3. */
const RETRY_SHARE = 0.2
const RETRY_MINIMUM = 3

/** A timer that fires this late was delayed by this process (a SIGSTOP, a pause), not by Mixpanel. */
const STALL_MS = 500

export type Delivery = ReturnType<typeof createDelivery>

/** Sends batches to Mixpanel, retries a failed request once, and finds the failing events of a refused batch. */
export function createDelivery (config: Config, mixpanel: Mixpanel, log: Log, metrics: Metrics = NO_METRICS) {
  const health = createUpstreamHealth(log)
  const warnOfBreaker = {
    open: throttled(log, 'warn', 'breaker opened'), closed: throttled(log, 'warn', 'breaker closed')
  }
  let openSince: Date | undefined
  const breaker = createBreaker(to => {
    metrics.breaker(to)
    warnOfBreaker[to]({ ...health.last(), since: openSince?.toISOString() })
    openSince = to === 'open' ? new Date() : undefined
  })
  const sends = createSemaphore(MAX_SENDS)
  let retries = 0

  /** Sends when a slot is free. The parts of a split batch share the slots, and their timeouts start with the send. */
  const sendInSlot = (items: OutgoingEvent[], isVerbose: boolean): Promise<SendResult> =>
    sends.run(() => sendWithRetry(items, isVerbose))

  async function sendWithRetry (items: OutgoingEvent[], isVerbose: boolean): Promise<SendResult> {
    const [{ isStrict }] = items as [OutgoingEvent]
    const deadline = Math.min(...items.map(event => event.deadline))
    if (performance.now() >= deadline) return { answer: NEVER_SENT }
    // If encoding threw after the breaker had admitted a probe, the probe would never get an outcome.
    const encode = () => mixpanel.encode(items.map(({ event }) => event), {
      endpoint: endpointOf(items), strict: isStrict, verbose: isVerbose
    })
    let request = encode()
    const retryAfter = health.heldSeconds()
    if (retryAfter > 0) {
      return { answer: { code: 'mixpanel_rate_limited', taken: 'no', retryAfter, cause: 'an earlier status 429' } }
    }
    if (!breaker.admits()) {
      return { answer: { code: 'mixpanel_unavailable', taken: 'no', retryAfter: breaker.retryAfter() } }
    }
    const time = () => Math.min(config.MIXPANEL_TIMEOUT_MS, deadline - performance.now())
    const due = performance.now() + time()
    const attempt = async (): Promise<Answer> => {
      const since = performance.now()
      for (const item of items) item.attempts = (item.attempts ?? 0) + 1
      // A bug here is no failure of Mixpanel, but a probe needs an outcome.
      const answer = await mixpanel.send(request, time()).catch((error: Error) => {
        breaker.record(true)
        throw error
      })
      health.record(answer)
      metrics.mixpanelRequest(answer.code, performance.now() - since, items.length)
      return answer
    }
    // When the deadline leaves less than half the usual time, a timeout does not count as a failure of Mixpanel.
    const isShort = time() < Math.min(config.MIXPANEL_TIMEOUT_MS, config.DEADLINE_MS) / 2
    const first = await attempt()
    const isStalled = performance.now() > due + STALL_MS
    breaker.record(!first.isTransient || ((isShort || isStalled) && first.code === 'mixpanel_timed_out'))
    // Jitter keeps requests that failed together from being retried together.
    const pause = 50 + Math.random() * 250
    if (!first.isTransient || !mayRetry() || performance.now() + pause >= deadline) return { answer: first }
    retries++
    await sleep(pause)
    if (health.heldSeconds() > 0) {
      retries--
      return { answer: first }
    }
    log.warn({ code: first.code, cause: first.cause, identities: items.length }, 'retrying')
    metrics.retry()
    // The token may have changed.
    request = encode()
    const second = await attempt().finally(() => { retries-- })
    if (!second.isTransient) breaker.record(true)
    return { answer: second, ...first.taken === 'unknown' && { lost: first } }
  }

  const endpointOf = ([first]: OutgoingEvent[]) => first?.endpoint ?? config.MIXPANEL_ENDPOINT
  const mayRetry = () => !breaker.isOpen() && retries < Math.max(RETRY_MINIMUM, sends.running() * RETRY_SHARE)

  const bisect = createBisect<OutgoingEvent>({ send: sendInSlot, isTerse: items => endpointOf(items) === 'track' })

  return {
    /** Returns true while Mixpanel keeps failing and gets only probes. */
    isOpen: breaker.isOpen,

    /** Resolves by the earliest deadline with a verdict for each event, in order; rejects only on a bug. */
    async deliver (items: OutgoingEvent[]): Promise<Verdict[]> {
      const since = performance.now()
      const verdicts = await bisect(items)
      const ms = Math.round((performance.now() - since) * 10) / 10
      // Nearly always all events have one verdict and as many attempts.
      let last: Verdict | undefined
      let described: Verdict | undefined
      return verdicts.map((verdict, index) => {
        const { attempts = 0 } = items[index] as OutgoingEvent
        if (attempts === 0) return verdict
        if (verdict !== last || described?.sent?.attempts !== attempts) {
          last = verdict
          described = { ...verdict, sent: { mixpanel_ms: ms, attempts, events: items.length } }
        }
        return described
      })
    },

    /** Returns, for operators, whether requests are sent to Mixpanel, and its last verdict. */
    state: () => ({
      id_merge: config.MIXPANEL_ID_MERGE,
      mixpanel: breaker.isOpen() ? 'unavailable' : 'asked',
      ...openSince && { mixpanel_unavailable_since: openSince.toISOString() },
      ...health.state()
    }),

    /** Returns when Mixpanel began to fail every request; undefined while it does not. */
    failingSince: health.failingSince,

    /** Returns how many seconds this clock is ahead of Mixpanel's; undefined until its first answer. */
    clockSkew: mixpanel.clockSkew
  }
}
