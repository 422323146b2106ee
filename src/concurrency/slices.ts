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

  function next (): void {
    since = performance.now()
    waiting.shift()?.()
    if (waiting.length > 0) setImmediate(next)
  }

  return () => {
    if (performance.now() - since < ms) return undefined
    return new Promise(resolve => {
      waiting.push(resolve)
      if (waiting.length === 1) setImmediate(next)
    })
  }
}
