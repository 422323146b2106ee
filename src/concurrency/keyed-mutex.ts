import { createInFlight } from './in-flight.ts'

/**
 * A mutex for each key: tasks with one key run one at a time, in the order of the calls. Once `isDecided` returns true
 * for a result, order no longer matters, and all queued tasks of that key start at once.
 */
export function createKeyedMutex<Result> (isDecided: (result: Result) => boolean) {
  /** Callbacks that start the queued tasks of a key. The argument is true for a task that holds the lock. */
  const queues = new Map<string, ((holdsLock: boolean) => void)[]>()
  const inFlight = createInFlight()

  async function run (key: string, task: () => Promise<Result>): Promise<Result> {
    inFlight.begin()
    const queue = queues.get(key)
    if (queue === undefined) queues.set(key, [])
    const holdsLock = queue === undefined || await new Promise<boolean>(resolve => queue.push(resolve))
    let isFinal = false
    try {
      const result = await task()
      isFinal = isDecided(result)
      return result
    } finally {
      if (holdsLock) release(key, isFinal)
      inFlight.end()
    }
  }

  function release (key: string, isFinal: boolean): void {
    const queue = queues.get(key) as ((holdsLock: boolean) => void)[]
    const next = isFinal ? undefined : queue.shift()
    if (next !== undefined) return next(true)
    queues.delete(key)
    for (const start of queue) start(false)
  }

  return {
    /** Resolves with the result of `task`, which starts after the earlier tasks with the same key. */
    run,
    inFlight: inFlight.count,
    /** Resolves when every task has its result. */
    idle: inFlight.idle
  }
}
