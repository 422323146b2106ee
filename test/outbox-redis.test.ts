import { once } from 'node:events'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { identifyEvent } from '#src/identity/event.js'
import { openRedis } from '#src/outbox/redis.js'
import { connectRedis } from '#src/redis.js'
import { identity, needsRedis, silent, startRedis, startRelay } from './helper.ts'
import { event, testPromises } from './outbox-promises.ts'

t.test('the Redis outbox keeps the promises of an outbox', needsRedis, async t => {
  const server = await startRedis(t)
  const redis = await connectRedis(server.url, silent)
  t.teardown(() => redis.disconnect())
  await testPromises(t, maxEntries => openRedis(redis, 'a-project', silent, 500, maxEntries))
})

t.test('one relay at a time delivers; another takes over when it has closed or is silent for too long', needsRedis, async t => {
  const server = await startRedis(t)
  const redis = await connectRedis(server.url, silent)
  t.teardown(() => redis.disconnect())
  const open = () => openRedis(redis, 'a-project', silent, 500)
  let [one, two, three] = await Promise.all([open(), open(), open()])
  for (let count = 0; count < 5; count++) t.equal(await two.put(event()), 'stored')
  const leased = await one.next(3)
  t.equal(leased.length, 3)
  t.same(await two.next(3), [], 'another relay gets nothing')
  await one.ack(leased.slice(0, 1))
  await two.close()
  t.same(await three.next(3), [], 'closing a relay that does not deliver releases nothing')
  await sleep(300)
  t.equal((await one.next(3)).length, 3)
  await sleep(300)
  t.same(await three.next(3), [], 'next renews the lease')
  await one.close()
  two = await open()
  t.same((await two.next(3)).map(entry => entry.id).slice(0, 2), leased.slice(1).map(entry => entry.id))
  t.same(await three.next(3), [])
  await sleep(600)
  t.equal((await three.next(10)).length, 4, 'the lease of the second relay has expired')
  t.same(await two.next(3), [], 'the second relay has lost its lease')
  await Promise.all([two.close(), three.close()])
})

t.test('without memory Redis stores nothing, the cause is logged, and the outbox can be emptied', needsRedis, async t => {
  const server = await startRedis(t, { more: ['--maxmemory', '4mb', '--maxmemory-policy', 'noeviction'] })
  const logged: unknown[] = []
  const log = { ...silent, error: (what: object, message: string) => { logged.push({ ...what, message }) } }
  const redis = await connectRedis(server.url, log)
  t.teardown(() => redis.disconnect())
  const outbox = await openRedis(redis, 'a-project', log, 200)
  const large = () => identifyEvent({ ...identity(), properties: { text: 'x'.repeat(1000) } }, Date.now())
  while ((await Promise.all(Array.from({ length: 50 }, () => outbox.put(large())))).every(result => result === 'stored'));
  while (await outbox.put(event()) === 'stored');
  t.equal(await outbox.put(event()), 'rejected', 'the answer is rejected, not unknown')
  t.match(logged, [{ cause: /OOM/, message: 'outbox write rejected' }])
  const { waiting } = outbox.counts()
  await sleep(300)
  const entries = await outbox.next(100)
  t.equal(entries.length, 100)
  await outbox.deadLetter(entries.slice(0, 1).map(entry => ({ entry, reason: 'x' })))
  await outbox.ack(entries)
  t.same(outbox.counts(), { waiting: waiting - 100, dead: 1 })
  while (await outbox.put(event()) !== 'stored') await outbox.ack(await outbox.next(100))
  t.ok(outbox.counts().waiting > 0, 'the outbox stores again')
  await outbox.close()
})

t.test('an answer that arrived during a stall of the relay has come in time', needsRedis, async t => {
  const server = await startRedis(t)
  const redis = await connectRedis(server.url, silent)
  t.teardown(() => redis.disconnect())
  const outbox = await openRedis(redis, 'a-project', silent, 200)
  const stalled = [outbox.put(event()), outbox.has('a key')]
  setImmediate(() => setImmediate(() => { for (const end = performance.now() + 400; performance.now() < end;); }))
  t.same(await Promise.all(stalled), ['stored', 'no'])
  await sleep(10)
  t.equal(redis.status, 'ready')
  await outbox.close()
})

t.test('a connection on which Redis does not answer is replaced', needsRedis, async t => {
  const server = await startRedis(t)
  // A proxy between the two, so that connections can go dead.
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
  t.pass('the background connection is replaced as well')
  await outbox.close()
})

t.test('an entry that was deleted by hand holds back no later one', needsRedis, async t => {
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

t.test('the log says whether the settings of Redis are durable', needsRedis, async t => {
  const logged: string[] = []
  const push = (what: object, message: string) => { logged.push(message) }
  const log = { ...silent, info: push, warn: push }
  for (const options of [{ more: ['--rename-command', 'CONFIG', ''] }, { fsync: 'everysec' }, {}]) {
    const server = await startRedis(t, options)
    const redis = await connectRedis(server.url, silent)
    t.teardown(() => redis.disconnect())
    await (await openRedis(redis, 'a-project', log, 500)).close()
  }
  t.match(logged, ['Redis durability unknown', 'Redis durability insufficient', 'Redis durability sufficient'])
})

t.test('OUTBOX=redis stores identities in the Redis of REDIS_URL', needsRedis, async t => {
  const { url } = await startRedis(t)
  const redis = await connectRedis(url, silent)
  t.teardown(() => redis.disconnect())
  const { outbox, post } = await startRelay(t, { env: { OUTBOX: 'redis', REDIS_URL: url }, redis })
  t.equal((await post(identity(), { headers: { prefer: 'respond-async' } })).statusCode, 202)
  while (outbox.counts().waiting > 0) await sleep(20)
})

t.test('a Redis that cannot be reached is an error without its password', async t => {
  await t.rejects(connectRedis('redis://:CANARY-SECRET@127.0.0.1:9', silent), { message: 'REDIS_URL: Redis cannot be reached (ECONNREFUSED)' })
})

t.test('a lost connection is logged with its last error', needsRedis, async t => {
  const { url } = await startRedis(t)
  const logged: object[] = []
  const redis = await connectRedis(url, { ...silent, error: (fields, msg) => { logged.push({ ...fields, msg }) } })
  redis.emit('error', new Error('an error without a code'))
  redis.disconnect()
  await once(redis, 'close')
  t.same(logged, [{ cause: 'an error without a code', msg: 'Redis connection lost' }])
})
