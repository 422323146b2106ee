import { closeSync, existsSync, mkdirSync, openSync, statfsSync, statSync } from 'node:fs'
import { dirname, join } from 'node:path'
import Database from 'libsql'
import { DirectoryInUse } from './outbox.ts'

/** Room for what empties the outbox, which has to write as well: this much, or a tenth of a small disk. */
const RESERVED_BYTES = 16 * 1024 * 1024

/** How much a file may keep for the next outage. */
const KEPT_BYTES = 4 * 1024 * 1024

/**
 * Opens the database in a directory, which is made where there is none. Only one process has it at a time, or this
 * throws DirectoryInUse; the sqlite3 shell may read `outbox.db` all the same. The caller must `close` it.
 */
export function openDirectory (directory: string) {
  if (!existsSync(directory)) mkdirSync(directory, { recursive: true, mode: 0o700 })
  const unlock = lock(join(directory, 'lock'))
  const file = join(directory, 'outbox.db')
  const db = open(file)
  const pragma = (name: string) => db.prepare(`PRAGMA ${name}`).pluck().all()[0] as number
  /** For what needs room itself, which a full disk has not: then things stay as they are, and nothing is lost. */
  const tryExec = (sql: string) => {
    try {
      db.exec(sql)
    } catch {}
  }
  /** In the file, but free. */
  const unusedBytes = () => pragma('freelist_count') * pragma('page_size')

  return {
    db,

    /** True where the disk has no room for more than what empties the outbox has to write. */
    isDiskLow (): boolean {
      const { bavail, blocks, bsize } = statfsSync(directory)
      // What is only in the WAL as yet: the next checkpoint adds it to the file, and the WAL stays as it is.
      const owedBytes = pragma('page_count') * pragma('page_size') - statSync(file).size
      return bavail * bsize + unusedBytes() - owedBytes < Math.min(RESERVED_BYTES, blocks * bsize / 10)
    },

    /** Gives the disk back what an outage took of it, if it can. Fast where the tables are nearly empty. */
    shrink (): void {
      if (unusedBytes() > KEPT_BYTES) tryExec('VACUUM; PRAGMA wal_checkpoint(TRUNCATE);')
    },

    close (): void {
      tryExec('PRAGMA wal_checkpoint(TRUNCATE)')
      db.close()
      unlock()
    }
  }
}

/** A database that only its owner may read; SQLite gives its side files the same mode. */
function open (path: string, options?: Database.Options): Database.Database {
  closeSync(openSync(path, 'a', 0o600))
  return new Database(path, options)
}

/** A lock that the kernel gives back, however the process ends. */
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
