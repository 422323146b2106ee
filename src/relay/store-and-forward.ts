import type { Config } from '../config.ts'
import { NEVER_SENT, type Delivery, type Item } from '../mixpanel/delivery.ts'
import type { PendingEvent } from '../identity/event.ts'
import type { Log } from '../log.ts'
import { createOrder } from '../concurrency/keyed-mutex.ts'
import { createDrain } from './forwarder.ts'
import type { Outbox } from '../outbox/outbox.ts'
import { isForLater, isUntaken, OVERLOADED, type Verdict } from '../identity/verdict.ts'

interface Dependencies {
  outbox: Outbox
  delivery: Delivery
  /** Resolves with the verdict of one that is sent now. */
  send: (item: Item) => Promise<Verdict>
  log: Log
}

const overloaded = (reason: string): Verdict => ({ ...OVERLOADED, reason })
const NOT_KEPT = overloaded('The outbox is full, or cannot write: it was not kept.')
const OUT_OF_REACH = overloaded('The outbox is out of reach: it was neither sent nor kept.')
const PERHAPS_KEPT = overloaded('The outbox did not answer in time, and may have kept it: a repeat is safe.')

/**
 * Sends identities, or keeps them in the outbox where Mixpanel cannot take them now. The first claim on an anonymous id
 * wins at Mixpanel for ever, so claims on one keep the order in which they came: a second one waits for the verdict of
 * the first, and follows it into the outbox.
 */
export function createKeeper (config: Config, { outbox, delivery, send, log }: Dependencies) {
  const drain = createDrain(config, outbox, delivery, log)
  // When one is accepted the anonymous id is taken, and the order of the others decides nothing.
  const order = createOrder<Verdict>(({ code }) => code === 'accepted')

  /** What ends the wait of those who are being sent. */
  const underWay = new Set<() => void>()
  let isHurried = false

  async function keep (event: PendingEvent, cause: string): Promise<Verdict> {
    const isKept = await outbox.put(event)
    if (isKept !== true) return isKept === false ? NOT_KEPT : PERHAPS_KEPT
    drain.added()
    return { code: 'queued', cause }
  }

  function sendUnlessHurried (item: Item): Promise<Verdict> {
    return new Promise((resolve, reject) => {
      const giveUp = () => resolve({ code: 'mixpanel_timed_out', cause: 'the relay ends', again: true })
      if (isHurried) return resolve(NEVER_SENT)
      underWay.add(giveUp)
      send(item).then(resolve, reject).finally(() => underWay.delete(giveUp))
    })
  }

  async function sendOrKeep (item: Item): Promise<Verdict> {
    const { event, deadline } = item
    const holds = await outbox.holds(event.anonKey)
    if (holds === undefined) return OUT_OF_REACH
    if (holds) return keep(event, 'an earlier claim waits')
    // Who has waited that long for an earlier claim has no time left for Mixpanel.
    if (performance.now() > deadline - config.DEADLINE_MS / 2) return keep(event, 'late')
    const verdict = await sendUnlessHurried(item)
    if (verdict.code === 'accepted') drain.recovered()
    if (!isForLater(verdict)) return verdict
    const kept = await keep(event, verdict.code)
    // Nobody may be told that nothing was sent when Mixpanel may have it.
    return kept.code === 'queued' || isUntaken(verdict) ? kept : verdict
  }

  return {
    /** The verdict of an identity: as by `send`, or `queued` once it is on disk. `isAsync`: Mixpanel is not asked. */
    async identify (item: Item, isAsync: boolean): Promise<Verdict> {
      if (order.waiting() >= config.MAX_IN_FLIGHT) return OVERLOADED
      return order.run(item.event.anonKey, () => isAsync ? keep(item.event, 'respond-async') : sendOrKeep(item))
    },

    /** From now on nobody waits for Mixpanel: whoever does, or would, is kept instead. */
    hurry (): void {
      isHurried = true
      for (const giveUp of underWay) giveUp()
    },

    /** How many are not yet sent or kept. */
    waiting: order.waiting,

    /** Resolves when nobody waits any more, nothing leaves the outbox, and the outbox is closed. */
    async close (): Promise<void> {
      await order.idle()
      await drain.stop()
      await outbox.close()
    }
  }
}
