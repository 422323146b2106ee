import type { Config } from '../config.ts'
import type { Delivery, OutgoingEvent } from '../mixpanel/delivery.ts'
import type { Log } from '../log.ts'
import { NO_METRICS, type Metrics } from '../metrics.ts'
import { createDeadLetterExpiry } from './dead-letter-expiry.ts'
import { createForwarder } from './forwarder.ts'
import type { Outbox } from '../outbox/outbox.ts'
import { isDeferrable, NEVER_SENT, OVERLOADED, type Outcome, type Verdict } from '../identity/verdict.ts'

interface Dependencies {
  outbox: Outbox
  delivery: Delivery
  send: (item: RelayedEvent) => Promise<Verdict>
  /** Resolves every `send` under way with this verdict. */
  abandon: (verdict: Verdict) => void
  log: Log
  metrics?: Metrics
}

/** An event that is stored, not sent, when half of its time has passed at `halfway`, by performance.now(). */
export interface RelayedEvent extends OutgoingEvent { halfway: number }

export interface StoreOptions {
  /** The verdict comes once the event is in the outbox (RFC 7240, `respond-async`). */
  isAsync?: boolean
  /** The caller may fill the whole outbox. Others may fill half of it, so that they cannot fill it for all. */
  isTrusted?: boolean
}

const overloaded = (reason: string): Verdict => ({ ...OVERLOADED, reason })
const NOT_STORED = overloaded('The outbox is full or cannot write. The identity was not stored.')
const OUT_OF_REACH = 'The outbox is out of reach. The identity was neither sent nor stored.'
const MAYBE_STORED = 'The outbox did not answer in time and may have stored the identity. A repeat is safe.'

/** How long a rejected write says that the next one would be rejected too. */
const REJECTED_MS = 60_000

/** Why events are stored: the label of each cause in the metrics, and its words in the log. */
const CAUSES = {
  respond_async: 'respond-async',
  paused: 'delivery is paused',
  earlier_queued: 'an earlier identity is queued',
  late: 'half of DEADLINE_MS has passed'
} as const

/** One of these causes, or the code of the verdict after which the event is stored. */
type StoreReason = keyof typeof CAUSES | Outcome

/**
 * Sends identities, and stores those that Mixpanel cannot take now. While an event waits in the outbox, later ones with
 * its anonymous id follow it there.
 */
export function createStoreAndForward (
  config: Config, { outbox, delivery, send, abandon, log, metrics = NO_METRICS }: Dependencies
) {
  const forwarder = createForwarder(config, outbox, delivery, log, metrics)
  const expiry = createDeadLetterExpiry(config, outbox, log, metrics)

  let isStopped = false
  let rejectedAt: Date | undefined
  let rejectingSince: Date | undefined

  async function store ({ event }: RelayedEvent, reason: StoreReason, maxBytes: number): Promise<Verdict> {
    const result = await outbox.put(event, maxBytes)
    metrics.outbox(result, reason)
    rejectedAt = result === 'rejected' ? new Date() : undefined
    rejectingSince = rejectedAt && (rejectingSince ?? rejectedAt)
    if (result === 'rejected') return NOT_STORED
    if (result === 'unknown') return { ...overloaded(`${MAYBE_STORED}${outage()}`), taken: 'unknown' }
    forwarder.added()
    const cause = reason in CAUSES ? CAUSES[reason as keyof typeof CAUSES] : reason
    return { code: 'queued', taken: 'unknown', cause }
  }

  /** Returns a sentence about the part that is away, if any is. */
  function outage (): string {
    const found = outbox.outage()
    return found === undefined ? '' : ` The outbox waits for its ${found.part} since ${found.since.toISOString()}.`
  }

  async function sendOrStore (item: RelayedEvent, maxBytes: number): Promise<Verdict> {
    const { event, halfway } = item
    if (outbox.counts().paused) return store(item, 'paused', maxBytes)
    // An event without an anonymous id has no order.
    const found = event.anonKey === undefined ? 'no' : outbox.has(event.anonKey)
    const hasEarlier = typeof found === 'string' ? found : await found
    if (hasEarlier === 'unknown') return overloaded(`${OUT_OF_REACH}${outage()}`)
    if (hasEarlier === 'yes') return store(item, 'earlier_queued', maxBytes)
    // Half the deadline has passed behind an earlier identity; too little is left to send.
    if (performance.now() > halfway) return store(item, 'late', maxBytes)
    const verdict = isStopped ? NEVER_SENT : await send(item)
    if (verdict.code === 'accepted') forwarder.recovered()
    if (!isDeferrable(verdict)) return verdict
    const stored = await store(item, verdict.code, maxBytes)
    // When Mixpanel may have the event, the answer must not say that it was not sent.
    return stored.code === 'queued' || verdict.taken === 'no' ? stored : verdict
  }

  return {
    /** Resolves with the verdict of `send`, or with `queued` once the event is on disk. `isAsync`: stores at once. */
    identify (item: RelayedEvent, { isAsync = false, isTrusted = false }: StoreOptions): Promise<Verdict> {
      const maxBytes = isTrusted ? config.OUTBOX_MAX_BYTES : config.OUTBOX_MAX_BYTES / 2
      return isAsync ? store(item, 'respond_async', maxBytes) : sendOrStore(item, maxBytes)
    },

    /** Stops waiting for Mixpanel: events being sent, and all later ones, are stored. */
    stopWaiting (): void {
      isStopped = true
      abandon({ code: 'mixpanel_timed_out', taken: 'unknown', cause: 'shutdown' })
    },

    /** Returns the first of the writes that were rejected without a success since; undefined a minute later. */
    rejectingSince: () =>
      rejectedAt !== undefined && Date.now() - rejectedAt.getTime() < REJECTED_MS ? rejectingSince : undefined,

    start (): void {
      forwarder.start()
      expiry.start()
    },
    async stop (): Promise<void> {
      expiry.stop()
      await forwarder.stop()
    }
  }
}
