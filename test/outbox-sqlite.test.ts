import { spawnSync } from 'node:child_process'
import fs, { chmodSync, cpSync, linkSync, readdirSync, readFileSync, renameSync, rmSync, statSync, symlinkSync, utimesSync, writeFileSync } from 'node:fs'
import { randomUUID } from 'node:crypto'
import { syncBuiltinESMExports } from 'node:module'
import { dirname, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { MessageChannel } from 'node:worker_threads'
import Database from 'libsql'
import { t, type Test } from 'tap'
import type { Project } from '#src/config.js'
import { identifyEvent, type PendingEvent } from '#src/identity/event.js'
import type { Log } from '#src/log.js'
import { openDatabase } from '#src/outbox/database.js'
import { answerCalls } from '#src/outbox/answer-calls.js'
import { MAX_ENTRIES, type Limits, type Outbox } from '#src/outbox/outbox.js'
import { connectOutbox, openSqlite } from '#src/outbox/sqlite.js'
import { identity, silent, temporary } from './helper.ts'
import { event, PROJECT, testPromises, project } from './outbox-promises.ts'

const OTHER = project('another')
const limits = { maxEntries: MAX_ENTRIES }
/** The outbox with its database in this thread, where its coverage counts. */
function open (directory: string, project: Project = PROJECT, log: Log = silent, given: Limits = limits): Promise<Outbox> {
  const { port1, port2 } = new MessageChannel()
  answerCalls(port2, directory, project, given)
  return connectOutbox(port1, log)
}

/** The database in this thread. */
function openHere (t: Test, directory: string) {
  const database = openDatabase(directory, PROJECT, limits)
  t.teardown(() => database.close())
  const put = (...events: PendingEvent[]) =>
    database.put(events.map(({ anonKey = '', json, bytes }) => [anonKey, json, bytes, Infinity]))
  const next = (count: number) => database.next(count).map(({ id }) => ({ id: String(id) }))
  return { ...database, put, next }
}

t.test('only the thread of the outbox loads SQLite', async t => {
  const loads = (module: string) => spawnSync(process.execPath, [
    '-e', `import('./dist/outbox/${module}.js').then(() => console.log(Object.keys(require.cache).some(path => path.includes('libsql'))))`
  ], { encoding: 'utf8' }).stdout.trim()
  t.equal(loads('sqlite'), 'false')
  t.equal(loads('answer-calls'), 'true')
})

t.test('the SQLite outbox keeps the promises of an outbox', async t => {
  const directory = join(t.testdir({}), 'made', 'here')
  await testPromises(t, async (maxEntries = MAX_ENTRIES) => openSqlite(directory, PROJECT, silent, { maxEntries }))
})

t.test('the thread loads no package but SQLite', async t => {
  const packages = new Set<string>()
  const visited = new Set<string>()
  function visit (file: string): void {
    if (visited.has(file)) return
    visited.add(file)
    for (const [, name = ''] of readFileSync(file, 'utf8').matchAll(/^(?:import|export) [^'"=]*from ['"]([^'"]+)['"]/gm)) {
      if (name.startsWith('.')) visit(join(dirname(file), name))
      else if (!name.startsWith('node:')) packages.add(name)
    }
  }
  visit('dist/outbox/sqlite-thread.js')
  t.same([...packages], ['libsql'])
  t.ok(visited.has('dist/outbox/database.js'))
})

t.test('it does so with the database in this thread', async t => {
  const directory = join(t.testdir({}), 'relay')
  await testPromises(t, (maxEntries = MAX_ENTRIES) => open(directory, PROJECT, silent, { maxEntries }))
})

t.test('a directory belongs to one mode of a project while it holds events', async t => {
  const path = temporary(t)
  const first = await open(path, project('original', [], 'simplified'))
  await first.put(event('u', randomUUID()))
  await first.close()
  await t.rejects(open(path, project('simplified', [], 'original')), { message: /another MIXPANEL_ID_MERGE/ })
  const again = await open(path, project('original', [], 'simplified'))
  const [entry] = await again.next(1)
  await again.ack([entry as NonNullable<typeof entry>])
  await again.close()
  const second = await open(path, project('simplified', [], 'original'))
  await second.close()
})

t.test('a directory belongs to one process and one project, and its files to their owner', async t => {
  const path = join(t.testdir({}), 'relay')
  const outbox = await open(path)
  await t.rejects(open(path), { message: /another process uses the outbox in/ })
  t.equal(await outbox.put(event()), 'stored')
  for (const name of ['.', ...readdirSync(path)]) t.equal(statSync(join(path, name)).mode & 0o77, 0, `${name} is for its owner alone`)
  await outbox.close()
  await t.rejects(open(path, OTHER), { message: /^it holds identities of another project or token\..* MIXPANEL_PROJECT_ID/ })
  const renamed = await open(path, project('its id', ['nothing', PROJECT.fingerprint]))
  t.equal(renamed.counts().waiting, 1, 'with MIXPANEL_PROJECT_ID the outbox outlives a change of the token')
  await renamed.ack(await renamed.next(1))
  await renamed.close()
  await (await open(path, OTHER)).close()
  writeFileSync(join(path, 'lock'), 'this is neither a database nor a lock. '.repeat(100))
  await t.rejects(open(path), { message: /not a database/ })
  await t.rejects(open('README.md/outbox'), { message: /ENOTDIR/ })
})

t.test('a commit that fails stores nothing and is logged at most once a minute', async t => {
  const logged: object[] = []
  const path = join(t.testdir({}), 'relay')
  const outbox = await open(path, PROJECT, { ...silent, warn: (what, message) => { logged.push({ ...what, message }) } })
  const shell = new Database(join(path, 'outbox.db'))
  shell.exec('BEGIN IMMEDIATE')
  t.same(await Promise.all([outbox.put(event()), outbox.put(event())]), ['rejected', 'rejected'])
  t.equal(await outbox.put(event()), 'rejected')
  shell.exec('ROLLBACK')
  shell.close()
  t.match(logged, [{ cause: /locked/, message: 'outbox write rejected' }])
  t.match(outbox.counts(), { waiting: 0, dead: 0 })
  t.equal(await outbox.put(event()), 'stored')
  await outbox.close()
})

t.test('a commit that breaks a rule of the tables is rolled back', async t => {
  const outbox = openDatabase(join(t.testdir({}), 'relay'), PROJECT, limits)
  t.teardown(() => outbox.close())
  t.match(outbox.disk(), { free: Number, size: Number })
  const good = ['key', event().json, 1, Infinity] as const
  t.match(outbox.put([[...good], ['key', null as unknown as string, 1, Infinity]]), { results: ['rejected', 'rejected'], cause: /NOT NULL/ })
  t.match(outbox.counts(), { waiting: 0, bytes: 0 })
  t.match(outbox.put([[...good]]), { results: ['stored'] })
  const { exec } = Database.prototype
  const capture = t.capture(Database.prototype, 'exec', function (this: Database.Database, sql: string) {
    exec.call(this, sql === 'COMMIT' ? 'ROLLBACK' : sql)
    if (sql === 'COMMIT') throw new Error('database or disk is full')
  })
  t.match(outbox.put([[...good]]), { results: ['rejected'], cause: 'database or disk is full' }, 'SQLite has rolled back already')
  capture.restore()
  t.match(outbox.counts(), { waiting: 1 })
})

t.test('a damaged file makes the outbox unavailable', async t => {
  const logged: string[] = []
  const path = join(t.testdir({}), 'relay')
  const outbox = await open(path, PROJECT, { ...silent, warn: (what, message) => { logged.push(message) } })
  t.equal(await outbox.put(event()), 'stored')
  const shell = new Database(join(path, 'outbox.db'))
  shell.exec('ALTER TABLE waiting RENAME TO gone')
  shell.close()
  t.equal(await outbox.has('a key'), 'unknown')
  t.same(logged, ['outbox unavailable'])
  await outbox.close()
})

t.test('nothing of an erased identity is left in the files', async t => {
  const path = join(t.testdir({}), 'relay')
  const outbox = openHere(t, path)
  const erased = () => identifyEvent({ ...identity(), properties: { text: 'to be erased '.repeat(1000) } }, Date.now())
  outbox.put(erased(), event(), erased())
  const isOnDisk = () => readdirSync(path).some(name => readFileSync(join(path, name)).includes('to be erased'))
  t.ok(isOnDisk())
  outbox.deadLetter([{ id: '3', reason: 'why' }])
  t.equal(outbox.erase([{ id: '1' }]), 1)
  t.equal(outbox.drop([{ id: '3' }]), 1)
  t.notOk(isOnDisk())
  t.match(outbox.counts(), { waiting: 1, dead: 0 })
})

t.test('the directory around it may be open to all, or a link', async t => {
  const parent = join(t.testdir({ outbox: {} }), 'outbox')
  chmodSync(parent, 0o1777)
  symlinkSync(parent, `${parent}-link`)
  const outbox = await open(join(`${parent}-link`, 'relay'))
  t.equal(await outbox.put(event()), 'stored')
  t.equal(statSync(join(parent, 'relay')).mode & 0o777, 0o700)
  await outbox.close()
})

t.test('a group may write, as Kubernetes makes it', async t => {
  const path = join(t.testdir({}), 'relay')
  await (await open(path)).close()
  chmodSync(path, 0o2770)
  chmodSync(join(path, 'outbox.db'), 0o660)
  await (await open(path)).close()
})

t.test('what is no event becomes a dead letter, and delays no other', async t => {
  const path = join(t.testdir({}), 'relay')
  let outbox = await open(path)
  const three = [event(), event(), event()]
  for (const one of three) await outbox.put(one)
  await outbox.close()
  const shell = new Database(join(path, 'outbox.db'))
  shell.exec("UPDATE waiting SET event = substr(event, 2) WHERE id = 1; UPDATE waiting SET event = '{\"properties\":{\"$anon_id\":\"x\"}}' WHERE id = 2")
  shell.close()
  outbox = await open(path)
  t.same((await outbox.next(10)).map(entry => entry.event), [three[2]])
  t.match(outbox.counts(), { waiting: 1, dead: 2 })
  t.match(await outbox.dead(10), [{ event: undefined, reason: /^unreadable/ }, { event: undefined, reason: /^unreadable/ }])
  t.equal(await outbox.replay(await outbox.dead(10)), 2)
  t.equal((await outbox.waiting(10)).length, 3)
  await outbox.close()
})

t.test('an outbox on a disk that is nearly full stores nothing', async t => {
  const outbox = openHere(t, join(t.testdir({}), 'relay'))
  const capture = t.capture(fs, 'statfsSync', () => ({ bavail: 100, blocks: 10_000, bsize: 4096 }))
  syncBuiltinESMExports()
  t.match(outbox.put(event()), { results: ['rejected'], cause: 'the disk is nearly full' })
  capture.restore()
  syncBuiltinESMExports()
  t.match(outbox.put(event()), { results: ['stored'] })
})

t.test('an emptied outbox gives its space back to the disk', async t => {
  const directory = join(t.testdir({}), 'relay')
  const outbox = openHere(t, directory)
  const large = () => identifyEvent({ ...identity(), properties: { text: 'x'.repeat(10_000) } }, Date.now())
  outbox.put(...Array.from({ length: 1000 }, large))
  for (let left = 999; left > 0;) {
    const entries = outbox.next(left)
    outbox.ack(entries)
    left -= entries.length
  }
  t.ok(statSync(join(directory, 'outbox.db')).size > 8_000_000)
  const { exec } = Database.prototype
  const capture = t.capture(Database.prototype, 'exec', function (this: Database.Database, sql: string) {
    if (sql.startsWith('VACUUM')) throw new Error('database or disk is full')
    return exec.call(this, sql)
  })
  outbox.ack(outbox.next(1))
  t.ok(statSync(join(directory, 'outbox.db')).size > 8_000_000, 'without room for VACUUM the file stays as it is')
  capture.restore()
  t.match(outbox.put(event()), { results: ['stored'] })
  outbox.ack(outbox.next(1))
  t.ok(statSync(join(directory, 'outbox.db')).size < 100_000)
})

t.test('what the outbox itself writes to the file within one tick of the clock is its own', async t => {
  const path = join(t.testdir({}), 'relay')
  const outbox = openHere(t, path)
  const { exec } = Database.prototype
  t.capture(Database.prototype, 'exec', function (this: Database.Database, sql: string) {
    const result = exec.call(this, sql)
    if (sql.includes('wal_checkpoint')) utimesSync(join(path, 'outbox.db'), 1, 1)
    return result
  })
  const sizes = Array.from({ length: 2 }, () => {
    for (let count = 0; count < 50; count++) t.match(outbox.put(event()), { results: ['stored'] })
    outbox.expire(0)
    return statSync(join(path, 'outbox.db')).size
  })
  t.not(sizes[0], sizes[1])
  t.match(outbox.put(event()), { results: ['stored'] })
})

t.test('what is done to the files is noticed before the next event counts as stored', async t => {
  const rows: [what: string, act: (directory: string) => void, cause: RegExp, undo?: (directory: string) => void][] = [
    ['the database is removed', path => rmSync(join(path, 'outbox.db')), /outbox\.db was removed/],
    ['its log is removed', path => rmSync(join(path, 'outbox.db-wal')), /outbox\.db-wal was removed/],
    ['the lock is removed', path => rmSync(join(path, 'lock')), /lock was removed/],
    ['the directory is moved away', path => renameSync(path, `${path}-away`), /relay was removed/, path => renameSync(`${path}-away`, path)],
    ['another one takes its place', path => {
      renameSync(path, `${path}-away`)
      cpSync(`${path}-away`, path, { recursive: true })
    }, /relay was replaced/, path => {
      rmSync(path, { recursive: true })
      renameSync(`${path}-away`, path)
    }],
    ['a backup is written into the file', path => writeFileSync(join(path, 'outbox.db'), 'SQLite format 3\0'), /changed by another program/]
  ]
  for (const [what, act, cause, undo] of rows) {
    await t.test(what, async t => {
      const path = join(t.testdir({}), 'relay')
      const outbox = openHere(t, path)
      t.match(outbox.put(event()), { results: ['stored'] })
      act(path)
      t.match(outbox.put(event()), { results: ['rejected'], cause })
      t.throws(() => outbox.next(1), { message: cause }, 'nothing is delivered either')
      undo?.(path)
      if (undo !== undefined) t.match(outbox.put(event()), { results: ['stored'] }, 'put back, it works again')
    })
  }
  // A commit takes some ms.
  const during: [what: string, act: (directory: string) => void, cause: RegExp][] = [
    ['the lock is removed', path => rmSync(join(path, 'lock'), { force: true }), /lock was removed/],
    ['the database is removed', path => rmSync(join(path, 'outbox.db'), { force: true }), /outbox\.db was removed/],
    ['another file is written over it', path => writeFileSync(join(path, 'outbox.db'), 'another file'), /changed by another program/]
  ]
  for (const [what, act, cause] of during) {
    await t.test(`${what} during a commit`, async t => {
      const path = join(t.testdir({}), 'relay')
      const outbox = openHere(t, path)
      const { exec } = Database.prototype
      const capture = t.capture(Database.prototype, 'exec', function (this: Database.Database, sql: string) {
        const result = exec.call(this, sql)
        if (sql === 'COMMIT') act(path)
        return result
      })
      t.match(outbox.put(event()), { results: ['unknown'], cause }, 'it is unknown what is kept')
      capture.restore()
      t.match(outbox.put(event()), { results: ['rejected'], cause })
    })
  }
})

t.test('files that other users could change are refused', async t => {
  const rows: [what: string, act: (directory: string) => void, message: RegExp][] = [
    ['a directory for all', path => chmodSync(path, 0o777), /relay can be changed by all users/],
    ['a file for all', path => chmodSync(join(path, 'outbox.db'), 0o666), /outbox\.db can be changed by all users/],
    ['another owner', path => fs.chownSync(join(path, 'outbox.db'), 12345, 12345), /outbox\.db belongs to another user \(12345\)/],
    ['a hard link', path => linkSync(join(path, 'lock'), `${path}-lock`), /lock has a second name/],
    ['a link', path => {
      renameSync(join(path, 'outbox.db'), `${path}-other`)
      symlinkSync(`${path}-other`, join(path, 'outbox.db'))
    }, /outbox\.db is a link/],
    ['a link to a directory', path => {
      renameSync(path, `${path}-other`)
      symlinkSync(`${path}-other`, path)
    }, /relay is a link/]
  ]
  for (const [what, act, message] of rows) {
    await t.test(what, { skip: what === 'another owner' && process.getuid?.() !== 0 && 'needs root' }, async t => {
      const parent = t.testdir({})
      chmodSync(parent, 0o777)
      const path = join(parent, 'relay')
      await (await open(path)).close()
      act(path)
      await t.rejects(open(path), { message })
    })
  }
})

t.test('the files of the first release are taken over, unless a relay uses them, and later ones are refused', async t => {
  const parent = t.testdir({})
  const old = new Database(join(parent, 'outbox.db'))
  const two = [event(), event()]
  old.exec(`
    CREATE TABLE waiting (id INTEGER PRIMARY KEY AUTOINCREMENT, claim TEXT NOT NULL, event TEXT NOT NULL, endpoint TEXT) STRICT;
    CREATE TABLE dead (id INTEGER PRIMARY KEY, claim TEXT NOT NULL, event TEXT NOT NULL, reason TEXT NOT NULL, died INTEGER NOT NULL) STRICT;
    CREATE TABLE project (fingerprint TEXT NOT NULL) STRICT;
    INSERT INTO project VALUES ('${PROJECT.fingerprint}');`)
  for (const { anonKey, json } of two) old.prepare('INSERT INTO waiting (claim, event) VALUES (?, ?)').run(anonKey, json)
  old.prepare("INSERT INTO dead VALUES (7, 'key', ?, 'why', 1)").run(two[0]!.json)
  old.close()
  const running = new Database(join(parent, 'lock'), { timeout: 0 })
  running.exec('PRAGMA journal_mode = MEMORY; BEGIN EXCLUSIVE')
  const path = join(parent, 'relay')
  await t.rejects(open(path), { message: /another process uses the outbox in/ })
  await t.rejects(openSqlite(path, PROJECT, silent, limits), { message: /another process uses the outbox in/ })
  running.exec('ROLLBACK')
  running.close()

  const outbox = await open(path)
  t.same((await outbox.next(10)).map(entry => entry.event), two)
  t.same(outbox.counts(), { waiting: 2, dead: 1, bytes: 2 * two[0]!.bytes + two[1]!.bytes, paused: false })
  t.same(readdirSync(parent), ['relay'])
  await outbox.close()
  const later = new Database(join(path, 'outbox.db'))
  later.exec('PRAGMA user_version = 2')
  later.close()
  await t.rejects(open(path), { message: /it has version 2, of a later release/ })
})

t.test('while the disk does not answer, only the first requests wait for it, and nothing gathers', async t => {
  const { port1, port2 } = new MessageChannel()
  const stalled: unknown[] = []
  let isStalled = false
  const relayed = new MessageChannel()
  port2.on('message', call => { isStalled ? stalled.push(call) : relayed.port1.postMessage(call) })
  relayed.port1.on('message', answer => port2.postMessage(answer))
  relayed.port1.on('close', () => port2.close())
  answerCalls(relayed.port2, join(t.testdir({}), 'relay'), PROJECT, limits)
  const outbox = await connectOutbox(port1, silent)
  t.equal(await outbox.put(event()), 'stored')
  isStalled = true
  t.equal(outbox.outage(), undefined)
  t.equal(await outbox.put(event()), 'unknown', 'it may be stored')
  t.match(outbox.outage(), { part: 'disk', since: Date })
  t.equal(await outbox.put(event()), 'rejected')
  t.equal(await outbox.has('a key'), 'unknown')
  t.equal(stalled.length, 1)
  isStalled = false
  relayed.port1.postMessage(stalled[0])
  while (await outbox.put(event()) !== 'stored') await sleep(10)
  t.equal(outbox.counts().waiting, 3, 'what was late is stored')
  t.equal(outbox.outage(), undefined)
  await outbox.close()
})
