export interface BatcherOptions<Item, Result> {
  /** Sends 1 to `maxBatch` items; resolves with a result for each, in order. A rejection reaches every caller. */
  send: (items: Item[]) => Promise<Result[]>
  maxBatch: number
  /** How many sends may be under way at a time. */
  maxSends: number
  /** How many items may wait, those being sent included. */
  maxItems: number
  /** How long an item may wait for its send; then it gets what `late` returns and is never sent. */
  maxWaitMs: number
  late: () => Result
  /** True for an item that shares its batch with no other. */
  isAlone: (item: Item) => boolean
}

interface Entry<Item, Result> {
  item: Item
  expires: number
  resolve: (result: Result) => void
  reject: (error: unknown) => void
}

/**
 * Merges concurrent calls into one, as a database groups commits; knows nothing of what it carries.
 *
 * When does a batch leave? While fewer than `maxSends` are under way: as soon as the event loop has read what came
 * together with it, which for a lone item is at once. Otherwise when one of the sends ends, with what came meanwhile,
 * up to `maxBatch`. Nothing waits for a batch to fill, so idle callers see no delay, and the slower the sends and the
 * more the callers, the larger the batches. A caller who goes away changes nothing: his item is sent with its batch.
 */
export function createBatcher<Item, Result> (options: BatcherOptions<Item, Result>) {
  const { send, maxBatch, maxSends, maxItems, maxWaitMs, late, isAlone } = options
  const queue: Entry<Item, Result>[] = []
  let items = 0
  let sends = 0
  let isScheduled = false
  let expiry: NodeJS.Timeout | undefined
  let onIdle = () => {}

  function schedule (): void {
    if (isScheduled || sends >= maxSends) return
    isScheduled = true
    setImmediate(dispatch)
  }

  function dispatch (): void {
    isScheduled = false
    for (let [first] = queue; first !== undefined && sends < maxSends; [first] = queue) {
      const next = queue.findIndex(({ item }, index) => index > 0 && (index === maxBatch || isAlone(item)))
      const end = isAlone(first.item) ? 1 : next === -1 ? Math.min(queue.length, maxBatch) : next
      run(queue.splice(0, end))
    }
    watch()
  }

  async function run (batch: Entry<Item, Result>[]): Promise<void> {
    sends++
    try {
      const results = await send(batch.map(({ item }) => item))
      batch.forEach(({ resolve }, index) => resolve(results[index] as Result))
    } catch (error) {
      for (const { reject } of batch) reject(error)
    }
    sends--
    items -= batch.length
    if (items === 0) onIdle()
    dispatch()
  }

  /** Only one timer, for the first in the queue, and none while nothing has to wait. */
  function watch (): void {
    const [first] = queue
    if (first !== undefined) expiry ??= setTimeout(expire, first.expires - Date.now())
  }

  function expire (): void {
    expiry = undefined
    while (queue[0] !== undefined && queue[0].expires <= Date.now()) {
      items--
      queue.shift()?.resolve(late())
    }
    watch()
  }

  return {
    /** The item's own result; undefined, at once, where `maxItems` wait already. */
    add (item: Item): Promise<Result> | undefined {
      if (items >= maxItems) return undefined
      items++
      return new Promise((resolve, reject) => {
        queue.push({ item, expires: Date.now() + maxWaitMs, resolve, reject })
        schedule()
        if (!isScheduled) watch()
      })
    },
    /** How many items wait, those being sent included. */
    waiting: () => items,
    /** Resolves when no item waits any more. */
    idle: () => items === 0 ? Promise.resolve() : new Promise<void>(resolve => { onIdle = resolve })
  }
}
