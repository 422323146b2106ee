import { createBatcher } from '../concurrency/batcher.ts'
import { createInFlight } from '../concurrency/in-flight.ts'
import { createKeyedMutex } from '../concurrency/keyed-mutex.ts'
import type { Config } from '../config.ts'
import { createDelivery, MAX_SENT_BYTES, type OutgoingEvent } from '../mixpanel/delivery.ts'
import { createToEvent, type PendingEvent } from '../identity/event.ts'
import type { Identity } from '../identity/identity.ts'
import { createMergeGuard } from './merge-guard.ts'
import { createStoreAndForward, type RelayedEvent, type StoreOptions } from './store-and-forward.ts'
import { throttled, type Log } from '../log.ts'
import { MAX_SENDS, type Mixpanel } from '../mixpanel/client.ts'
import { MAX_REQUEST_BYTES, wireBytes } from '../mixpanel/encode.ts'
import { NO_METRICS, type Metrics } from '../metrics.ts'
import type { Outbox } from '../outbox/outbox.ts'
import { isRetryable, NEVER_SENT, OVERLOADED, type Verdict } from '../identity/verdict.ts'

export type Relay = ReturnType<typeof createRelay>

/**
 * How many requests to Mixpanel may be in flight before identities wait for a batch. Six is a compromise: with 4, 6, 8
 * and 16, 500 callers at 50 ms get 0.80, 0.84, 0.86 and 0.86 of the throughput that this latency allows, and 1000
 * callers within 0.7 s, at 20 ms, cost 42, 51, 62 and 96 requests.
 */
const FREE_SENDS = 6

/** The most identities that wait for others with their anonymous id: more would run out of time. */
const MAX_QUEUED = 256
const CROWDED: Verdict = { ...OVERLOADED, reason: 'Too many identities with this anonymous id are in flight.' }

/** Events from before this release come from a wrong clock, and Mixpanel would drop them. In seconds. */
const EARLIEST_TIME = Date.UTC(2026, 10, 1) / 1000
const CLOCK_IS_WRONG: Verdict = { ...OVERLOADED, reason: 'The clock of the relay is wrong; its operator must set it.' }

/** The SDKs for Java and Ruby leave after 10 s. This leaves time to store an event. */
const SDK_WAIT_MS = 6500

export interface IdentifyOptions extends StoreOptions {
  /** Mixpanel validates the event (`strict=1`). */
  isStrict?: boolean
  /** The retryable failures of one batch, by anonymous id: later identities of the batch fail alike. */
  failures?: Map<string, Verdict>
}

/**
 * The path of a validated identity: it joins a batch, the batch is sent, and each identity gets its own verdict. With
 * an outbox, events that Mixpanel cannot take now are stored and sent later. The caller closes `mixpanel` and `outbox`.
 */
export function createRelay (
  config: Config, mixpanel: Mixpanel, log: Log, outbox?: Outbox, metrics: Metrics = NO_METRICS
) {
  const delivery = createDelivery(config, mixpanel, log, metrics)
  // An item in the batcher has the patience of the SDKs if there are any.
  const longestWait = config.COMPAT === 'off' ? config.DEADLINE_MS : Math.min(config.DEADLINE_MS, SDK_WAIT_MS)
  const batcher = createBatcher<OutgoingEvent, Verdict>({
    send: delivery.deliver,
    maxBatch: config.MAX_BATCH,
    bytesOf: ({ event }) => wireBytes(event, config),
    maxBytes: MAX_REQUEST_BYTES,
    maxSentBytes: MAX_SENT_BYTES,
    freeSends: FREE_SENDS,
    maxSends: MAX_SENDS,
    // A send in the last tenth of the deadline would rarely be answered in time.
    late: { afterMs: longestWait * 0.9, result: NEVER_SENT },
    isAlone: item => item.isStrict
  })
  const storeAndForward = outbox &&
    createStoreAndForward(config, { outbox, send: batcher.add, abandon: batcher.abandon, delivery, log, metrics })
  const logWrongClock = throttled(log, 'error', 'clock before the date of this release')
  // The first user of an anonymous id keeps it for ever, so identities with one anonymous id are sent one at a time.
  const mutex = createKeyedMutex(MAX_QUEUED)
  /** Events of SDKs that do not merge, and so have no order. */
  const unordered = createInFlight()
  const inFlight = () => mutex.inFlight() + unordered.count()
  const toEvent = createToEvent(config)

  const mergeGuard = createMergeGuard(config, log, { metrics })

  const sendOrStore = (item: RelayedEvent, options: IdentifyOptions): Promise<Verdict> =>
    storeAndForward === undefined ? batcher.add(item) : storeAndForward.identify(item, options)

  const sendIfPlausible = (item: RelayedEvent, options: IdentifyOptions): Promise<Verdict> => mergeGuard === undefined
    ? sendOrStore(item, options)
    : mergeGuard.run(item.event, () => sendOrStore(item, options))

  function rejection () {
    const since = storeAndForward?.rejectingSince()
    return since && { rejecting_since: since.toISOString() }
  }

  async function identifyInBatch (
    item: RelayedEvent, anonKey: string, options: IdentifyOptions, failures: Map<string, Verdict>
  ): Promise<Verdict> {
    const failure = failures.get(anonKey)
    // If this one were sent, the caller's repeat of the earlier one would come too late.
    if (failure !== undefined) return { ...failure, taken: 'no' }
    const verdict = await sendIfPlausible(item, options)
    if (isRetryable(verdict)) failures.set(anonKey, verdict)
    return verdict
  }

  /**
   * Sends an event that arrived at a time (in seconds) within `wait` ms, after the earlier ones with its anonymous id
   * and another `owner`.
   */
  async function relayEvent (
    event: PendingEvent, arrived: number, wait: number, options: IdentifyOptions, owner?: string
  ): Promise<Verdict> {
    const { anonKey } = event
    const { isStrict = false, failures } = options
    if (inFlight() >= config.MAX_IN_FLIGHT) return OVERLOADED
    if (arrived < EARLIEST_TIME) {
      logWrongClock({ time: arrived })
      return CLOCK_IS_WRONG
    }
    const now = performance.now()
    const item = { event, isStrict, deadline: now + wait, halfway: now + wait / 2, attempts: 0 }
    if (anonKey === undefined) {
      unordered.begin()
      return sendOrStore(item, options).finally(() => unordered.end())
    }
    const turn = mutex.enter(anonKey, owner)
    if (turn === 'full') return CROWDED
    try {
      if (turn !== undefined) await turn
      return await (failures === undefined
        ? sendIfPlausible(item, options)
        : identifyInBatch(item, anonKey, options, failures))
    } finally {
      mutex.leave(anonKey)
    }
  }

  return {
    /**
     * Resolves with the verdict within DEADLINE_MS; rejects only on a bug. With MAX_IN_FLIGHT identities in flight the
     * verdict is `overloaded`, at once. A caller that disconnects changes nothing: the event is sent or stored.
     */
    identify: (event: PendingEvent, options: IdentifyOptions = {}): Promise<Verdict> =>
      relayEvent(event, event.time, config.DEADLINE_MS, options),

    /**
     * The same for an event of an SDK, within `waitMs` or less. Events that merge one pair of ids do not wait for each
     * other, and events that do not merge wait for none.
     */
    track: (event: PendingEvent, waitMs: number, options: IdentifyOptions): Promise<Verdict> =>
      relayEvent(event, Date.now() / 1000, Math.min(longestWait, waitMs), options, event.userId),

    /** Returns true if `count` more events may be in flight. */
    hasRoom: (count: number) => inFlight() + count <= config.MAX_IN_FLIGHT,

    /** Returns true if `text` looks like the token of another project. */
    isForeignToken: mixpanel.isForeignToken,

    /** Returns the event of an identity that is validated now. */
    toEvent: (identity: Identity) => toEvent(identity, Date.now()),

    preview: mixpanel.preview,

    /** Returns, for operators: identities in flight, the counts of the outbox, and Mixpanel's last verdict. */
    state: () => ({
      in_flight: inFlight(),
      ...outbox && { outbox: { ...outbox.counts(), ...outageOf(outbox), ...rejection() } },
      ...delivery.state()
    }),

    /** Returns when Mixpanel began to fail every request; undefined while it does not. */
    failingSince: delivery.failingSince,

    /** Returns how many seconds this clock is ahead of Mixpanel's; undefined until its first answer. */
    clockSkew: delivery.clockSkew,

    /** With an outbox, stores the identities that still wait for Mixpanel. Without one it does nothing. */
    stopWaiting: () => storeAndForward?.stopWaiting(),

    /** Starts the delivery of queued events. Call it once, before the first identity. */
    start: () => storeAndForward?.start(),

    /** Resolves when no identity is in flight, including those of disconnected callers. */
    async stop (): Promise<void> {
      await mutex.idle()
      await unordered.idle()
      await storeAndForward?.stop()
    }
  }
}

function outageOf (outbox: Outbox) {
  const outage = outbox.outage()
  return outage && { unavailable_since: outage.since.toISOString(), waits_for: outage.part }
}
