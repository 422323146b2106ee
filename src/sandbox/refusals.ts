import type { MixpanelEvent } from './ledger.ts'

/** A request or event that is not in the ledger, or a fault of one that is. */
export interface Refusal {
  endpoint: 'track' | 'import' | 'export'
  kind: 'fault' | 'refused'
  /** The name of the fault, or Mixpanel's reason. */
  reason: string
  /** Parses the events, which costs too much to be done for each request. */
  events: () => MixpanelEvent[]
  /** When it arrived, in ms since the epoch. */
  arrived: number
}

/** Each may hold a body of 64 KiB. */
const MAX_REFUSALS = 200

/** The last refusals. */
export function createRefusals () {
  let last: Refusal[] = []
  let total = 0
  return {
    add (refusal: Omit<Refusal, 'arrived'>): void {
      last.push({ ...refusal, arrived: Date.now() })
      total++
      if (last.length >= MAX_REFUSALS * 2) last = last.slice(-MAX_REFUSALS)
    },
    total: (): number => total,
    /** Returns the refusals after the first `count`, as far as they are kept. */
    after: (count: number): Refusal[] => last.slice(Math.max(count - total + last.length, 0)).slice(-MAX_REFUSALS),
    clear (): void {
      last = []
      total = 0
    }
  }
}

export type Refusals = ReturnType<typeof createRefusals>
