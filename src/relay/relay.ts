import { createBatcher } from '../concurrency/batcher.ts'
import type { Config } from '../config.ts'
import { createDelivery, MAX_SENT_BYTES, NEVER_SENT, type OutgoingEvent } from '../mixpanel/delivery.ts'
import { identifyEvent, type PendingEvent } from '../identity/event.ts'
import type { Identity } from '../identity/identity.ts'
import { createStoreAndForward } from './store-and-forward.ts'
import type { Log } from '../log.ts'
import { MAX_SENDS, type Mixpanel } from '../mixpanel/client.ts'
import { MAX_REQUEST_BYTES, wireBytes } from '../mixpanel/encode.ts'
import type { Outbox } from '../outbox/outbox.ts'
import { OVERLOADED, type Verdict } from '../identity/verdict.ts'

export type Relay = ReturnType<typeof createRelay>

/**
 * How many requests to Mixpanel may be under way before an identity waits for company. Measured with 4, 6, 8 and 16:
 * 500 callers at 50 ms get 0.80, 0.84, 0.86 and 0.86 of what that latency allows, and a thousand who come within 0.7 s,
 * at 20 ms, cost 42, 51, 62 and 96 requests.
 */
const FREE_SENDS = 6

/** How a caller wants it: validated by Mixpanel (`strict=1`), answered as soon as it is in the outbox (RFC 7240). */
export interface IdentifyOptions { isStrict?: boolean, isAsync?: boolean }

/**
 * What happens to an identity once it is accepted: it joins a batch, the batch is delivered, each gets its verdict.
 * With an outbox, what cannot be delivered now is kept and delivered later. Its creator closes what it is given.
 */
export function createRelay (config: Config, mixpanel: Mixpanel, log: Log, outbox?: Outbox) {
  const delivery = createDelivery(config, mixpanel, log)
  const batcher = createBatcher<OutgoingEvent, Verdict>({
    send: delivery.deliver,
    maxBatch: config.MAX_BATCH,
    bytesOf: ({ event }) => wireBytes(event, config),
    maxBytes: MAX_REQUEST_BYTES,
    maxSentBytes: MAX_SENT_BYTES,
    freeSends: FREE_SENDS,
    maxSends: MAX_SENDS,
    maxItems: config.MAX_IN_FLIGHT,
    // In the last tenth of its time a send would hardly be answered, and its failure would be counted as Mixpanel's.
    late: { afterMs: config.DEADLINE_MS * 0.9, result: NEVER_SENT },
    isAlone: item => item.isStrict
  })
  const send = (item: OutgoingEvent): Promise<Verdict> => batcher.add(item) ?? Promise.resolve(OVERLOADED)
  const storeAndForward = outbox && createStoreAndForward(config, { outbox, send, delivery, log })

  return {
    /**
     * Resolves with the identity's own verdict within DEADLINE_MS; rejects only on a bug. With MAX_IN_FLIGHT identities
     * waiting it is `overloaded` at once. A caller who goes away stops nothing: what is accepted is sent, or kept.
     */
    identify (event: PendingEvent, { isStrict = false, isAsync = false }: IdentifyOptions = {}): Promise<Verdict> {
      const item = { event, isStrict, deadline: performance.now() + config.DEADLINE_MS }
      return storeAndForward === undefined ? send(item) : storeAndForward.identify(item, isAsync)
    },

    /** The event of an identity that is accepted now. */
    toEvent: (identity: Identity) => identifyEvent(identity, Date.now()),

    /** The event as it would be sent, with the token masked. */
    preview: mixpanel.preview,

    /** For people: how many identities' callers wait, what is in the outbox, and what Mixpanel said last. */
    state: () => ({
      in_flight: storeAndForward?.inFlight() ?? batcher.inFlight(),
      ...outbox && { outbox: outbox.counts() },
      ...delivery.state()
    }),

    /** Time is up: with an outbox, whoever still waits for Mixpanel is kept there instead. */
    stopWaiting: () => storeAndForward?.stopWaiting(),

    /** Begins to deliver what waits in the outbox; needed once, before the first identity. */
    start: () => storeAndForward?.start(),

    /** Resolves when no identity is in flight any more, those of clients that have gone included. */
    stop: () => storeAndForward === undefined ? batcher.idle() : storeAndForward.stop()
  }
}
