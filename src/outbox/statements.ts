import type { Database } from 'libsql'

/** Counts all rows again. */
export const RECOUNT = `
  UPDATE totals SET waiting = (SELECT count(*) FROM waiting), dead = (SELECT count(*) FROM dead), bytes =
    (SELECT coalesce(sum(octet_length(event)), 0) FROM (SELECT event FROM waiting UNION ALL SELECT event FROM dead));`

/** The version of the tables, in `user_version`. Version 0 had no totals. */
const VERSION = 1

/**
 * `claim` is an event's `anonKey`, `event` its JSON, `died` in ms since the epoch. To count a million rows takes
 * seconds, so totals are kept: by triggers, and for new events, which are many, by one statement for a commit.
 */
const TABLES = `
  CREATE TABLE IF NOT EXISTS waiting (
    id INTEGER PRIMARY KEY AUTOINCREMENT, claim TEXT NOT NULL, event TEXT NOT NULL, endpoint TEXT
  ) STRICT;
  CREATE INDEX IF NOT EXISTS waiting_claim ON waiting (claim);
  CREATE TABLE IF NOT EXISTS dead (
    id INTEGER PRIMARY KEY, claim TEXT NOT NULL, event TEXT NOT NULL, reason TEXT NOT NULL, died INTEGER NOT NULL
  ) STRICT;
  CREATE TABLE IF NOT EXISTS project (fingerprint TEXT NOT NULL) STRICT;
  CREATE TABLE totals (
    waiting INTEGER NOT NULL, dead INTEGER NOT NULL, bytes INTEGER NOT NULL, paused INTEGER NOT NULL
  ) STRICT;
  INSERT INTO totals VALUES (0, 0, 0, 0);
  CREATE TRIGGER waiting_removed AFTER DELETE ON waiting BEGIN
    UPDATE totals SET waiting = waiting - 1, bytes = bytes - octet_length(OLD.event);
  END;
  CREATE TRIGGER dead_added AFTER INSERT ON dead BEGIN
    UPDATE totals SET dead = dead + 1, bytes = bytes + octet_length(NEW.event);
  END;
  CREATE TRIGGER dead_removed AFTER DELETE ON dead BEGIN
    UPDATE totals SET dead = dead - 1, bytes = bytes - octet_length(OLD.event);
  END;
  PRAGMA user_version = ${VERSION};`

export interface WaitingRow { id: number, json: string, endpoint: 'import' | null }
export interface DeadRow { id: number, json: string, reason: string, died: number }
export interface Totals { waiting: number, dead: number, bytes: number, paused: number }

/** Creates the tables, or brings those of an earlier version up to date. Throws for a file of a later version. */
export function migrate (db: Database): void {
  const version = db.prepare('PRAGMA user_version').pluck().all()[0] as number
  if (version > VERSION) throw new Error(`it has version ${version}, of a later release of the relay`)
  if (version < VERSION) db.exec(`BEGIN IMMEDIATE; ${TABLES} ${RECOUNT} COMMIT;`)
}

/** Returns the prepared statements of the outbox, for a database that is up to date. */
export function prepare (db: Database) {
  return {
    totals: db.prepare('SELECT waiting, dead, bytes, paused FROM totals'),
    pause: db.prepare('UPDATE totals SET paused = ?'),
    added: db.prepare('UPDATE totals SET waiting = waiting + ?, bytes = bytes + ?'),
    put: db.prepare('INSERT INTO waiting (claim, event) VALUES (?, ?)'),
    has: db.prepare('SELECT 1 FROM waiting WHERE claim = ? LIMIT 1'),
    waiting: db.prepare('SELECT id, event AS json, endpoint FROM waiting WHERE id > ? ORDER BY id LIMIT ?'),
    next: db.prepare(`SELECT id, event AS json, endpoint FROM (
        SELECT *, sum(length(event)) OVER (ORDER BY id) - length(event) AS before
        FROM (SELECT * FROM waiting WHERE id > ? ORDER BY id LIMIT ?)
      ) WHERE before < ?`),
    dead: db.prepare('SELECT id, event AS json, reason, died FROM dead WHERE id > ? ORDER BY id LIMIT ?'),
    remove: db.prepare('DELETE FROM waiting WHERE id IN (SELECT value FROM json_each(?))'),
    deadLetter: db.prepare('INSERT INTO dead SELECT id, claim, event, ?, ? FROM waiting WHERE id = ?'),
    replay: db.prepare('INSERT INTO waiting (claim, event, endpoint) SELECT claim, event, ? FROM dead WHERE id = ?'),
    expire: db.prepare('DELETE FROM dead WHERE died < ?'),
    sizeOf: db.prepare(`SELECT count(*) AS count, coalesce(sum(octet_length(event)), 0) AS bytes FROM dead
      WHERE id IN (SELECT value FROM json_each(?))`),
    drop: db.prepare('DELETE FROM dead WHERE id IN (SELECT value FROM json_each(?))')
  }
}
