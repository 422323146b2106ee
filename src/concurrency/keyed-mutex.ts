import { createCount } from './in-flight.ts'

/**
 * Keeps those apart who claim the same thing at the same time. The first one's work runs; the others wait in line until
 * it has ended, then the next one's runs. Where `isDecided` says so of a result, the order of those in line no longer
 * matters, and they all go on at once.
 */
export function createOrder<Result> (isDecided: (result: Result) => boolean) {
  /** Those in line behind the one whose work runs. */
  const lines = new Map<string, ((isFirst: boolean) => void)[]>()
  const waiting = createCount()

  async function run (claim: string, work: () => Promise<Result>): Promise<Result> {
    waiting.up()
    const line = lines.get(claim)
    if (line === undefined) lines.set(claim, [])
    const isFirst = line === undefined || await new Promise<boolean>(resolve => line.push(resolve))
    let isOver = false
    try {
      const result = await work()
      isOver = isDecided(result)
      return result
    } finally {
      if (isFirst) endTurn(claim, isOver)
      waiting.down()
    }
  }

  function endTurn (claim: string, isOver: boolean): void {
    const line = lines.get(claim) as ((isFirst: boolean) => void)[]
    const next = isOver ? undefined : line.shift()
    if (next !== undefined) return next(true)
    lines.delete(claim)
    for (const goOn of line) goOn(false)
  }

  return {
    /** The result of `work`, which begins when nobody before it claims the same. */
    run,
    /** How many have no result yet. */
    waiting: waiting.now,
    /** Resolves when all have their result. */
    idle: waiting.idle
  }
}
