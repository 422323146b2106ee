import type { Config } from '../config.ts'
import { NEVER_SENT, type Delivery, type OutgoingEvent } from '../mixpanel/delivery.ts'
import type { PendingEvent } from '../identity/event.ts'
import type { Log } from '../log.ts'
import { createKeyedMutex } from '../concurrency/keyed-mutex.ts'
import { createForwarder } from './forwarder.ts'
import type { Outbox } from '../outbox/outbox.ts'
import { isDeferrable, isUndelivered, OVERLOADED, type Verdict } from '../identity/verdict.ts'

interface Dependencies {
  outbox: Outbox
  delivery: Delivery
  /** Resolves with the verdict of one that is sent now. */
  send: (item: OutgoingEvent) => Promise<Verdict>
  log: Log
}

const overloaded = (reason: string): Verdict => ({ ...OVERLOADED, reason })
const NOT_STORED = overloaded('The outbox is full, or cannot write: it was not kept.')
const STORE_UNREACHABLE = overloaded('The outbox is out of reach: it was neither sent nor kept.')
const MAYBE_STORED = overloaded('The outbox did not answer in time, and may have kept it: a repeat is safe.')

/**
 * Sends identities, or keeps them in the outbox where Mixpanel cannot take them now. The first claim on an anonymous id
 * wins at Mixpanel for ever, so claims on one keep the order in which they came: a second one waits for the verdict of
 * the first, and follows it into the outbox.
 */
export function createStoreAndForward (config: Config, { outbox, delivery, send, log }: Dependencies) {
  const forwarder = createForwarder(config, outbox, delivery, log)
  // When one is accepted the anonymous id is taken, and the order of the others decides nothing.
  const mutex = createKeyedMutex<Verdict>(({ code }) => code === 'accepted')

  /** What ends the wait of those who are being sent. */
  const sending = new Set<() => void>()
  let isStopped = false

  async function store (event: PendingEvent, cause: string): Promise<Verdict> {
    const result = await outbox.put(event)
    if (result !== 'stored') return result === 'rejected' ? NOT_STORED : MAYBE_STORED
    forwarder.added()
    return { code: 'queued', cause }
  }

  function sendUnlessStopped (item: OutgoingEvent): Promise<Verdict> {
    return new Promise((resolve, reject) => {
      const giveUp = () => resolve({ code: 'mixpanel_timed_out', cause: 'the relay ends', isTransient: true })
      if (isStopped) return resolve(NEVER_SENT)
      sending.add(giveUp)
      send(item).then(resolve, reject).finally(() => sending.delete(giveUp))
    })
  }

  async function sendOrStore (item: OutgoingEvent): Promise<Verdict> {
    const { event, deadline } = item
    const hasEarlier = await outbox.has(event.anonKey)
    if (hasEarlier === 'unknown') return STORE_UNREACHABLE
    if (hasEarlier === 'yes') return store(event, 'an earlier claim waits')
    // Who has waited that long for an earlier claim has no time left for Mixpanel.
    if (performance.now() > deadline - config.DEADLINE_MS / 2) return store(event, 'late')
    const verdict = await sendUnlessStopped(item)
    if (verdict.code === 'accepted') forwarder.recovered()
    if (!isDeferrable(verdict)) return verdict
    const stored = await store(event, verdict.code)
    // Nobody may be told that nothing was sent when Mixpanel may have it.
    return stored.code === 'queued' || isUndelivered(verdict) ? stored : verdict
  }

  return {
    /** The verdict of an identity: as by `send`, or `queued` once it is on disk. `isAsync`: Mixpanel is not asked. */
    async identify (item: OutgoingEvent, isAsync: boolean): Promise<Verdict> {
      if (mutex.inFlight() >= config.MAX_IN_FLIGHT) return OVERLOADED
      return mutex.run(item.event.anonKey, () => isAsync ? store(item.event, 'respond-async') : sendOrStore(item))
    },

    /** From now on nobody waits for Mixpanel: whoever does, or would, is kept instead. */
    stopWaiting (): void {
      isStopped = true
      for (const giveUp of sending) giveUp()
    },

    /** How many are not yet sent or kept. */
    inFlight: mutex.inFlight,

    /** Begins to deliver what waits in the outbox. */
    start: forwarder.start,

    /** Resolves when no caller waits and nothing leaves the outbox any more. */
    async stop (): Promise<void> {
      await mutex.idle()
      await forwarder.stop()
    }
  }
}
