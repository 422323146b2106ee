import {
  closeSync, existsSync, lstatSync, mkdirSync, openSync, readSync, rmSync, statfsSync, statSync, type Stats
} from 'node:fs'
import { dirname, join } from 'node:path'
import { geteuid } from 'node:process'
import Database from 'libsql'
import { DirectoryInUse, reservedBytes, type Disk } from './outbox.ts'
import { migrate, RECOUNT } from './statements.ts'

/** How long a commit waits for another program that reads or locks the file. */
const BUSY_TIMEOUT_MS = 1000

/** The most bytes of free pages that the file keeps for the next outage. */
const MAX_UNUSED_BYTES = 4 * 1024 * 1024

/**
 * Opens the database in `directory`, a subdirectory of the relay's own; it and its parents are created if they are
 * missing. Events that an earlier release has left in the parent are moved into it. Throws DirectoryInUse when another
 * process has opened it, and an error for files that other users could change. The caller must `close` it.
 */
export function openDirectory (directory: string) {
  mkdirSync(directory, { recursive: true, mode: 0o700 })
  const paths = ['lock', 'outbox.db', 'outbox.db-wal'].map(name => join(directory, name)) as [string, string, string]
  const [lockFile, file] = paths
  for (const path of [directory, ...paths]) refuseForeign(path)
  const unlock = lock(lockFile)
  const db = openOrUnlock(file, unlock)
  const pragma = (name: string) => db.prepare(`PRAGMA ${name}`).pluck().all()[0] as number
  /** Runs statements that need disk space themselves. On a full disk they have no effect, and nothing is lost. */
  const tryExec = (sql: string) => {
    try {
      db.exec(sql)
    } catch {}
  }
  const unusedBytes = () => pragma('freelist_count') * pragma('page_size')
  const watched = new Map<string, Pick<Stats, 'dev' | 'ino'>>()
  let written: Pick<Stats, 'mtimeMs' | 'size'> | undefined

  // Two writes within a tick of the kernel's clock have one mtime.
  const isAsWritten = (stats?: Stats) => stats?.mtimeMs === written?.mtimeMs && stats?.size === written?.size

  function remember (): void {
    if (watched.size === 0) return
    const stats = statSync(file, { throwIfNoEntry: false })
    // A commit takes some ms, in which another program may have written to the file as well.
    if (!isAsWritten(stats) && isDatabase(file)) written = stats
  }

  return {
    db,

    /** Remembers which files these are. Call it once all of them exist. */
    watch (): void {
      for (const path of [directory, ...paths]) watched.set(path, statSync(path))
      written = statSync(file)
    },

    /** Remembers the state of the file after this process has written to it. */
    remember,

    /** Throws when the files are no longer those that were opened, or when another program has written to them. */
    check (): void {
      for (const [path, { dev, ino }] of watched) {
        const stats = statSync(path, { throwIfNoEntry: false })
        if (stats === undefined) throw new Error(`${path} was removed: restart the relay`)
        if (stats.dev !== dev || stats.ino !== ino) throw new Error(`${path} was replaced: restart the relay`)
        if (path === file && !isAsWritten(stats)) {
          throw new Error(`${path} was changed by another program: restart the relay`)
        }
      }
    },

    /** Returns the space on the disk. */
    disk (): Disk {
      const { bavail, blocks, bsize } = statfsSync(directory)
      return { free: bavail * bsize, size: blocks * bsize }
    },

    /** Returns true if the disk has room only for emptying the outbox. */
    isDiskLow (): boolean {
      const disk = statfsSync(directory)
      // The next checkpoint copies new pages from the WAL to the file, and the WAL keeps its size.
      const walOnlyBytes = pragma('page_count') * pragma('page_size') - statSync(file).size
      return disk.bavail * disk.bsize + unusedBytes() - walOnlyBytes < reservedBytes(disk)
    },

    /** Moves all changes from the WAL, which keeps earlier contents, to the file. */
    truncateWal (): void {
      tryExec('PRAGMA wal_checkpoint(TRUNCATE)')
      remember()
    },

    /** Returns free pages to the disk, if possible. Fast while the tables are nearly empty. */
    shrink (): void {
      if (unusedBytes() <= MAX_UNUSED_BYTES) return
      tryExec('VACUUM; PRAGMA wal_checkpoint(TRUNCATE);')
      remember()
    },

    close (): void {
      tryExec('PRAGMA wal_checkpoint(TRUNCATE)')
      db.close()
      unlock()
    }
  }
}

/** Returns true for a file that begins as every file of SQLite does. */
function isDatabase (file: string): boolean {
  const header = 'SQLite format 3\0'
  const bytes = Buffer.alloc(header.length)
  try {
    const fd = openSync(file, 'r')
    try {
      readSync(fd, bytes)
    } finally {
      closeSync(fd)
    }
  } catch {
    return false
  }
  return String(bytes) === header
}

/** Throws if `path` exists and is a link, belongs to another user, or can be changed by all users. */
function refuseForeign (path: string): void {
  const stats = lstatSync(path, { throwIfNoEntry: false })
  if (stats === undefined) return
  if (stats.isSymbolicLink()) throw new Error(`${path} is a link`)
  if (stats.isFile() && stats.nlink > 1) throw new Error(`${path} has a second name (a hard link)`)
  // Windows has no user ids. Kubernetes adds the group of the pod (fsGroup), which may write.
  if (![stats.uid, undefined].includes(geteuid?.())) throw new Error(`${path} belongs to another user (${stats.uid})`)
  if ((stats.mode & 0o002) !== 0) throw new Error(`${path} can be changed by all users: chmod o-w`)
}

/** Opens a database that only its owner may read; SQLite gives its side files the same mode. */
function open (path: string, options?: Database.Options): Database.Database {
  closeSync(openSync(path, 'a', 0o600))
  return new Database(path, options)
}

/** Opens the database of a directory whose lock is taken. Releases the lock when that fails. */
function openOrUnlock (file: string, unlock: () => void): Database.Database {
  let db: Database.Database | undefined
  try {
    db = open(file, { timeout: BUSY_TIMEOUT_MS })
    db.exec('PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA secure_delete = ON;')
    migrate(db)
    importFrom(dirname(dirname(file)), db)
    return db
  } catch (error) {
    db?.close()
    unlock()
    throw error
  }
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

/**
 * Moves the events of the first release, which had its files in `directory` itself. After a crash in between they are
 * moved again; the second delivery has the same bytes. Throws DirectoryInUse while a relay of that release runs.
 */
function importFrom (directory: string, db: Database.Database): void {
  const [lockFile, file] = ['lock', 'outbox.db'].map(name => join(directory, name)) as [string, string]
  if (!existsSync(file)) return
  for (const path of [lockFile, file]) refuseForeign(path)
  const unlock = lock(lockFile)
  try {
    const old = open(file)
    migrate(old)
    old.close()
    db.prepare('ATTACH ? AS old').run(file)
    db.exec(`
      BEGIN IMMEDIATE;
      INSERT INTO project SELECT * FROM old.project WHERE NOT EXISTS (SELECT 1 FROM project);
      INSERT INTO waiting (claim, event, endpoint) SELECT claim, event, endpoint FROM old.waiting ORDER BY id;
      INSERT INTO dead (claim, event, reason, died) SELECT claim, event, reason, died FROM old.dead ORDER BY id;
      ${RECOUNT}
      COMMIT;
      DETACH old;`)
  } finally {
    unlock()
  }
  for (const name of ['outbox.db-wal', 'outbox.db-shm', 'outbox.db', 'operators.sock', 'lock']) {
    rmSync(join(directory, name), { force: true })
  }
}
