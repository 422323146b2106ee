import fs, { mkdirSync, readdirSync, statSync, writeFileSync } from 'node:fs'
import { syncBuiltinESMExports } from 'node:module'
import { join } from 'node:path'
import Database from 'libsql'
import { t } from 'tap'
import { identifyEvent } from '#src/identity/event.js'
import { openSqlite } from '#src/outbox/sqlite.js'
import { identity, silent } from './helper.ts'
import { event, testPromises } from './outbox-promises.ts'

t.test('the SQLite outbox keeps the promises of an outbox', async t => {
  const directory = join(t.testdir({}), 'made', 'here')
  await testPromises(t, async maxEntries => openSqlite(directory, 'a-project', silent, maxEntries))
})

t.test('a directory belongs to one process and one project, and its files to their owner', async t => {
  const directory = t.testdir({})
  mkdirSync(join(directory, 'outbox'))
  const path = join(directory, 'outbox')
  const outbox = openSqlite(path, 'a-project', silent)
  t.throws(() => openSqlite(path, 'a-project', silent), { message: /another process uses the outbox in/ })
  t.equal(await outbox.put(event()), 'stored')
  for (const name of readdirSync(path)) t.equal(statSync(join(path, name)).mode & 0o77, 0, `${name} is for its owner alone`)
  await outbox.close()
  t.throws(() => openSqlite(path, 'another', silent), { message: /^it holds identities of another project$/ })
  const again = openSqlite(path, 'a-project', silent)
  await again.ack(await again.next(1))
  await again.close()
  const other = openSqlite(path, 'another', silent)
  await other.close()
  writeFileSync(join(path, 'lock'), 'this is neither a database nor a lock. '.repeat(100))
  t.throws(() => openSqlite(path, 'a-project', silent), { code: 'SQLITE_NOTADB' })
  t.throws(() => openSqlite('README.md/outbox', 'a-project', silent), { code: 'ENOTDIR' })
})

t.test('a commit that fails stores nothing and is logged at most once a second', async t => {
  const logged: string[] = []
  const outbox = openSqlite(t.testdir({}), 'a-project', { ...silent, error: (what, message) => { logged.push(message) } })
  const unwritable = { ...event(), get json (): string { throw new Error('cannot be written') } }
  t.same(await Promise.all([outbox.put(event()), outbox.put(unwritable)]), ['rejected', 'rejected'], 'a commit stores all of its events or none')
  t.equal(await outbox.put(unwritable), 'rejected')
  t.same(logged, ['outbox write rejected'])
  t.same(outbox.counts(), { waiting: 0, dead: 0 })
  t.equal(await outbox.put(event()), 'stored')
  await outbox.close()
})

t.test('a damaged file makes the outbox unavailable', async t => {
  const logged: string[] = []
  const directory = t.testdir({})
  const outbox = openSqlite(directory, 'a-project', { ...silent, error: (what, message) => { logged.push(message) } })
  t.equal(await outbox.put(event()), 'stored')
  const shell = new Database(join(directory, 'outbox.db'))
  shell.exec('DROP TABLE waiting')
  shell.close()
  t.equal(await outbox.has('a key'), 'unknown')
  t.same(logged, ['outbox unavailable'])
  await outbox.close()
})

t.test('an outbox on a disk that is nearly full stores nothing', async t => {
  const outbox = openSqlite(t.testdir({}), 'a-project', silent)
  const capture = t.capture(fs, 'statfsSync', () => ({ bavail: 100, blocks: 10_000, bsize: 4096 }))
  syncBuiltinESMExports()
  t.equal(await outbox.put(event()), 'rejected')
  capture.restore()
  syncBuiltinESMExports()
  t.equal(await outbox.put(event()), 'stored')
  await outbox.close()
})

t.test('an emptied outbox gives its space back to the disk', async t => {
  const directory = t.testdir({})
  const outbox = openSqlite(directory, 'a-project', silent)
  const large = () => identifyEvent({ ...identity(), properties: { text: 'x'.repeat(10_000) } }, Date.now())
  await Promise.all(Array.from({ length: 1000 }, () => outbox.put(large())))
  for (let left = 999; left > 0;) {
    const entries = await outbox.next(left)
    await outbox.ack(entries)
    left -= entries.length
  }
  t.ok(statSync(join(directory, 'outbox.db')).size > 8_000_000)
  const { exec } = Database.prototype
  const capture = t.capture(Database.prototype, 'exec', function (this: Database.Database, sql: string) {
    if (sql.startsWith('VACUUM')) throw new Error('database or disk is full')
    return exec.call(this, sql)
  })
  await outbox.ack(await outbox.next(1))
  t.ok(statSync(join(directory, 'outbox.db')).size > 8_000_000, 'without room for VACUUM the file stays as it is')
  capture.restore()
  t.equal(await outbox.put(event()), 'stored')
  await outbox.ack(await outbox.next(1))
  t.ok(statSync(join(directory, 'outbox.db')).size < 100_000)
  await outbox.close()
})
