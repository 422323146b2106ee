import { createInFlight } from './in-flight.ts'

/**
 * Keeps those apart who claim the same thing at the same time. The first one's work runs; the others wait in line until
 * it has ended, then the next one's runs. Where `isDecided` says so of a result, the order of those in line no longer
 * matters, and they all go on at once.
 */
export function createKeyedMutex<Result> (isDecided: (result: Result) => boolean) {
  /** Those in line behind the one whose work runs. */
  const queues = new Map<string, ((isFirst: boolean) => void)[]>()
  const inFlight = createInFlight()

  async function run (key: string, work: () => Promise<Result>): Promise<Result> {
    inFlight.begin()
    const queue = queues.get(key)
    if (queue === undefined) queues.set(key, [])
    const isFirst = queue === undefined || await new Promise<boolean>(resolve => queue.push(resolve))
    let isOver = false
    try {
      const result = await work()
      isOver = isDecided(result)
      return result
    } finally {
      if (isFirst) endTurn(key, isOver)
      inFlight.end()
    }
  }

  function endTurn (claim: string, isOver: boolean): void {
    const line = queues.get(claim) as ((isFirst: boolean) => void)[]
    const next = isOver ? undefined : line.shift()
    if (next !== undefined) return next(true)
    queues.delete(claim)
    for (const goOn of line) goOn(false)
  }

  return {
    /** The result of `work`, which begins when nobody before it claims the same. */
    run,
    /** How many have no result yet. */
    inFlight: inFlight.count,
    /** Resolves when all have their result. */
    idle: inFlight.idle
  }
}
