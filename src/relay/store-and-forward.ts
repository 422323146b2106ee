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
  send: (item: OutgoingEvent) => Promise<Verdict>
  log: Log
}

const overloaded = (reason: string): Verdict => ({ ...OVERLOADED, reason })
const NOT_STORED = overloaded('The outbox is full or cannot write. The identity was not stored.')
const STORE_UNREACHABLE = overloaded('The outbox is out of reach. The identity was neither sent nor stored.')
const MAYBE_STORED = overloaded('The outbox did not answer in time and may have stored the identity. A repeat is safe.')

/**
 * Sends identities, and stores those that Mixpanel cannot take now. Mixpanel merges an anonymous id with the first user
 * only, so identities with one anonymous id stay in order. The second one waits for the verdict of the first, and
 * follows it into the outbox.
 */
export function createStoreAndForward (config: Config, { outbox, delivery, send, log }: Dependencies) {
  const forwarder = createForwarder(config, outbox, delivery, log)
  // Once one identity is accepted, the anonymous id is taken, and the order of the others no longer matters.
  const mutex = createKeyedMutex<Verdict>(({ code }) => code === 'accepted')

  /** One callback for each event being sent; it ends the wait for Mixpanel. */
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
      const endWait = () => resolve({ code: 'mixpanel_timed_out', cause: 'shutdown', isTransient: true })
      if (isStopped) return resolve(NEVER_SENT)
      sending.add(endWait)
      send(item).then(resolve, reject).finally(() => sending.delete(endWait))
    })
  }

  async function sendOrStore (item: OutgoingEvent): Promise<Verdict> {
    const { event, deadline } = item
    const hasEarlier = await outbox.has(event.anonKey)
    if (hasEarlier === 'unknown') return STORE_UNREACHABLE
    if (hasEarlier === 'yes') return store(event, 'an earlier identity is queued')
    // Half the deadline has passed behind an earlier identity; too little is left to send.
    if (performance.now() > deadline - config.DEADLINE_MS / 2) return store(event, 'half of DEADLINE_MS has passed')
    const verdict = await sendUnlessStopped(item)
    if (verdict.code === 'accepted') forwarder.recovered()
    if (!isDeferrable(verdict)) return verdict
    const stored = await store(event, verdict.code)
    // When Mixpanel may have the event, the answer must not say that it was not sent.
    return stored.code === 'queued' || isUndelivered(verdict) ? stored : verdict
  }

  return {
    /** Resolves with the verdict of `send`, or with `queued` once the event is on disk. `isAsync`: stores at once. */
    async identify (item: OutgoingEvent, isAsync: boolean): Promise<Verdict> {
      if (mutex.inFlight() >= config.MAX_IN_FLIGHT) return OVERLOADED
      return mutex.run(item.event.anonKey, () => isAsync ? store(item.event, 'respond-async') : sendOrStore(item))
    },

    /** Stops waiting for Mixpanel: events being sent, and all later ones, are stored. */
    stopWaiting (): void {
      isStopped = true
      for (const endWait of sending) endWait()
    },

    /** Returns how many identities have no verdict yet. */
    inFlight: mutex.inFlight,

    start: forwarder.start,

    /** Resolves when no identity is in flight and the forwarder has stopped. */
    async stop (): Promise<void> {
      await mutex.idle()
      await forwarder.stop()
    }
  }
}
