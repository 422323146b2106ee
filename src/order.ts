/**
 * Keeps those apart who claim the same thing at the same time. The first one's work runs; the others wait until it has
 * ended, then the next of them is the first. Where `isDecided` says so of the first one's result, the order of the
 * others no longer matters, and they all go on at once.
 */
export function createOrder<Result> (isDecided: (result: Result) => boolean) {
  const firsts = new Map<string, Promise<Result>>()
  let waiting = 0
  let onIdle = () => {}

  async function run (claim: string, work: () => Promise<Result>): Promise<Result> {
    waiting++
    try {
      for (let first = firsts.get(claim); first !== undefined; first = firsts.get(claim)) {
        // A bug in the first one's work is told to the first one.
        if (await first.then(isDecided, () => false)) return await work()
      }
      const result = work()
      firsts.set(claim, result)
      try {
        return await result
      } finally {
        firsts.delete(claim)
      }
    } finally {
      if (--waiting === 0) onIdle()
    }
  }

  return {
    /** The result of `work`, which begins when nobody before it claims the same. */
    run,
    /** How many have no result yet. */
    waiting: () => waiting,
    /** Resolves when all have their result. */
    idle: () => waiting === 0 ? Promise.resolve() : new Promise<void>(resolve => { onIdle = resolve })
  }
}
