import { storedEvent } from '../identity/event.ts'
import type { Log } from '../log.ts'
import type { Metrics } from '../metrics.ts'
import type { Entry, Listed } from './outbox.ts'

/** The reason of a dead letter whose stored text is no event. */
export const UNREADABLE = 'unreadable: it was changed after it was stored'

/**
 * Resolves with the entries of stored rows, after what is no event has become dead letters. Rejects when `deadLetter`,
 * which gets these rows, does.
 */
export async function readRows<Row extends { id: string, json: string, endpoint?: 'import' }> (
  rows: Row[], deadLetter: (unreadable: Row[]) => Promise<void>, log: Log, metrics: Metrics
): Promise<Entry[]> {
  const entries: Entry[] = []
  const unreadable: Row[] = []
  for (const row of rows) {
    const { event, ...rest } = listed(row)
    if (event === undefined) unreadable.push(row)
    else entries.push({ ...rest, event })
  }
  if (unreadable.length > 0) {
    log.error({ identities: unreadable.length }, 'unreadable events dead-lettered')
    await deadLetter(unreadable)
    metrics.outbox('dead_lettered', 'unreadable', unreadable.length)
  }
  return entries
}

/** Returns a stored row for an operator. */
export const listed = ({ id, json, endpoint }: { id: string, json: string, endpoint?: 'import' }): Listed =>
  ({ id, event: storedEvent(json), ...endpoint !== undefined && { endpoint } })
