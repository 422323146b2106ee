import type { Project } from '../config.ts'
import { openDirectory } from './directory.ts'
import { MAX_NEXT_BYTES, OTHER_MODE, type Counts, type Limits, type PutResult } from './outbox.ts'
import { prepare, type DeadRow, type Totals, type WaitingRow } from './statements.ts'

/** An event to store, and the bytes that the outbox may then hold. */
export type NewRow = [anonKey: string, json: string, bytes: number, maxBytes: number]

export interface PutOutcome {
  results: PutResult[]
  /** Why an event was not stored. */
  cause?: string
}

export type Database = ReturnType<typeof openDatabase>

/**
 * Opens the outbox in a directory: SQLite in WAL mode. Each commit of events is an fsync. Every method blocks until the
 * disk has answered, and throws when it fails; then it has changed nothing. Throws DirectoryInUse, an error of SQLite
 * or the file system, or an error when the directory holds events of another project.
 */
export function openDatabase (directory: string, project: Project, { maxEntries }: Limits) {
  const files = openDirectory(directory)
  const { db } = files
  const sql = prepare(db)
  const counts = (): Counts => {
    const [{ paused, ...totals }] = sql.totals.all() as [Totals]
    return { ...totals, paused: paused === 1 }
  }
  claimProject()
  files.watch()

  function claimProject (): void {
    const [owner] = db.prepare('SELECT fingerprint FROM project').pluck().all() as string[]
    const { waiting, dead } = counts()
    const isOurs = owner === undefined || owner === project.fingerprint || project.earlier.includes(owner)
    if (!isOurs && waiting + dead > 0) {
      files.close()
      const { fingerprint, earlier } = project.otherMode
      throw new Error([fingerprint, ...earlier].includes(owner) ? OTHER_MODE : OTHER_PROJECT)
    }
    // Write only when the project is new: on a full disk a relay must still start, to empty the outbox.
    if (owner === project.fingerprint) return
    transact(() => {
      db.exec('DELETE FROM project')
      db.prepare('INSERT INTO project VALUES (?)').run(project.fingerprint)
    })
  }

  function transact<T> (work: () => T): T {
    files.check()
    db.exec('BEGIN IMMEDIATE')
    try {
      return commit(work)
    } finally {
      files.remember()
    }
  }

  function commit<T> (work: () => T): T {
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

  /** The same without an fsync: if a power failure undoes the work, its entries are sent again, with the same bytes. */
  function transactFast<T> (work: () => T): T {
    db.exec('PRAGMA synchronous = NORMAL')
    try {
      return transact(work)
    } finally {
      db.exec('PRAGMA synchronous = FULL')
    }
  }

  /** The same for an erasure: afterwards no file holds what was deleted. */
  function transactErasing<T> (work: () => T): T {
    const result = transact(work)
    files.truncateWal()
    return result
  }

  function insert (rows: NewRow[]): PutOutcome {
    const results: PutResult[] = []
    let cause: string | undefined
    const { waiting, dead, bytes: used } = counts()
    let added = 0
    let addedBytes = 0
    for (const [anonKey, json, bytes, maxBytes] of rows) {
      const isFull = waiting + dead + added >= maxEntries
      if (isFull || used + addedBytes + bytes > maxBytes) {
        cause = isFull ? `full: ${maxEntries} entries` : `full: ${used + addedBytes} bytes of ${maxBytes}`
        results.push('rejected')
        continue
      }
      sql.put.run(anonKey, json)
      added++
      addedBytes += bytes
      results.push('stored')
    }
    sql.added.run(added, addedBytes)
    return { results, ...cause !== undefined && { cause } }
  }

  const asArray = (list: { id: string }[]) => JSON.stringify(list.map(({ id }) => Number(id)))
  const remove = (list: { id: string }[]) => sql.remove.run(asArray(list)).changes

  return {
    counts,

    /** Stores what there is room for, in one commit. Never throws. */
    put (rows: NewRow[]): PutOutcome {
      const all = (result: PutResult, cause: string) => ({ results: rows.map(() => result), cause })
      let outcome: PutOutcome
      try {
        files.check()
        if (files.isDiskLow()) throw new Error('the disk is nearly full')
        outcome = transact(() => insert(rows))
      } catch (error) {
        return all('rejected', (error as Error).message)
      }
      try {
        // The commit may have gone to a file that no longer has its name.
        files.check()
        return outcome
      } catch (error) {
        return all('unknown', (error as Error).message)
      }
    },
    has: (anonKeys: string[]): boolean[] => anonKeys.map(key => sql.has.all(key).length > 0),
    next (count: number, after = '0'): WaitingRow[] {
      files.check()
      return counts().paused ? [] : sql.next.all(Number(after), count, MAX_NEXT_BYTES) as WaitingRow[]
    },
    ack (list: { id: string }[]): void {
      transactFast(() => remove(list))
      const { waiting, dead } = counts()
      if (waiting === 0 && dead < MAX_SHRINK) files.shrink()
    },
    deadLetter (letters: { id: string, reason: string }[]): void {
      transactFast(() => {
        for (const { id, reason } of letters) sql.deadLetter.run(reason, Date.now(), Number(id))
        return remove(letters)
      })
    },
    disk: files.disk,
    waiting: (count: number, after = '0') => sql.waiting.all(Number(after), count) as WaitingRow[],
    dead: (count: number, after = '0') => sql.dead.all(Number(after), count) as DeadRow[],
    replay: (letters: { id: string, endpoint?: 'import' }[]): number => transact(() => {
      const [{ count, bytes }] = sql.sizeOf.all(asArray(letters)) as [{ count: number, bytes: number }]
      for (const { id, endpoint = null } of letters) sql.replay.run(endpoint, Number(id))
      sql.drop.run(asArray(letters))
      sql.added.run(count, bytes)
      return count
    }),
    drop: (list: { id: string }[]): number => transactErasing(() => sql.drop.run(asArray(list)).changes),
    expire: (before: number): number => transactErasing(() => sql.expire.run(before).changes),
    erase: (list: { id: string }[]): number => transactErasing(() => remove(list)),
    pause: (isPaused: boolean): void => { transact(() => sql.pause.run(isPaused ? 1 : 0)) },
    close: files.close
  }
}

const OTHER_PROJECT = 'it holds identities of another project or token. After a change of the token, start once with ' +
  'the earlier one and with MIXPANEL_PROJECT_ID set: from then on the outbox belongs to that project'

/** With more dead letters the file is not rebuilt, because that would take long. */
const MAX_SHRINK = 1000
