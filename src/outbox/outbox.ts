import type { PendingEvent } from '../identity/event.ts'

/** A queued event, exactly as it was validated. */
export interface Entry {
  /** Grows with each stored entry; never reused. */
  id: string
  event: PendingEvent
  /** Set when an operator replayed the entry; overrides MIXPANEL_ENDPOINT. */
  endpoint?: 'import'
}

/** A queued event for an operator. `event` is undefined if what is stored is no event. */
export interface Listed extends Omit<Entry, 'event'> { event: PendingEvent | undefined }

/** An event that is not sent again, with the reason. An operator replays or drops it. */
export interface DeadLetter extends Listed { reason: string, died: Date }

/** How many entries and dead letters exist, the bytes of their events, and whether an operator has paused delivery. */
export interface Counts { waiting: number, dead: number, bytes: number, paused: boolean }

/** The free bytes of a disk, for a user that is not root, and all of its bytes. */
export interface Disk { free: number, size: number }

/** A part on which an outbox depends, and since when it does not answer. */
export interface Outage { part: 'Redis' | 'disk', since: Date }

/** What an outbox may hold, dead letters included. */
export interface Limits { maxEntries: number }

export type PutResult = 'stored' | 'rejected' | 'unknown'
export type HasResult = 'yes' | 'no' | 'unknown'

/**
 * A store of events that wait for Mixpanel: sqlite.ts for one process, redis.ts for several. One test covers both.
 * Callers wait for `put` and `has`, which resolve soon and never reject. The other methods reject when the store fails;
 * then they have changed nothing, or may safely be called again.
 */
export interface Outbox {
  /**
   * Resolves with `stored` once the event is on disk, with `rejected` when the store is full (with the event it would
   * hold more than `maxBytes`) or cannot write, and with `unknown` when it does not answer in time.
   */
  put: (event: PendingEvent, maxBytes?: number) => Promise<PutResult>
  /**
   * Returns whether an event with this anonKey is queued, and `unknown` when the store cannot tell; a promise of that
   * where it must be asked.
   */
  has: (anonKey: string) => HasResult | Promise<HasResult>
  /**
   * Resolves with the oldest entries after the id `after`, in order: at most `count`, and about a megabyte. They stay
   * until `ack` or `deadLetter`. Resolves with none while delivery is paused, and while another process delivers; one
   * at a time keeps the order. What is no event becomes a dead letter.
   */
  next: (count: number, after?: string) => Promise<Entry[]>
  /** Deletes delivered entries. */
  ack: (entries: Entry[]) => Promise<void>
  /** Turns entries into dead letters. */
  deadLetter: (entries: { entry: Entry, reason: string }[]) => Promise<void>
  /** Resolves with the space on its disk; with undefined where it is not in a directory. */
  disk: () => Promise<Disk | undefined>
  /** Returns what the outbox waits for, and since when; undefined while it answers. */
  outage: () => Outage | undefined
  /** Returns the counts as far as this process knows. */
  counts: () => Counts
  /** Resolves, for operators, with up to `count` entries after the id `after`, in order. */
  waiting: (count: number, after?: string) => Promise<Listed[]>
  dead: (count: number, after?: string) => Promise<DeadLetter[]>
  /** Queues dead letters again, behind all others. Resolves with how many existed. */
  replay: (letters: Pick<Entry, 'id' | 'endpoint'>[]) => Promise<number>
  /** Deletes dead letters. Resolves with how many existed. */
  drop: (letters: Pick<Entry, 'id'>[]) => Promise<number>
  /** Deletes the dead letters that died before a date. Resolves with how many. */
  expire: (before: Date) => Promise<number>
  /** Deletes queued entries for good, delivered or not. Resolves with how many existed. */
  erase: (entries: Entry[]) => Promise<number>
  /** Stops or resumes delivery, for all processes and over restarts. Events are stored all the same. */
  pause: (isPaused: boolean) => Promise<void>
  /** Lets another process deliver. No method may be called afterwards. */
  close: () => Promise<void>
}

/** The most entries in an outbox, dead letters included. A full outbox rejects `put`. */
export const MAX_ENTRIES = 1_000_000

/** Free disk space for emptying the outbox, which writes as well. */
const RESERVED_BYTES = 16 * 1024 * 1024

/** Returns the bytes that must stay free on the disk of an outbox, by its statfs(2): of a small disk a tenth. */
export const reservedBytes = ({ blocks, bsize }: { blocks: number, bsize: number }) =>
  Math.min(RESERVED_BYTES, blocks * bsize / 10)

/** The most bytes of one `next`; the last entry may exceed it. */
export const MAX_NEXT_BYTES = 1_000_000

/** Why an outbox is refused whose events belong to the other mode: one mode sends one kind of event. */
export const OTHER_MODE = 'it holds identities that were queued with another MIXPANEL_ID_MERGE. Set it back until ' +
  'they are delivered or dropped'

/** What is stored as the anonKey of an event that has none. */
export const NO_CLAIM = ''

/** The error when another process has opened the directory. */
export class DirectoryInUse extends Error {}
