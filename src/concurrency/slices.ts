/** How many turns are left to all else between two slices, unless there was none for a while. */
const PAUSE_TURNS = 8
const LONG_AGO_MS = 50

export type Slices = () => Promise<void> | undefined

/**
 * Shares the event loop among pieces of long work: together they get `ms` in a turn of it, one after the other, so that
 * however many there are, whatever else the process does waits no longer than that.
 *
 * Returns a function that such work calls between two steps. It returns undefined where there is time left, else a
 * promise that resolves in the work's next slice.
 */
export function createSlices (ms: number): Slices {
  const waiting: (() => void)[] = []
  let since = -Infinity

  /** `turns` pass before the next slice: Node accepts one connection in a turn, however many wait. */
  function next (turns: number): void {
    if (turns > 0) {
      setImmediate(next, turns - 1)
      return
    }
    since = performance.now()
    waiting.shift()?.()
    if (waiting.length > 0) setImmediate(next, PAUSE_TURNS)
  }

  return () => {
    if (performance.now() - since < ms) return undefined
    return new Promise(resolve => {
      waiting.push(resolve)
      if (waiting.length === 1) setImmediate(next, performance.now() - since < LONG_AGO_MS ? PAUSE_TURNS : 0)
    })
  }
}
