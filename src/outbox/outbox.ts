import type { PendingEvent } from '../identity/event.ts'

/** An identity that waits: its event, without the token, exactly as it was accepted. */
export interface Entry {
  /** The later it came, the greater; never used again. */
  id: string
  event: PendingEvent
  /** Set when an operator replayed it: by this endpoint, whatever the configuration says. */
  endpoint?: 'import'
}

/** An identity that cannot be delivered: kept, with the reason, until an operator replays or drops it. */
export interface DeadLetter { id: string, event: PendingEvent, reason: string, died: Date }

export type PutResult = 'stored' | 'rejected' | 'unknown'
export type HasResult = 'yes' | 'no' | 'unknown'

/**
 * Where identities wait for Mixpanel. Its twins are sqlite.ts (one process) and redis.ts (several), and one test holds
 * both to this. `put` and `holds` are on the path of a caller: they answer soon, and never reject. The others reject
 * when the store fails, and then have done nothing, or will do no harm when they are called again.
 */
export interface Outbox {
  /** Resolves with `stored` once the event is on disk, and with `unknown` when the store did not answer in time. */
  put: (event: PendingEvent) => Promise<PutResult>
  /** Resolves with whether an event with this `anonKey` waits, and with `unknown` when the store cannot be asked. */
  has: (anonKey: string) => Promise<HasResult>
  /**
   * The oldest entries, or those after the id `after`, in their order: at most `count`, and about a megabyte. They stay
   * until they are `done` or `bury`ed. None while another process delivers: to keep claims in order one at a time does.
   */
  next: (count: number, after?: string) => Promise<Entry[]>
  /** They are delivered, and no longer kept. */
  ack: (entries: Entry[]) => Promise<void>
  /** They become dead letters. */
  deadLetter: (entries: { entry: Entry, reason: string }[]) => Promise<void>
  /** How many there are, as far as this process knows. */
  counts: () => { waiting: number, dead: number }
  /** For operators: up to `count` in their order, those after the id `after`. */
  waiting: (count: number, after?: string) => Promise<Entry[]>
  dead: (count: number, after?: string) => Promise<DeadLetter[]>
  /** Dead letters wait again, behind all others; resolves with how many there were. */
  replay: (letters: Pick<Entry, 'id' | 'endpoint'>[]) => Promise<number>
  /** Dead letters are forgotten; resolves with how many there were. */
  drop: (letters: Pick<Entry, 'id'>[]) => Promise<number>
  /** Lets another process deliver; nothing may be called afterwards. */
  close: () => Promise<void>
}

/** How much an outbox keeps, dead letters included; then it keeps nothing more until there is room. */
export const MAX_ENTRIES = 1_000_000

/** In one `take`: the last entry may exceed it. */
export const MAX_NEXT_BYTES = 1_000_000

/** Another process has opened the directory. */
export class DirectoryInUse extends Error {}
