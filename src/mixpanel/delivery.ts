import { setTimeout as sleep } from 'node:timers/promises'
import type { Config } from '../config.ts'
import type { PendingEvent } from '../identity/event.ts'
import type { Log } from '../log.ts'
import { createBreaker } from './breaker.ts'
import { MAX_SENDS, type Mixpanel } from './client.ts'
import { MAX_REQUEST_BYTES } from './encode.ts'
import { isTransient, type Verdict } from '../identity/verdict.ts'
import { createBisect } from './bisect.ts'

/** An event to send. `deadline` is by performance.now(), safe from clock changes; in a batch the earliest counts. */
export interface OutgoingEvent {
  event: PendingEvent
  isStrict: boolean
  deadline: number
  /** Overrides MIXPANEL_ENDPOINT; the same for all events of a batch. */
  endpoint?: 'import' | undefined
}

/** The most bytes on the wire of all requests in flight; the last request may exceed it. */
export const MAX_SENT_BYTES = 16 * MAX_REQUEST_BYTES

/** The most retries in flight: a fifth of the sends, so that an outage does not double the traffic, but at least 3. */
const RETRY_SHARE = 0.2
const RETRY_MINIMUM = 3

/** A timer that fires this late was delayed by this process (a SIGSTOP, a pause), not by Mixpanel. */
const STALL_MS = 500

/** The verdict of an event whose deadline passed before it was sent. */
export const NEVER_SENT: Verdict = {
  code: 'mixpanel_timed_out', cause: 'never sent', isTransient: false, isUndelivered: true
}

export type Delivery = ReturnType<typeof createDelivery>

/** Sends batches to Mixpanel, retries a failed request once, and finds the failing events of a refused batch. */
export function createDelivery (config: Config, mixpanel: Mixpanel, log: Log) {
  const breaker = createBreaker()
  const waiting: (() => void)[] = []
  let sends = 0
  let retries = 0
  let lastVerdict: { code: Verdict['code'], at: number } | undefined

  /** Sends when a slot is free. The parts of a split batch share the slots, and their timeouts start with the send. */
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
    // Encode before asking the breaker: an error here must not leave its one probe without an outcome.
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
    // When the deadline leaves less than half the usual time, a timeout says nothing about Mixpanel.
    const isShort = time() < Math.min(config.MIXPANEL_TIMEOUT_MS, config.DEADLINE_MS) / 2
    let verdict = await attempt()
    const isStalled = performance.now() > due + STALL_MS
    breaker.record(!isTransient(verdict) || ((isShort || isStalled) && verdict.code === 'mixpanel_timed_out'))
    // Jitter keeps requests that failed together from being retried together.
    const pause = 50 + Math.random() * 250
    if (isTransient(verdict) && mayRetry() && performance.now() + pause < deadline) {
      log.warn({ code: verdict.code, cause: verdict.cause, identities: items.length }, 'retrying')
      retries++
      await sleep(pause)
      verdict = await attempt().finally(() => { retries-- })
      if (!isTransient(verdict)) breaker.record(true)
    }
    if (verdict.code === 'refused_by_mixpanel') log.debug({ reason: verdict.reason }, 'request refused by Mixpanel')
    lastVerdict = { code: verdict.code, at: Date.now() }
    return verdict
  }

  const endpointOf = ([first]: OutgoingEvent[]) => first?.endpoint ?? config.MIXPANEL_ENDPOINT
  const mayRetry = () => !breaker.isOpen() && retries < Math.max(RETRY_MINIMUM, sends * RETRY_SHARE)

  const bisect = createBisect<OutgoingEvent>({ send: sendInSlot, isTerse: items => endpointOf(items) === 'track' })

  return {
    /** Returns true while Mixpanel keeps failing and gets only probes. */
    isOpen: breaker.isOpen,

    /** Resolves by the earliest deadline with a verdict for each event, in order; rejects only on a bug. */
    deliver: bisect,

    /** Returns, for operators, whether requests are sent to Mixpanel, and its last verdict. */
    state: () => ({
      mixpanel: breaker.isOpen() ? 'unavailable' : 'asked',
      last_verdict: lastVerdict === undefined ? null : { ...lastVerdict, at: new Date(lastVerdict.at).toISOString() }
    })
  }
}
