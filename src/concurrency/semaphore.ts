/** Runs at most `max` tasks at a time; further ones wait, in the order of the calls. */
export function createSemaphore (max: number) {
  const waiting: (() => void)[] = []
  let running = 0

  return {
    /** Resolves with the result of `task`. */
    async run<Result> (task: () => Promise<Result>): Promise<Result> {
      if (running >= max) await new Promise<void>(resolve => waiting.push(resolve))
      else running++
      try {
        return await task()
      } finally {
        const next = waiting.shift()
        if (next === undefined) running--
        else next()
      }
    },
    /** Returns how many tasks run. */
    running: () => running
  }
}
