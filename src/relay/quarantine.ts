import { backoffMs } from './pauses.ts'

/** Beyond that the oldest is forgotten, and sent together with others again. */
const MOST = 1000

/** What the drain knows of claims on which Mixpanel may fail while it takes others. */
export type Suspects = ReturnType<typeof createSuspects>

/**
 * Claims that were in an array on which Mixpanel failed: they are left aside for a while, and then sent alone. So the
 * next probe is with others, and where it was about one of them, that one is found, is tried ever more seldom, and
 * holds up nobody. Forgotten with the process.
 */
export function createSuspects () {
  const suspects = new Map<string, { failures: number, until: number }>()

  return {
    has: (claim: string) => suspects.has(claim),
    isAside: (claim: string) => (suspects.get(claim)?.until ?? 0) > performance.now(),
    /** Mixpanel failed on it, for the first time or once more. */
    failed (claim: string): void {
      const failures = (suspects.get(claim)?.failures ?? 0) + 1
      suspects.delete(claim)
      const [oldest] = suspects.keys()
      if (suspects.size >= MOST) suspects.delete(oldest as string)
      suspects.set(claim, { failures, until: performance.now() + backoffMs(failures) })
    },
    /** Mixpanel was out of reach, and is no longer: it was about none of them, as far as anybody knows. */
    forgive (): void {
      for (const suspect of suspects.values()) suspect.until = 0
    },
    /** It is delivered or dead. */
    settled: (claim: string) => { suspects.delete(claim) }
  }
}
