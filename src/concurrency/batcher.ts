import { createInFlight } from './in-flight.ts'

export interface BatcherOptions<Item, Result> {
  /** Sends 1 to `maxBatch` items; resolves with a result for each, in order. A rejection reaches every caller. */
  send: (items: Item[]) => Promise<Result[]>
  maxBatch: number
  /** The size of an item, in the unit of `maxBytes`. */
  bytesOf?: (item: Item) => number
  /** The most that one send carries; an item that is larger travels alone. */
  maxBytes?: number
  /** While sends under way carry as much, none leaves. */
  maxSentBytes?: number
  /** While fewer sends than these are under way, nothing waits. By default it never does. */
  freeSends?: number
  /** How many sends may be under way at a time. */
  maxSends?: number
  /** How many items may wait, those being sent included. */
  maxItems?: number
  /** How long an item may wait for its send; then it gets this result and is never sent. By default for ever. */
  late?: { afterMs: number, result: Result }
  /** True for an item that shares its batch with no other. */
  isAlone?: (item: Item) => boolean
}

/** So many bytes may leave in one turn of the event loop, give or take a batch: to encode them takes time. */
const TURN_BYTES = 1_048_576

interface Entry<Item, Result> {
  item: Item
  bytes: number
  /** By performance.now(). */
  since: number
  resolve: (result: Result) => void
  reject: (error: unknown) => void
}

/**
 * Merges concurrent calls into one, as a database groups commits; knows nothing of what it carries.
 *
 * When does a batch leave? While fewer than `freeSends` are under way: as soon as the event loop has read what came
 * together with it, which for a lone item is at once. Otherwise when one of the sends ends, with what came meanwhile,
 * or when it is full, by count or by bytes (or holds one that travels alone), and fewer than `maxSends` are under way.
 * No timer fills a batch, so few callers see no delay, and the slower the sends and the more the callers, the larger
 * the batches. A caller who goes away changes nothing: his item is sent with its batch.
 */
export function createBatcher<Item, Result> ({
  send, maxBatch, bytesOf = () => 0, maxBytes = Infinity, maxSentBytes = Infinity, freeSends = Infinity,
  maxSends = Infinity, maxItems = Infinity, late, isAlone = () => false
}: BatcherOptions<Item, Result>) {
  const queue: Entry<Item, Result>[] = []
  const items = createInFlight()
  let queuedBytes = 0
  let sentBytes = 0
  let sends = 0
  let isScheduled = false
  let expiry: NodeJS.Timeout | undefined

  /** True if what is first in the queue may leave now. */
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
      const batch = nextBatch()
      bytes += sizeOf(batch)
      run(batch)
    }
    if (mayLeave()) schedule()
    watch()
  }

  /** Takes from the front of the queue what travels together. */
  function nextBatch (): Entry<Item, Result>[] {
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
    sends++
    sentBytes += bytes
    try {
      const results = await send(batch.map(({ item }) => item))
      batch.forEach(({ resolve }, index) => resolve(results[index] as Result))
    } catch (error) {
      for (const { reject } of batch) reject(error)
    }
    sends--
    sentBytes -= bytes
    items.end(batch.length)
    if (!isScheduled && mayLeave()) schedule()
  }

  /** Only one timer, for the first in the queue, and none while nothing has to wait. */
  function watch (): void {
    const [first] = queue
    if (first === undefined || late === undefined) return
    expiry ??= setTimeout(() => expire(late), first.since + late.afterMs - performance.now())
  }

  function expire ({ afterMs, result }: { afterMs: number, result: Result }): void {
    expiry = undefined
    while (queue[0] !== undefined && queue[0].since + afterMs <= performance.now()) {
      const [entry] = queue.splice(0, 1) as [Entry<Item, Result>]
      queuedBytes -= entry.bytes
      items.end()
      entry.resolve(result)
    }
    watch()
  }

  return {
    /** The item's own result; undefined, at once, where `maxItems` wait already. */
    add (item: Item): Promise<Result> | undefined {
      if (items.count() >= maxItems) return undefined
      items.begin()
      return new Promise((resolve, reject) => {
        const bytes = bytesOf(item)
        queuedBytes += bytes
        queue.push({ item, bytes, since: performance.now(), resolve, reject })
        if (isScheduled) return
        if (mayLeave()) schedule()
        else watch()
      })
    },
    /** How many items wait, those being sent included. */
    inFlight: items.count,
    /** Resolves when no item waits any more. */
    idle: items.idle
  }
}
