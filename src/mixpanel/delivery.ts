import { setTimeout as sleep } from 'node:timers/promises'
import type { Config } from '../config.ts'
import type { PendingEvent } from '../identity/event.ts'
import type { Log } from '../log.ts'
import { createBreaker } from './breaker.ts'
import { MAX_SENDS, type Mixpanel } from './client.ts'
import { MAX_REQUEST_BYTES } from './encode.ts'
import { isTransient, type Verdict } from '../identity/verdict.ts'
import { createBisect } from './bisect.ts'

/**
 * An event on its way. `deadline` (by performance.now(), whatever the clock does) is its caller's; for a batch the
 * earliest counts.
 */
export interface OutgoingEvent {
  event: PendingEvent
  isStrict: boolean
  deadline: number
  /** Instead of MIXPANEL_ENDPOINT; the same for all of a batch. */
  endpoint?: 'import' | undefined
}

/** The most that all requests under way may have on the wire together, give or take one. */
export const MAX_SENT_BYTES = 16 * MAX_REQUEST_BYTES

/** Repeats under way: a fifth of the sends, but always a few, so that an outage does not double the traffic. */
const RETRY_SHARE = 0.2
const RETRY_MINIMUM = 3

/** A timer that is later than that was held up by this process (a SIGSTOP, a pause), not by Mixpanel. */
const STALL_MS = 500

export const NEVER_SENT: Verdict = {
  code: 'mixpanel_timed_out', cause: 'never sent', isTransient: false, isUndelivered: true
}

export type Delivery = ReturnType<typeof createDelivery>

/** Brings batches to Mixpanel: sends, if need be repeats, and finds out who of a refused batch is meant. */
export function createDelivery (config: Config, mixpanel: Mixpanel, log: Log) {
  const breaker = createBreaker()
  /** Those who wait for a place among the sends. */
  const waiting: (() => void)[] = []
  let sends = 0
  let retries = 0
  let lastVerdict: { code: Verdict['code'], at: number } | undefined

  /** Waits for one of MAX_SENDS places: a search must not take more of Mixpanel, or of its own time, than a batch. */
  async function sendInSlot (items: OutgoingEvent[], isVerbose: boolean): Promise<Verdict> {
    if (sends >= MAX_SENDS) await new Promise<void>(resolve => waiting.push(resolve))
    else sends++
    try {
      return await sendWithRetry(items, isVerbose)
    } finally {
      const next = waiting.shift()
      if (next === undefined) sends--
      else next()
    }
  }

  async function sendWithRetry (items: OutgoingEvent[], isVerbose: boolean): Promise<Verdict> {
    const [{ isStrict }] = items as [OutgoingEvent]
    const deadline = Math.min(...items.map(event => event.deadline))
    if (performance.now() >= deadline) return NEVER_SENT
    // Before the breaker is asked: whatever this throws must not leave its one probe under way for ever.
    const request = mixpanel.encode(items.map(({ event }) => event), {
      endpoint: endpointOf(items), strict: isStrict, verbose: isVerbose
    })
    if (!breaker.admits()) return { code: 'mixpanel_unavailable', retryAfter: breaker.retryAfter() }
    const time = () => Math.min(config.MIXPANEL_TIMEOUT_MS, deadline - performance.now())
    const due = performance.now() + time()
    const attempt = () => mixpanel.send(request, time()).catch((error: Error) => {
      breaker.record(true)
      throw error
    })
    // Late, because the caller's time was nearly up before: that says nothing of Mixpanel.
    const isShort = time() < Math.min(config.MIXPANEL_TIMEOUT_MS, config.DEADLINE_MS) / 2
    let verdict = await attempt()
    const isStalled = performance.now() > due + STALL_MS
    breaker.record(!isTransient(verdict) || ((isShort || isStalled) && verdict.code === 'mixpanel_timed_out'))
    // Jitter, so that those who failed together do not come back together.
    const pause = 50 + Math.random() * 250
    if (isTransient(verdict) && mayRetry() && performance.now() + pause < deadline) {
      log.warn({ code: verdict.code, cause: verdict.cause, identities: items.length }, 'retrying')
      retries++
      await sleep(pause)
      verdict = await attempt().finally(() => { retries-- })
      if (!isTransient(verdict)) breaker.record(true)
    }
    if (verdict.code === 'refused_by_mixpanel') log.debug({ reason: verdict.reason }, 'refused')
    lastVerdict = { code: verdict.code, at: Date.now() }
    return verdict
  }

  const endpointOf = ([first]: OutgoingEvent[]) => first?.endpoint ?? config.MIXPANEL_ENDPOINT
  const mayRetry = () => !breaker.isOpen() && retries < Math.max(RETRY_MINIMUM, sends * RETRY_SHARE)

  const bisect = createBisect<OutgoingEvent>({ send: sendInSlot, isTerse: items => endpointOf(items) === 'track' })

  return {
    /** True while Mixpanel keeps failing and is asked by probes alone. */
    isOpen: breaker.isOpen,

    /** Resolves by the earliest deadline with a verdict for each, in their order; rejects only on a bug. */
    deliver: bisect,

    /** For people: whether Mixpanel is asked, and what it said last. */
    state: () => ({
      mixpanel: breaker.isOpen() ? 'unavailable' : 'asked',
      last_verdict: lastVerdict === undefined ? null : { ...lastVerdict, at: new Date(lastVerdict.at).toISOString() }
    })
  }
}
