import type { Config } from './config.ts'
import type { Delivery, Item } from './delivery.ts'
import { claimOf, type IdentifyEvent } from './event.ts'
import { createOrder } from './order.ts'
import { createDrain } from './outbox/drain.ts'
import type { Outbox } from './outbox/outbox.ts'
import type { Verdict } from './verdict.ts'

/** What is said about the work; `pino` fits. */
export type Log = Record<'info' | 'warn' | 'error' | 'debug', (what: object, message: string) => void>

interface Dependencies {
  outbox: Outbox
  delivery: Delivery
  /** Resolves with the verdict of one that is sent now. */
  send: (item: Item) => Promise<Verdict>
  log: Log
}

const NOT_KEPT: Verdict = {
  code: 'overloaded', retryAfter: 1, reason: 'The outbox is full or out of reach, and nothing was kept.'
}

/**
 * Sends identities, or keeps them in the outbox where Mixpanel cannot take them now. The first claim on an anonymous id
 * wins at Mixpanel for ever, so claims on one keep the order in which they came: a second one waits for the verdict of
 * the first, and follows it into the outbox.
 */
export function createKeeper (config: Config, { outbox, delivery, send, log }: Dependencies) {
  const drain = createDrain(config, outbox, delivery, log)
  // When one is accepted the anonymous id is taken, and the order of the others decides nothing.
  const order = createOrder<Verdict>(({ code }) => code === 'accepted')

  async function keep (event: IdentifyEvent, cause: string): Promise<Verdict> {
    if (!await outbox.put(event)) return NOT_KEPT
    drain.added()
    return { code: 'queued', cause }
  }

  async function sendOrKeep (item: Item): Promise<Verdict> {
    const { event, deadline } = item
    const holds = await outbox.holds(claimOf(event))
    if (holds === undefined) return NOT_KEPT
    if (holds) return keep(event, 'an earlier claim waits')
    // Who has waited that long for an earlier claim has no time left for Mixpanel.
    if (Date.now() > deadline - config.DEADLINE_MS / 2) return keep(event, 'late')
    const verdict = await send(item)
    if (verdict.code === 'accepted') drain.recovered()
    return isForLater(verdict) ? keep(event, verdict.code) : verdict
  }

  return {
    /** The verdict of an identity: as by `send`, or `queued` once it is on disk. `isAsync`: Mixpanel is not asked. */
    async identify (item: Item, isAsync: boolean): Promise<Verdict> {
      if (order.waiting() >= config.MAX_IN_FLIGHT) return { code: 'overloaded', retryAfter: 1 }
      return order.run(claimOf(item.event), () => isAsync ? keep(item.event, 'respond-async') : sendOrKeep(item))
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

/** True where Mixpanel may take it another time: it was out of reach, late, busy, or what answered was not Mixpanel. */
function isForLater (verdict: Verdict): boolean {
  return verdict.code === 'mixpanel_timed_out' || verdict.code === 'mixpanel_rate_limited' ||
    verdict.code === 'mixpanel_unavailable' || ('again' in verdict && verdict.again)
}
