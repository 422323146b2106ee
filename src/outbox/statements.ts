import type { Database } from 'libsql'

/** `claim` is an event's `anonKey`, `event` its JSON, `died` in ms since the epoch. */
const SCHEMA = `
  CREATE TABLE IF NOT EXISTS waiting (
    id INTEGER PRIMARY KEY AUTOINCREMENT, claim TEXT NOT NULL, event TEXT NOT NULL, endpoint TEXT
  ) STRICT;
  CREATE INDEX IF NOT EXISTS waiting_claim ON waiting (claim);
  CREATE TABLE IF NOT EXISTS dead (
    id INTEGER PRIMARY KEY, claim TEXT NOT NULL, event TEXT NOT NULL, reason TEXT NOT NULL, died INTEGER NOT NULL
  ) STRICT;
  CREATE TABLE IF NOT EXISTS project (fingerprint TEXT NOT NULL) STRICT;`

export interface WaitingRow { id: number, event: string, endpoint: 'import' | null }
export interface DeadRow { id: number, event: string, reason: string, died: number }

/** Returns the prepared statements of the outbox. Creates missing tables. */
export function prepare (db: Database) {
  db.exec(SCHEMA)
  return {
    put: db.prepare('INSERT INTO waiting (claim, event) VALUES (?, ?)'),
    has: db.prepare('SELECT 1 FROM waiting WHERE claim = ? LIMIT 1'),
    waiting: db.prepare('SELECT id, event, endpoint FROM waiting WHERE id > ? ORDER BY id LIMIT ?'),
    next: db.prepare(`SELECT id, event, endpoint FROM (
        SELECT *, sum(length(event)) OVER (ORDER BY id) - length(event) AS before
        FROM (SELECT * FROM waiting WHERE id > ? ORDER BY id LIMIT ?)
      ) WHERE before < ?`),
    dead: db.prepare('SELECT id, event, reason, died FROM dead WHERE id > ? ORDER BY id LIMIT ?'),
    remove: db.prepare('DELETE FROM waiting WHERE id IN (SELECT value FROM json_each(?))'),
    deadLetter: db.prepare('INSERT INTO dead SELECT id, claim, event, ?, ? FROM waiting WHERE id = ?'),
    replay: db.prepare('INSERT INTO waiting (claim, event, endpoint) SELECT claim, event, ? FROM dead WHERE id = ?'),
    drop: db.prepare('DELETE FROM dead WHERE id IN (SELECT value FROM json_each(?))')
  }
}
