import type { Database } from './database.ts'
import type { Counts } from './outbox.ts'

/**
 * A call of a method of the database in its thread, and its answer. Calls are answered one at a time, in their order.
 * Only types come from the database: the main thread must not load SQLite, which takes 10 ms.
 */
export interface Call { id: number, name: keyof Database, args: unknown[] }
export interface Answer {
  id: number
  result?: unknown
  error?: { message: string, isInUse: boolean }
  counts?: Counts
}

/** The id of the first answer, which says whether the database is open. */
export const OPENED = 0
