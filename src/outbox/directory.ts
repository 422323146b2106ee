import { closeSync, existsSync, mkdirSync, openSync, statfsSync, statSync } from 'node:fs'
import { dirname, join } from 'node:path'
import Database from 'libsql'
import { DirectoryInUse } from './outbox.ts'

/** Free disk space for emptying the outbox, which writes as well. On a small disk it is a tenth of the disk. */
const RESERVED_BYTES = 16 * 1024 * 1024

/** The most bytes of free pages that the file keeps for the next outage. */
const MAX_UNUSED_BYTES = 4 * 1024 * 1024

/**
 * Opens the database in `directory`, and creates the directory if it is missing. Throws DirectoryInUse when another
 * process has opened it; the sqlite3 shell may still read `outbox.db`. The caller must `close` it.
 */
export function openDirectory (directory: string) {
  if (!existsSync(directory)) mkdirSync(directory, { recursive: true, mode: 0o700 })
  const unlock = lock(join(directory, 'lock'))
  const file = join(directory, 'outbox.db')
  const db = open(file)
  const pragma = (name: string) => db.prepare(`PRAGMA ${name}`).pluck().all()[0] as number
  /** Runs statements that need disk space themselves. On a full disk they have no effect, and nothing is lost. */
  const tryExec = (sql: string) => {
    try {
      db.exec(sql)
    } catch {}
  }
  const unusedBytes = () => pragma('freelist_count') * pragma('page_size')

  return {
    db,

    /** Returns true if the disk has room only for emptying the outbox. */
    isDiskLow (): boolean {
      const { bavail, blocks, bsize } = statfsSync(directory)
      // The next checkpoint copies new pages from the WAL to the file, and the WAL keeps its size.
      const walOnlyBytes = pragma('page_count') * pragma('page_size') - statSync(file).size
      return bavail * bsize + unusedBytes() - walOnlyBytes < Math.min(RESERVED_BYTES, blocks * bsize / 10)
    },

    /** Returns free pages to the disk, if possible. Fast while the tables are nearly empty. */
    shrink (): void {
      if (unusedBytes() > MAX_UNUSED_BYTES) tryExec('VACUUM; PRAGMA wal_checkpoint(TRUNCATE);')
    },

    close (): void {
      tryExec('PRAGMA wal_checkpoint(TRUNCATE)')
      db.close()
      unlock()
    }
  }
}

/** Opens a database that only its owner may read; SQLite gives its side files the same mode. */
function open (path: string, options?: Database.Options): Database.Database {
  closeSync(openSync(path, 'a', 0o600))
  return new Database(path, options)
}

/** Takes a lock, and returns a function that releases it. The kernel releases it however the process ends. */
function lock (path: string): () => void {
  const db = open(path, { timeout: 0 })
  try {
    db.exec('PRAGMA journal_mode = MEMORY; BEGIN EXCLUSIVE;')
  } catch (error) {
    db.close()
    if ((error as { code?: string }).code !== 'SQLITE_BUSY') throw error
    throw new DirectoryInUse(`another process uses the outbox in ${dirname(path)}`)
  }
  return () => {
    db.exec('ROLLBACK')
    db.close()
  }
}
