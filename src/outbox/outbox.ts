import type { PendingEvent } from '../identity/event.ts'

/** A queued event, exactly as it was validated. */
export interface Entry {
  /** Grows with each stored entry; never reused. */
  id: string
  event: PendingEvent
  /** Set when an operator replayed the entry; overrides MIXPANEL_ENDPOINT. */
  endpoint?: 'import'
}

/** An event that is not sent again, with the reason. An operator replays or drops it. */
export interface DeadLetter { id: string, event: PendingEvent, reason: string, died: Date }

export type PutResult = 'stored' | 'rejected' | 'unknown'
export type HasResult = 'yes' | 'no' | 'unknown'

/**
 * A store of events that wait for Mixpanel: sqlite.ts for one process, redis.ts for several. One test covers both.
 * Callers wait for `put` and `has`, which resolve soon and never reject. The other methods reject when the store fails;
 * then they have changed nothing, or may safely be called again.
 */
export interface Outbox {
  /** Resolves with `stored` once the event is on disk, and with `unknown` when the store does not answer in time. */
  put: (event: PendingEvent) => Promise<PutResult>
  /** Resolves with whether an event with this anonKey is queued, and with `unknown` when the store cannot tell. */
  has: (anonKey: string) => Promise<HasResult>
  /**
   * Resolves with the oldest entries after the id `after`, in order: at most `count`, and about a megabyte. They stay
   * until `ack` or `deadLetter`. Resolves with none while another process delivers; one at a time keeps the order.
   */
  next: (count: number, after?: string) => Promise<Entry[]>
  /** Deletes delivered entries. */
  ack: (entries: Entry[]) => Promise<void>
  /** Turns entries into dead letters. */
  deadLetter: (entries: { entry: Entry, reason: string }[]) => Promise<void>
  /** Returns how many entries and dead letters exist, as far as this process knows. */
  counts: () => { waiting: number, dead: number }
  /** Resolves, for operators, with up to `count` entries after the id `after`, in order. */
  waiting: (count: number, after?: string) => Promise<Entry[]>
  dead: (count: number, after?: string) => Promise<DeadLetter[]>
  /** Queues dead letters again, behind all others. Resolves with how many existed. */
  replay: (letters: Pick<Entry, 'id' | 'endpoint'>[]) => Promise<number>
  /** Deletes dead letters. Resolves with how many existed. */
  drop: (letters: Pick<Entry, 'id'>[]) => Promise<number>
  /** Lets another process deliver. No method may be called afterwards. */
  close: () => Promise<void>
}

/** The most entries in an outbox, dead letters included. A full outbox rejects `put`. */
export const MAX_ENTRIES = 1_000_000

/** The most bytes of one `next`; the last entry may exceed it. */
export const MAX_NEXT_BYTES = 1_000_000

/** The error when another process has opened the directory. */
export class DirectoryInUse extends Error {}
