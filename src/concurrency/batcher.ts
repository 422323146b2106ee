import { setImmediate as nextTurn } from 'node:timers/promises'
import { createInFlight } from './in-flight.ts'

export interface BatcherOptions<Item, Result> {
  /** Sends 1 to `maxBatch` items; resolves with a result for each, in order. A rejection reaches every caller. */
  send: (items: Item[]) => Promise<Result[]>
  maxBatch: number
  /** The size of an item, in the unit of `maxBytes`. */
  bytesOf?: (item: Item) => number
  /** The most bytes of one batch; a larger item travels alone. */
  maxBytes?: number
  /** No batch leaves while this many bytes are in flight. */
  maxSentBytes?: number
  /** While fewer sends are in flight, no item waits. Unlimited by default. */
  freeSends?: number
  maxSends?: number
  /** An item that is queued for `afterMs` gets `result` and is never sent. By default items wait without limit. */
  late?: { afterMs: number, result: Result }
  /** Returns true for an item that must travel alone. */
  isAlone?: (item: Item) => boolean
}

/** The most bytes that leave in one turn of the event loop, plus at most one batch: encoding takes time. */
const TURN_BYTES = 1_048_576

/** The callers of a send that took SLOW_MS or more are answered SLICE at a time. */
const SLOW_MS = 20
const SLICE = 5

interface Entry<Item, Result> {
  item: Item
  bytes: number
  /** By performance.now(). */
  since: number
  resolve: (result: Result) => void
  reject: (error: unknown) => void
}

/**
 * Merges concurrent calls into one, as a database groups commits.
 *
 * While fewer than `freeSends` sends are in flight, a batch leaves once the event loop has read the items that arrived
 * together; a lone item leaves at once. Otherwise items wait until a send ends. With fewer than `maxSends` in flight, a
 * batch also leaves when it is full, by count or by bytes, or begins with an item that travels alone. No timer fills a
 * batch: with few callers there is no delay, and batches grow with the load and with the duration of the sends. A
 * caller that disconnects changes nothing: its item is sent with its batch.
 */
export function createBatcher<Item, Result> ({
  send, maxBatch, bytesOf = () => 0, maxBytes = Infinity, maxSentBytes = Infinity, freeSends = Infinity,
  maxSends = Infinity, late, isAlone = () => false
}: BatcherOptions<Item, Result>) {
  const queue: Entry<Item, Result>[] = []
  /**
   * An array, because V8 copies a Set that changes all the time again and again. Each old copy keeps the batches that
   * it held, with all their requests, until a major garbage collection: 1 KB of each identity.
   */
  const underWay: Entry<Item, Result>[][] = []
  const items = createInFlight()
  let queuedBytes = 0
  let sentBytes = 0
  let sends = 0
  let isScheduled = false
  let expiry: NodeJS.Timeout | undefined

  function mayLeave (): boolean {
    const [first] = queue
    if (first === undefined || sends >= maxSends || sentBytes >= maxSentBytes) return false
    return sends < freeSends || queue.length >= maxBatch || queuedBytes >= maxBytes || isAlone(first.item)
  }

  const sizeOf = (batch: Entry<Item, Result>[]) => batch.reduce((sum, { bytes }) => sum + bytes, 0)

  function schedule (): void {
    isScheduled = true
    setImmediate(dispatch)
  }

  function dispatch (): void {
    isScheduled = false
    let bytes = 0
    while (mayLeave() && bytes < TURN_BYTES) {
      const batch = takeBatch()
      bytes += sizeOf(batch)
      run(batch)
    }
    if (mayLeave()) schedule()
    scheduleExpiry()
  }

  function takeBatch (): Entry<Item, Result>[] {
    let count = 0
    let bytes = 0
    for (const entry of queue) {
      const isFull = count === maxBatch || bytes + entry.bytes > maxBytes
      if (count > 0 && (isFull || isAlone(entry.item) || isAlone((queue[0] as typeof entry).item))) break
      count++
      bytes += entry.bytes
    }
    queuedBytes -= bytes
    return queue.splice(0, count)
  }

  async function run (batch: Entry<Item, Result>[]): Promise<void> {
    const bytes = sizeOf(batch)
    const since = performance.now()
    sends++
    sentBytes += bytes
    underWay.push(batch)
    let results: Result[] | undefined
    try {
      results = await send(batch.map(({ item }) => item))
    } catch (error) {
      for (const { reject } of batch) reject(error)
    }
    sends--
    sentBytes -= bytes
    if (!isScheduled && mayLeave()) schedule()
    if (results !== undefined) await answer(batch, results, performance.now() - since)
    underWay.splice(underWay.indexOf(batch), 1)
    items.end(batch.length)
  }

  /**
   * Resolves the callers of a batch whose send took `ms`. After a slow one they are answered a few in each turn of the
   * event loop: otherwise they come back together, and their requests hold up all others.
   */
  async function answer (batch: Entry<Item, Result>[], results: Result[], ms: number): Promise<void> {
    const size = ms < SLOW_MS ? batch.length : SLICE
    let index = 0
    for (const { resolve } of batch) {
      if (index > 0 && index % size === 0) await nextTurn()
      resolve(results[index++] as Result)
    }
  }

  /** Starts the timer of the first item in the queue; one timer is enough. */
  function scheduleExpiry (): void {
    const [first] = queue
    if (first === undefined || late === undefined) return
    expiry ??= setTimeout(() => expire(late), first.since + late.afterMs - performance.now()).unref()
  }

  function expire ({ afterMs, result }: { afterMs: number, result: Result }): void {
    expiry = undefined
    while (queue[0] !== undefined && queue[0].since + afterMs <= performance.now()) {
      const [entry] = queue.splice(0, 1) as [Entry<Item, Result>]
      queuedBytes -= entry.bytes
      items.end()
      entry.resolve(result)
    }
    scheduleExpiry()
  }

  return {
    /** Resolves with the item's own result. */
    add (item: Item): Promise<Result> {
      items.begin()
      return new Promise((resolve, reject) => {
        const bytes = bytesOf(item)
        queuedBytes += bytes
        queue.push({ item, bytes, since: performance.now(), resolve, reject })
        if (isScheduled) return
        if (mayLeave()) schedule()
        else scheduleExpiry()
      })
    },
    /** Gives `result` to every caller that waits. Its item is sent all the same, and the result of that is dropped. */
    abandon (result: Result): void {
      for (const batch of [...underWay, queue]) for (const { resolve } of batch) resolve(result)
    },
    /** Resolves when every item has its result. */
    idle: items.idle
  }
}
