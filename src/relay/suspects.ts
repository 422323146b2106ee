import { backoffMs } from './pauses.ts'

/** Beyond this many anonKeys, the one with the oldest failure is forgotten, and its entries travel in full arrays. */
const MAX_KEYS = 10_000

/** An array that fails so soon after Mixpanel accepted an event may itself be the cause. */
const RECENT_MS = 60_000

interface Suspect {
  /** The most entries of an array with this anonKey. */
  limit: number
  /** How often an entry with this anonKey has failed alone. */
  failures: number
  /** By performance.now(). */
  until: number
}

export type Suspects = ReturnType<typeof createSuspects>

/**
 * Finds the entries on which Mixpanel fails. Of an array that failed, each entry travels in one of half the size next
 * time. An entry that failed alone is a culprit: it has a backoff of its own, and delays no entry of other anonKeys.
 * While Mixpanel accepts nothing, all arrays become smaller instead. All is forgotten with the process.
 */
export function createSuspects () {
  const suspects = new Map<string, Suspect>()
  let acceptedAt = -Infinity
  let limit = Infinity

  return {
    /** Returns the most entries of an array with this anonKey. */
    limit: (key: string) => Math.min(limit, suspects.get(key)?.limit ?? Infinity),
    isCulprit: (key: string) => (suspects.get(key)?.failures ?? 0) > 0,
    isPaused: (key: string) => (suspects.get(key)?.until ?? 0) > performance.now(),

    /** Records the failure of a request with these anonKeys. Record what was `accepted` in the same round first. */
    failed (keys: string[]): void {
      const half = Math.ceil(keys.length / 2)
      if (keys.length > 1 && performance.now() - acceptedAt > RECENT_MS) {
        limit = half
        return
      }
      for (const key of keys) {
        const failures = (suspects.get(key)?.failures ?? 0) + (keys.length === 1 ? 1 : 0)
        suspects.delete(key)
        const [oldest] = suspects.keys()
        if (suspects.size >= MAX_KEYS) suspects.delete(oldest as string)
        const until = failures === 0 ? 0 : performance.now() + backoffMs(failures)
        suspects.set(key, { limit: half, failures, until })
      }
    },

    accepted (): void {
      acceptedAt = performance.now()
      limit = Infinity
    },

    /** Forgets a key whose entry was delivered or dead-lettered. */
    settled: (key: string) => { suspects.delete(key) },

    /** Call it after an outage: it may have been the cause of what failed once, and its backoffs end. */
    release (): void {
      for (const [key, suspect] of suspects) {
        if (suspect.failures <= 1) suspects.delete(key)
        else suspect.until = 0
      }
    }
  }
}
