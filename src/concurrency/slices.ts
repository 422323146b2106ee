/** How many turns of the event loop pass between two slices, unless the last one was long ago. */
const PAUSE_TURNS = 8
const LONG_AGO_MS = 50

export type Slices = () => Promise<void> | undefined

/**
 * Returns a function that long work calls between two steps. It returns undefined while time is left, else a promise
 * that resolves in the next slice of that work. All callers, however many, together get `ms` in one turn of the event
 * loop, one after another. The rest of the process waits no longer than that.
 */
export function createSlices (ms: number): Slices {
  const waiting: (() => void)[] = []
  let since = -Infinity

  /** Starts the next slice after `turns` turns: Node accepts one connection in a turn, however many are pending. */
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
