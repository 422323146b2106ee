import { randomUUID } from 'node:crypto'
import fs, { mkdirSync, readdirSync, statSync, writeFileSync } from 'node:fs'
import { once } from 'node:events'
import { syncBuiltinESMExports } from 'node:module'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import Database from 'libsql'
import { t, type Test } from 'tap'
import { identifyEvent } from '../src/identity/event.ts'
import { callAdminSocket, serveAdminSocket } from '../src/commands/admin-socket.ts'
import { openRedis } from '../src/outbox/redis.ts'
import type { Entry, Outbox } from '../src/outbox/outbox.ts'
import { openSqlite } from '../src/outbox/sqlite.ts'
import { connectRedis } from '../src/redis.ts'
import { identity, needsRedis, startRedis, temporary } from './helper.ts'

const silent = { debug () {}, info () {}, warn () {}, error () {} }

const event = (anon: string = randomUUID(), identified = `user-${randomUUID()}`, now = Date.now()) =>
  identifyEvent({ identified_id: identified, anon_id: anon, properties: { plan: 'a"b\n', 7: [1, { x: null }] } }, now)

/** What every outbox promises; `open` opens the same one again. */
async function contract (t: Test, open: (maxEntries?: number) => Promise<Outbox>) {
  const outbox = await open()
  t.same(outbox.counts(), { waiting: 0, dead: 0 })
  t.same(await outbox.next(10), [])
  t.same(await outbox.waiting(10), [])
  t.same(await outbox.dead(10), [])

  const events = Array.from({ length: 2500 }, () => event())
  t.equal(await outbox.has(events[0]!.anonKey), 'no')
  const kept = await Promise.all(events.map(one => outbox.put(one)))
  t.same(new Set(kept), new Set(['stored']))
  t.same(outbox.counts(), { waiting: 2500, dead: 0 })

  t.test('what was put is taken in its order, again and again, until it is done', async t => {
    const first = await outbox.next(400)
    t.same(first.map(entry => entry.event), events.slice(0, 400), 'to the last byte')
    t.equal(JSON.stringify(first.map(entry => entry.event)), JSON.stringify(events.slice(0, 400)))
    t.notOk(first.some(entry => 'endpoint' in entry))
    t.same(await outbox.next(400), first)
    t.same((await outbox.next(400, first[399]?.id)).map(entry => entry.event), events.slice(400, 800), 'and what comes after')
    await outbox.ack(first.slice(0, 399))
    const next = await outbox.next(400)
    t.same(next[0], first[399], 'who is left is still the first')
    t.same(outbox.counts(), { waiting: 2101, dead: 0 })
    await outbox.ack(first.slice(0, 399))
    t.same(outbox.counts(), { waiting: 2101, dead: 0 }, 'twice done is done')
  })

  t.test('a claim is held as long as one of its entries waits', async t => {
    const anon = randomUUID() as string
    const two = [event(anon.toUpperCase()), event(`$device:${anon}`)]
    for (const one of two) t.equal(await outbox.put(one), 'stored')
    t.equal(two[0]!.anonKey, two[1]!.anonKey)
    const bystander = event()
    t.equal(await outbox.put(bystander), 'stored')
    const mine: Entry[] = []
    for (let entries = await outbox.next(2000); entries.length > 0; entries = await outbox.next(2000)) {
      mine.push(...entries.filter(entry => two.some(one => one.json === entry.event.json)))
      await outbox.ack(entries.filter(entry => !mine.includes(entry)))
      if (mine.length === 2) break
    }
    t.equal(await outbox.put(bystander), 'stored')
    t.equal(await outbox.has(two[0]!.anonKey), 'yes')
    await outbox.ack(mine.slice(0, 1))
    t.equal(await outbox.has(two[0]!.anonKey), 'yes')
    await outbox.deadLetter([{ entry: mine[1]!, reason: 'because "so"\nit is' }])
    t.equal(await outbox.has(two[0]!.anonKey), 'no')
    t.equal(await outbox.has(events[2499]!.anonKey), 'no')
    t.same(outbox.counts(), { waiting: 1, dead: 1 })
    t.equal(await outbox.has(bystander.anonKey), 'yes')
    await outbox.ack(await outbox.next(10))
    t.same(outbox.counts(), { waiting: 0, dead: 1 })
  })

  t.test('dead letters are kept with their reason, replayed and dropped', async t => {
    for (let count = 0; count < 4; count++) t.equal(await outbox.put(event()), 'stored')
    const four = await outbox.next(10)
    await outbox.deadLetter(four.map((entry, index) => ({ entry, reason: `reason ${index}` })))
    await outbox.deadLetter(four.slice(0, 1).map(entry => ({ entry, reason: 'a second time' })))
    t.same(await outbox.next(10), [])
    t.same(outbox.counts(), { waiting: 0, dead: 5 })
    const letters = await outbox.dead(10)
    t.same(letters.map(letter => letter.reason), ['because "so"\nit is', 'reason 0', 'reason 1', 'reason 2', 'reason 3'])
    t.same(letters[1]?.event, four[0]?.event)
    t.ok(Math.abs(Date.now() - Number(letters[1]?.died)) < 60_000)
    t.same((await outbox.dead(2, letters[1]?.id)).map(letter => letter.id), [letters[2]?.id, letters[3]?.id])
    t.equal(await outbox.drop([letters[0]!, letters[2]!]), 2)
    t.equal(await outbox.drop([letters[0]!]), 0)
    t.equal(await outbox.replay([{ id: letters[4]!.id, endpoint: 'import' }, { id: letters[3]!.id }, { id: letters[2]!.id }]), 2)
    t.same(outbox.counts(), { waiting: 2, dead: 1 })
    t.equal(await outbox.has(four[3]!.event.anonKey), 'yes')
    const again = await outbox.next(10)
    t.match(again, [{ event: four[3]?.event, endpoint: 'import' }, { event: four[2]?.event }])
    t.notOk('endpoint' in again[1]!)
    await outbox.ack(again)
  })

  t.test('large entries are taken a megabyte at a time', async t => {
    const large = Array.from({ length: 60 }, () => identifyEvent({ ...identity(), properties: { text: 'x'.repeat(50_000) } }, Date.now()))
    for (const one of large) t.equal(await outbox.put(one), 'stored')
    const counts: number[] = []
    for (let entries = await outbox.next(400); entries.length > 0; entries = await outbox.next(400)) {
      counts.push(entries.length)
      await outbox.ack(entries)
    }
    t.same(counts, [20, 20, 20])
  })

  t.test('it is all there when it is opened again, and has a bound', async t => {
    const one = event()
    t.equal(await outbox.put(one), 'stored')
    await outbox.close()
    const next = await open(3)
    t.same(next.counts(), { waiting: 1, dead: 1 })
    t.equal(await next.put(event()), 'stored')
    t.equal(await next.put(event()), 'rejected', 'full, with the dead letter')
    const [first] = await next.waiting(10)
    t.same(first?.event, one)
    t.equal((await next.waiting(10, first?.id)).length, 1)
    await next.ack(await next.next(10))
    t.same(await Promise.all([next.put(event()), next.put(event())]), ['stored', 'stored'])
    t.same(await Promise.all([next.put(event()), next.put(event())]), ['rejected', 'rejected'])
    t.same(next.counts(), { waiting: 2, dead: 1 })
    await next.close()
  })
}

t.test('SQLite', async t => {
  const directory = join(t.testdir({}), 'made', 'here')
  await contract(t, async maxEntries => openSqlite(directory, 'a-project', silent, maxEntries))
})

t.test('SQLite: one process, one project, only its owner\'s', async t => {
  const directory = t.testdir({})
  mkdirSync(join(directory, 'outbox'))
  const path = join(directory, 'outbox')
  const outbox = openSqlite(path, 'a-project', silent)
  t.throws(() => openSqlite(path, 'a-project', silent), { message: /another process uses the outbox in/ })
  t.equal(await outbox.put(event()), 'stored')
  for (const name of readdirSync(path)) t.equal(statSync(join(path, name)).mode & 0o77, 0, name)
  await outbox.close()
  t.throws(() => openSqlite(path, 'another', silent), { message: /^it holds identities of another project$/ })
  const again = openSqlite(path, 'a-project', silent)
  await again.ack(await again.next(1))
  await again.close()
  const other = openSqlite(path, 'another', silent)
  await other.close()
  writeFileSync(join(path, 'lock'), 'this is no database, and nobody\'s lock. '.repeat(100))
  t.throws(() => openSqlite(path, 'a-project', silent), { code: 'SQLITE_NOTADB' })
  t.throws(() => openSqlite('README.md/outbox', 'a-project', silent), { code: 'ENOTDIR' })
})

t.test('SQLite: what cannot be written is not kept, and says so once a second', async t => {
  const said: string[] = []
  const outbox = openSqlite(t.testdir({}), 'a-project', { ...silent, error: (what, message) => { said.push(message) } })
  const unwritable = { ...event(), get json (): string { throw new Error('cannot be written') } }
  t.same(await Promise.all([outbox.put(event()), outbox.put(unwritable)]), ['rejected', 'rejected'], 'all of a commit or none')
  t.equal(await outbox.put(unwritable), 'rejected')
  t.same(said, ['outbox write rejected'])
  t.same(outbox.counts(), { waiting: 0, dead: 0 })
  t.equal(await outbox.put(event()), 'stored')
  await outbox.close()
})

t.test('SQLite: a damaged file is out of reach', async t => {
  const said: string[] = []
  const directory = t.testdir({})
  const outbox = openSqlite(directory, 'a-project', { ...silent, error: (what, message) => { said.push(message) } })
  t.equal(await outbox.put(event()), 'stored')
  const shell = new Database(join(directory, 'outbox.db'))
  shell.exec('DROP TABLE waiting')
  shell.close()
  t.equal(await outbox.has('a claim'), 'unknown')
  t.same(said, ['outbox unavailable'])
  await outbox.close()
})

t.test('SQLite: a disk that is nearly full', async t => {
  const outbox = openSqlite(t.testdir({}), 'a-project', silent)
  const capture = t.capture(fs, 'statfsSync', () => ({ bavail: 100, blocks: 10_000, bsize: 4096 }))
  syncBuiltinESMExports()
  t.equal(await outbox.put(event()), 'rejected')
  capture.restore()
  syncBuiltinESMExports()
  t.equal(await outbox.put(event()), 'stored')
  await outbox.close()
})

t.test('SQLite: an outage\'s space goes back to the disk', async t => {
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
  t.ok(statSync(join(directory, 'outbox.db')).size > 8_000_000, 'not while there is no room for that itself')
  capture.restore()
  t.equal(await outbox.put(event()), 'stored')
  await outbox.ack(await outbox.next(1))
  t.ok(statSync(join(directory, 'outbox.db')).size < 100_000)
  await outbox.close()
})

t.test('orders to another process: all of the answer, or an error', async t => {
  const directory = temporary(t)
  const end = await serveAdminSocket(directory, async function * (order) {
    if (order[0] === 'refuse') throw new Error('no')
    for (let line = 0; line < 5000; line++) yield `${'x'.repeat(99)}\n`
    if (order[0] === 'break') throw new Error('in the middle')
    while (order[0] === 'forever') yield `${'x'.repeat(9999)}\n`
  })
  const ask = async (order: string, most = Infinity) => {
    let length = 0
    for await (const text of callAdminSocket(directory, [order])) {
      length += text.length
      if (length > most) break
    }
    return length
  }
  t.equal(await ask('list'), 500_000)
  await t.rejects(ask('refuse'), { message: 'no' })
  await t.rejects(ask('break'))
  t.ok(await ask('forever', 1_000_000) > 1_000_000)
  await sleep(100)
  end()
  await t.rejects(ask('list'), { message: /does not take orders/ })
})

t.test('Redis that does not tell how it keeps data', needsRedis, async t => {
  const server = await startRedis(t, { more: ['--rename-command', 'CONFIG', ''] })
  const said: string[] = []
  const log = { ...silent, warn: (what: object, message: string) => { said.push(message) } }
  const redis = await connectRedis(server.url, log)
  t.teardown(() => redis.disconnect())
  await (await openRedis(redis, 'a-project', log, 500)).close()
  t.match(said, [/^Redis does not tell how it keeps its data/])
})

t.test('Redis: one relay at a time delivers; the next one when it has closed, or is silent for too long', needsRedis, async t => {
  const server = await startRedis(t)
  const redis = await connectRedis(server.url, silent)
  t.teardown(() => redis.disconnect())
  const open = () => openRedis(redis, 'a-project', silent, 500)
  let [one, two, three] = await Promise.all([open(), open(), open()])
  for (let count = 0; count < 5; count++) t.ok(await two.put(event()))
  const mine = await one.next(3)
  t.equal(mine.length, 3)
  t.same(await two.next(3), [])
  await one.ack(mine.slice(0, 1))
  await two.close()
  t.same(await three.next(3), [], 'who is not at it has nothing to give back')
  await sleep(300)
  t.equal((await one.next(3)).length, 3)
  await sleep(300)
  t.same(await three.next(3), [], 'to take is a sign of life')
  await one.close()
  two = await open()
  t.same((await two.next(3)).map(entry => entry.id).slice(0, 2), mine.slice(1).map(entry => entry.id))
  t.same(await three.next(3), [])
  await sleep(600)
  t.equal((await three.next(10)).length, 4, 'the second one is taken for dead')
  t.same(await two.next(3), [], 'and finds that it was')
  await Promise.all([two.close(), three.close()])
})

t.test('Redis without memory keeps nothing, says so, and can be emptied', needsRedis, async t => {
  const server = await startRedis(t, { more: ['--maxmemory', '4mb', '--maxmemory-policy', 'noeviction'] })
  const said: unknown[] = []
  const log = { ...silent, error: (what: object, message: string) => { said.push({ ...what, message }) } }
  const redis = await connectRedis(server.url, log)
  t.teardown(() => redis.disconnect())
  const outbox = await openRedis(redis, 'a-project', log, 200)
  const large = () => identifyEvent({ ...identity(), properties: { text: 'x'.repeat(1000) } }, Date.now())
  while (await outbox.put(large()) === 'stored');
  while (await outbox.put(event()) === 'stored');
  t.equal(await outbox.put(event()), 'rejected', 'which is no, not perhaps')
  t.match(said, [{ cause: /OOM/, message: 'outbox write rejected' }])
  const { waiting } = outbox.counts()
  await sleep(300)
  const entries = await outbox.next(100)
  t.equal(entries.length, 100)
  await outbox.deadLetter(entries.slice(0, 1).map(entry => ({ entry, reason: 'x' })))
  await outbox.ack(entries)
  t.same(outbox.counts(), { waiting: waiting - 100, dead: 1 })
  while (await outbox.put(event()) !== 'stored') await outbox.ack(await outbox.next(100))
  t.ok(outbox.counts().waiting > 0, 'and keeps again')
  await outbox.close()
})

t.test('Redis: what came during a stall of our own has come in time', needsRedis, async t => {
  const server = await startRedis(t)
  const redis = await connectRedis(server.url, silent)
  t.teardown(() => redis.disconnect())
  const outbox = await openRedis(redis, 'a-project', silent, 200)
  const stalled = [outbox.put(event()), outbox.has('a claim')]
  setImmediate(() => setImmediate(() => { for (const end = performance.now() + 400; performance.now() < end;); }))
  t.same(await Promise.all(stalled), [true, false])
  await sleep(10)
  t.equal(redis.status, 'ready')
  await outbox.close()
})

t.test('Redis: a connection that says nothing is left', needsRedis, async t => {
  const server = await startRedis(t)
  // Between the two, so that connections can go dead without a word.
  const sockets = new Set<Socket>()
  const proxy = createServer(socket => {
    const other = connect(server.port, '127.0.0.1')
    sockets.add(socket.pipe(other)).add(other.pipe(socket) as Socket)
    for (const one of [socket, other]) one.on('error', () => {})
  }).listen(0, '127.0.0.1')
  await once(proxy, 'listening')
  const redis = await connectRedis(`redis://127.0.0.1:${(proxy.address() as AddressInfo).port}`, silent)
  const outbox = await openRedis(redis, 'a-project', silent, 200)
  t.teardown(() => {
    redis.disconnect()
    for (const socket of sockets) socket.destroy()
    proxy.close()
  })
  for (const socket of sockets) socket.unpipe()
  t.equal(await outbox.put(event()), 'unknown')
  while (await outbox.put(event()) !== 'stored') await sleep(50)
  await t.rejects(outbox.next(1), { message: 'Redis did not answer in time' })
  while (await outbox.next(1).then(entries => entries.length, () => 0) === 0) await sleep(50)
  t.pass('and so is the one that is patient')
  await outbox.close()
})

t.test('Redis: who deletes by hand leaves no claim behind', needsRedis, async t => {
  const server = await startRedis(t)
  const redis = await connectRedis(server.url, silent)
  t.teardown(() => redis.disconnect())
  const outbox = await openRedis(redis, 'a-project', silent, 500)
  const [one, other] = [event(), event()]
  await Promise.all([outbox.put(one), outbox.put(other)])
  const [first, second] = await outbox.next(2)
  await redis.xdel('{identify-relay:a-project}:waiting', first!.id)
  t.equal(await outbox.has(one.anonKey), 'yes')
  await outbox.ack([second!])
  t.equal(await outbox.has(one.anonKey), 'no')
  await outbox.close()
})

t.test('Redis', needsRedis, async t => {
  const server = await startRedis(t)
  const redis = await connectRedis(server.url, silent)
  t.teardown(() => redis.disconnect())
  await contract(t, maxEntries => openRedis(redis, 'a-project', silent, 500, maxEntries))
})
