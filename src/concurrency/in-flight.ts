/** Counts what is under way, and tells when nothing is. */
export function createInFlight () {
  const idlers: (() => void)[] = []
  let count = 0

  return {
    count: () => count,
    begin: () => { count++ },
    end (by = 1): void {
      count -= by
      if (count === 0) for (const resolve of idlers.splice(0)) resolve()
    },
    /** Resolves when nothing is under way. */
    idle: () => count === 0 ? Promise.resolve() : new Promise<void>(resolve => { idlers.push(resolve) })
  }
}
