/** A counter of operations in flight. */
export function createInFlight () {
  const waiters: (() => void)[] = []
  let count = 0

  return {
    count: () => count,
    begin: () => { count++ },
    end (by = 1): void {
      count -= by
      if (count === 0) for (const resolve of waiters.splice(0)) resolve()
    },
    /** Resolves when nothing is in flight. */
    idle: () => count === 0 ? Promise.resolve() : new Promise<void>(resolve => { waiters.push(resolve) })
  }
}
