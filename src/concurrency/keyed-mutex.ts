import { createInFlight } from './in-flight.ts'

/** A mutex for each key: tasks with one key run one at a time, in the order of the calls. */
export function createKeyedMutex () {
  /** Callbacks that start the queued tasks of a key, whose first task runs. Most keys have none. */
  const queues = new Map<string, (() => void)[] | undefined>()
  const inFlight = createInFlight()

  async function run<Result> (key: string, task: () => Promise<Result>): Promise<Result> {
    inFlight.begin()
    if (queues.has(key)) await turn(key)
    else queues.set(key, undefined)
    try {
      return await task()
    } finally {
      release(key)
      inFlight.end()
    }
  }

  function turn (key: string): Promise<void> {
    const queue = queues.get(key) ?? []
    queues.set(key, queue)
    return new Promise(resolve => queue.push(resolve))
  }

  function release (key: string): void {
    const next = queues.get(key)?.shift()
    if (next === undefined) queues.delete(key)
    else next()
  }

  return {
    /** Resolves with the result of `task`, which starts after the earlier tasks with the same key. */
    run,
    /** Returns how many tasks of a key wait for the one that runs. */
    queued: (key: string) => queues.get(key)?.length ?? 0,
    inFlight: inFlight.count,
    /** Resolves when every task has its result. */
    idle: inFlight.idle
  }
}
