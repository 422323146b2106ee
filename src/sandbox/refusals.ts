import type { EventView } from './event-view.ts'

/** A request or an event that the ledger does not have, or the fault of one that it may have. */
export interface Refusal {
  endpoint: 'track' | 'import' | 'export'
  kind: 'fault' | 'refused'
  /** The name of the fault, or Mixpanel's reason. */
  reason: string
  /** Returns the events. That may parse a body, so it is called only for a page. */
  events: () => EventView[]
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
    /** Returns how many there were since the start or the last `clear`. */
    total: (): number => total,
    /** Returns those after the first `count`, as far as they are kept. */
    after: (count: number): Refusal[] => last.slice(Math.max(count - total + last.length, 0)),
    clear (): void {
      last = []
      total = 0
    }
  }
}

export type Refusals = ReturnType<typeof createRefusals>
