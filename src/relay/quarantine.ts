import { backoffMs } from './pauses.ts'

/** Beyond this many keys, the one with the oldest failure is removed, and its entries travel in arrays again. */
const MAX_KEYS = 1000

export type Quarantine = ReturnType<typeof createQuarantine>

/**
 * The anonKeys of entries in arrays on which Mixpanel failed. Their entries pause and are then sent alone, so the
 * breaker's next probe carries other entries. An entry that causes failures backs off and delays no other. The
 * quarantine is lost with the process.
 */
export function createQuarantine () {
  const keys = new Map<string, { failures: number, until: number }>()

  return {
    has: (key: string) => keys.has(key),
    isPaused: (key: string) => (keys.get(key)?.until ?? 0) > performance.now(),
    /** Adds the key, or lengthens its pause. */
    failed (key: string): void {
      const failures = (keys.get(key)?.failures ?? 0) + 1
      keys.delete(key)
      const [oldest] = keys.keys()
      if (keys.size >= MAX_KEYS) keys.delete(oldest as string)
      keys.set(key, { failures, until: performance.now() + backoffMs(failures) })
    },
    /** Ends all pauses; call it after an outage of Mixpanel, which no entry is known to have caused. */
    release (): void {
      for (const key of keys.values()) key.until = 0
    },
    /** Removes the key of an entry that was delivered or dead-lettered. */
    settled: (key: string) => { keys.delete(key) }
  }
}
