import { createBatcher } from '../concurrency/batcher.ts'
import { storedEvent, type PendingEvent } from '../identity/event.ts'
import { throttledError, type Log } from '../log.ts'
import { openDirectory } from './directory.ts'
import { MAX_ENTRIES, MAX_NEXT_BYTES, type DeadLetter, type Entry, type Outbox, type PutResult } from './outbox.ts'
import { prepare, type DeadRow, type WaitingRow } from './statements.ts'

/** The most events in one transaction; more would block the event loop. */
const MAX_COMMIT = 1000

/**
 * Opens an outbox in a directory: SQLite in WAL mode with `synchronous=FULL`, so that each commit is an fsync. It runs
 * on the event loop; events of one turn share a commit. Throws DirectoryInUse, an error of SQLite or the file system,
 * or an error when the directory holds events of another project.
 */
export function openSqlite (directory: string, project: string, log: Log, maxEntries = MAX_ENTRIES): Outbox {
  const { db, isDiskLow, shrink, close } = openDirectory(directory)
  db.exec('PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;')
  const sql = prepare(db)
  const countOf = (table: string) => (db.prepare(`SELECT count(*) AS n FROM ${table}`).all() as [{ n: number }])[0].n
  const counts = { waiting: countOf('waiting'), dead: countOf('dead') }
  const [owner] = db.prepare('SELECT fingerprint FROM project').pluck().all() as string[]
  if (owner !== undefined && owner !== project && counts.waiting + counts.dead > 0) {
    close()
    throw new Error('it holds identities of another project')
  }
  // Write only when the project is new: on a full disk a relay must still start, to empty the outbox.
  if (owner !== project) {
    transact(() => {
      db.exec('DELETE FROM project')
      db.prepare('INSERT INTO project VALUES (?)').run(project)
    })
  }

  const logError = throttledError((what, message) => log.error(what, message), 1000)

  function transact<T> (work: () => T): T {
    db.exec('BEGIN IMMEDIATE')
    try {
      const result = work()
      db.exec('COMMIT')
      return result
    } catch (error) {
      // After some errors, such as a full disk, SQLite has already rolled back.
      if (db.inTransaction) db.exec('ROLLBACK')
      throw error
    }
  }

  /** Stores all of the events or none: a group commit. */
  async function commit (events: PendingEvent[]): Promise<PutResult[]> {
    try {
      if (counts.waiting + counts.dead + events.length > maxEntries) throw new Error(`full: ${maxEntries} entries`)
      if (isDiskLow()) throw new Error('the disk is nearly full')
      transact(() => {
        for (const { anonKey, json } of events) sql.put.run(anonKey, json)
      })
      counts.waiting += events.length
      return events.map(() => 'stored')
    } catch (error) {
      logError({ cause: (error as Error).message }, 'outbox write rejected')
      return events.map(() => 'rejected')
    }
  }

  const puts = createBatcher<PendingEvent, PutResult>({ send: commit, maxBatch: MAX_COMMIT })

  const asEntry = ({ id, event, endpoint }: WaitingRow): Entry =>
    ({ id: String(id), event: storedEvent(event), ...endpoint !== null && { endpoint } })
  const asLetter = ({ id, event, reason, died }: DeadRow): DeadLetter =>
    ({ id: String(id), event: storedEvent(event), reason, died: new Date(died) })
  const asArray = (list: { id: string }[]) => JSON.stringify(list.map(({ id }) => Number(id)))
  const remove = (entries: Entry[]) => sql.remove.run(asArray(entries)).changes

  return {
    // A batcher without maxItems never returns undefined.
    put: event => puts.add(event),
    async has (anonKey) {
      try {
        return counts.waiting > 0 && sql.has.all(anonKey).length > 0 ? 'yes' : 'no'
      } catch (error) {
        logError({ cause: (error as Error).message }, 'outbox unavailable')
        return 'unknown'
      }
    },
    next: async (count, after = '0') => counts.waiting > 0
      ? (sql.next.all(Number(after), count, MAX_NEXT_BYTES) as WaitingRow[]).map(asEntry)
      : [],
    async ack (entries) {
      counts.waiting -= remove(entries)
      if (counts.waiting === 0 && counts.dead < MAX_COMMIT) shrink()
    },
    async deadLetter (letters) {
      const moved = transact(() => {
        for (const { entry, reason } of letters) sql.deadLetter.run(reason, Date.now(), Number(entry.id))
        return remove(letters.map(({ entry }) => entry))
      })
      counts.waiting -= moved
      counts.dead += moved
    },
    counts: () => ({ ...counts }),
    waiting: async (count, after = '0') => (sql.waiting.all(Number(after), count) as WaitingRow[]).map(asEntry),
    dead: async (count, after = '0') => (sql.dead.all(Number(after), count) as DeadRow[]).map(asLetter),
    async replay (letters) {
      const replayed = transact(() => {
        for (const { id, endpoint = null } of letters) sql.replay.run(endpoint, Number(id))
        return sql.drop.run(asArray(letters)).changes
      })
      counts.waiting += replayed
      counts.dead -= replayed
      return replayed
    },
    async drop (letters) {
      const { changes } = sql.drop.run(asArray(letters))
      counts.dead -= changes
      return changes
    },
    async close () {
      await puts.idle()
      close()
    }
  }
}
