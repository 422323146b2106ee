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
 * How many requests to Mixpanel may be in flight before identities wait for a batch. Measured with 4, 6, 8 and 16: 500
 * callers at 50 ms get 0.80, 0.84, 0.86 and 0.86 of the throughput that this latency allows. 1000 callers within 0.7 s,
 * at 20 ms, cost 42, 51, 62 and 96 requests.
 */
const FREE_SENDS = 6

/** `isStrict`: Mixpanel validates the event (`strict=1`). `isAsync`: answered once it is in the outbox (RFC 7240). */
export interface IdentifyOptions { isStrict?: boolean, isAsync?: boolean }

/**
 * The path of a validated identity: it joins a batch, the batch is sent, and each identity gets its own verdict. With
 * an outbox, events that Mixpanel cannot take now are stored and sent later. The caller closes `mixpanel` and `outbox`.
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
    // A send in the last tenth of the deadline would rarely be answered, and would count as a failure of Mixpanel.
    late: { afterMs: config.DEADLINE_MS * 0.9, result: NEVER_SENT },
    isAlone: item => item.isStrict
  })
  const send = (item: OutgoingEvent): Promise<Verdict> => batcher.add(item) ?? Promise.resolve(OVERLOADED)
  const storeAndForward = outbox && createStoreAndForward(config, { outbox, send, delivery, log })

  return {
    /**
     * Resolves with the verdict within DEADLINE_MS; rejects only on a bug. With MAX_IN_FLIGHT identities in flight the
     * verdict is `overloaded`, at once. A caller that disconnects changes nothing: the event is sent or stored.
     */
    identify (event: PendingEvent, { isStrict = false, isAsync = false }: IdentifyOptions = {}): Promise<Verdict> {
      const item = { event, isStrict, deadline: performance.now() + config.DEADLINE_MS }
      return storeAndForward === undefined ? send(item) : storeAndForward.identify(item, isAsync)
    },

    /** Returns the event of an identity that is validated now. */
    toEvent: (identity: Identity) => identifyEvent(identity, Date.now()),

    preview: mixpanel.preview,

    /** Returns, for operators: identities in flight, the counts of the outbox, and Mixpanel's last verdict. */
    state: () => ({
      in_flight: storeAndForward?.inFlight() ?? batcher.inFlight(),
      ...outbox && { outbox: outbox.counts() },
      ...delivery.state()
    }),

    /** With an outbox, stores the identities that still wait for Mixpanel. Without one it does nothing. */
    stopWaiting: () => storeAndForward?.stopWaiting(),

    /** Starts the delivery of queued events. Call it once, before the first identity. */
    start: () => storeAndForward?.start(),

    /** Resolves when no identity is in flight, including those of disconnected callers. */
    stop: () => storeAndForward === undefined ? batcher.idle() : storeAndForward.stop()
  }
}
