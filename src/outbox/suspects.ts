import { backoffMs } from './pace.ts'

/** What the drain knows of claims on which Mixpanel fails while it takes others. */
export type Suspects = ReturnType<typeof createSuspects>

/**
 * Claims whose entry failed alone, while Mixpanel took others: for longer each time they are left aside, and then their
 * entry is sent in an array of its own, so that it holds up nobody. Forgotten with the process.
 */
export function createSuspects () {
  const suspects = new Map<string, { failures: number, until: number }>()

  return {
    has: (claim: string) => suspects.has(claim),
    isAside: (claim: string) => (suspects.get(claim)?.until ?? 0) > Date.now(),
    /** It failed alone, for the first time or once more. */
    failed (claim: string): void {
      const failures = (suspects.get(claim)?.failures ?? 0) + 1
      suspects.set(claim, { failures, until: Date.now() + backoffMs(failures) })
    },
    /** It is delivered or dead. */
    settled: (claim: string) => { suspects.delete(claim) }
  }
}
