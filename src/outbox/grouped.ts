import { createBatcher } from '../concurrency/batcher.ts'
import type { PendingEvent } from '../identity/event.ts'
import { throttled, type Log } from '../log.ts'
import type { HasResult, Outbox, PutResult } from './outbox.ts'

interface NewEvent { event: PendingEvent, maxBytes: number }

interface Store {
  /** Stores events, and resolves with a result for each. A rejection means that they may have been stored. */
  store: (events: NewEvent[]) => Promise<{ results: PutResult[], cause?: string }>
  /** Resolves with whether each anonKey is queued. */
  lookUp: (anonKeys: string[]) => Promise<boolean[]>
  /** The most events in one call of `store`, or anonKeys in one of `lookUp`. */
  maxGroup: number
  /** The most calls of `store` that are under way: with one, the events that come meanwhile share the next. */
  maxStores?: number
}

/** Returns `put` and `has` of an outbox. Concurrent calls are grouped; a failure becomes a word and a log line. */
export function groupCalls (
  { store, lookUp, maxGroup, maxStores = Infinity }: Store, log: Log
): Pick<Outbox, 'put' | 'has'> & { idle: () => Promise<unknown> } {
  const warnUnavailable = throttled(log, 'warn', 'outbox unavailable')
  const warnRejected = throttled(log, 'warn', 'outbox write rejected')

  const unknownFor = (items: unknown[]) => (error: Error) => {
    warnUnavailable({ cause: error.message })
    return items.map(() => 'unknown' as const)
  }

  async function storeAll (events: NewEvent[]): Promise<PutResult[]> {
    const { results, cause } = await store(events)
    if (cause !== undefined) warnRejected({ cause })
    return results
  }

  const puts = createBatcher<NewEvent, PutResult>({
    maxBatch: maxGroup, maxSends: maxStores, send: events => storeAll(events).catch(unknownFor(events))
  })
  const lookups = createBatcher<string, HasResult>({
    maxBatch: maxGroup,
    send: anonKeys => lookUp(anonKeys).then(found => found.map(is => is ? 'yes' : 'no'), unknownFor(anonKeys))
  })

  return {
    put: (event, maxBytes = Number.MAX_SAFE_INTEGER) => puts.add({ event, maxBytes }),
    has: anonKey => lookups.add(anonKey),
    idle: () => Promise.all([puts.idle(), lookups.idle()])
  }
}
