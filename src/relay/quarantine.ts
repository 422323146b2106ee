import { backoffMs } from './pauses.ts'

/** Beyond that the oldest is forgotten, and sent together with others again. */
const MAX_KEYS = 1000

/** What the drain knows of claims on which Mixpanel may fail while it takes others. */
export type Quarantine = ReturnType<typeof createQuarantine>

/**
 * Claims that were in an array on which Mixpanel failed: they are left aside for a while, and then sent alone. So the
 * next probe is with others, and where it was about one of them, that one is found, is tried ever more seldom, and
 * holds up nobody. Forgotten with the process.
 */
export function createQuarantine () {
  const keys = new Map<string, { failures: number, until: number }>()

  return {
    has: (key: string) => keys.has(key),
    isPaused: (key: string) => (keys.get(key)?.until ?? 0) > performance.now(),
    /** Mixpanel failed on it, for the first time or once more. */
    failed (key: string): void {
      const failures = (keys.get(key)?.failures ?? 0) + 1
      keys.delete(key)
      const [oldest] = keys.keys()
      if (keys.size >= MAX_KEYS) keys.delete(oldest as string)
      keys.set(key, { failures, until: performance.now() + backoffMs(failures) })
    },
    /** Mixpanel was out of reach, and is no longer: it was about none of them, as far as anybody knows. */
    release (): void {
      for (const key of keys.values()) key.until = 0
    },
    /** It is delivered or dead. */
    settled: (key: string) => { keys.delete(key) }
  }
}
