import { once } from 'node:events'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { projectOf, readConfig } from '#src/config.js'
import { identifyEvent } from '#src/identity/event.js'
import { MAX_ENTRIES } from '#src/outbox/outbox.js'
import { openRedis } from '#src/outbox/redis.js'
import { connectRedis } from '#src/redis.js'
import { identity, needsRedis, silent, startRedis, startRelay } from './helper.ts'
import { event, PROJECT, testPromises } from './outbox-promises.ts'

t.test('the Redis outbox keeps the promises of an outbox', needsRedis, async t => {
  const server = await startRedis(t)
  const redis = await connectRedis(server.url, silent)
  t.teardown(() => redis.disconnect())
  await testPromises(t, (maxEntries = MAX_ENTRIES) => openRedis(redis, PROJECT, silent, { leaseMs: 500, maxEntries }))
})

t.test('an event without an anonymous id can become a dead letter', needsRedis, async t => {
  const server = await startRedis(t)
  const redis = await connectRedis(server.url, silent)
  t.teardown(() => redis.disconnect())
  const outbox = await openRedis(redis, PROJECT, silent, { leaseMs: 500, maxEntries: MAX_ENTRIES })
  const { json, bytes, insertId, time } = event()
  const ordinary = { json, bytes, insertId, time } as unknown as ReturnType<typeof event>
  t.equal(await outbox.put(ordinary), 'stored')
  const [entry] = await outbox.next(1)
  await outbox.deadLetter([{ entry: { ...entry!, event: ordinary }, reason: 'why' }])
  t.match(outbox.counts(), { waiting: 0, dead: 1 })
  await outbox.close()
})

t.test('one relay at a time delivers; another takes over when it has closed or is silent for too long', needsRedis, async t => {
  const server = await startRedis(t)
  const redis = await connectRedis(server.url, silent)
  t.teardown(() => redis.disconnect())
  const open = () => openRedis(redis, PROJECT, silent, { leaseMs: 500, maxEntries: MAX_ENTRIES })
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
  const log = { ...silent, warn: (what: object, message: string) => { if (!message.startsWith('Redis durability')) logged.push({ ...what, message }) } }
  const redis = await connectRedis(server.url, log)
  t.teardown(() => redis.disconnect())
  const outbox = await openRedis(redis, PROJECT, log, { leaseMs: 200, maxEntries: MAX_ENTRIES })
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
  t.match(outbox.counts(), { waiting: waiting - 100, dead: 1 })
  while (await outbox.put(event()) !== 'stored') await outbox.ack(await outbox.next(100))
  t.ok(outbox.counts().waiting > 0, 'the outbox stores again')
  await outbox.close()
})

t.test('an answer that arrived during a stall of the relay has come in time', needsRedis, async t => {
  const server = await startRedis(t)
  const redis = await connectRedis(server.url, silent)
  t.teardown(() => redis.disconnect())
  const outbox = await openRedis(redis, PROJECT, silent, { leaseMs: 200, maxEntries: MAX_ENTRIES })
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
  let isDead = false
  const proxy = createServer(socket => {
    if (isDead) return sockets.add(socket)
    const other = connect(server.port, '127.0.0.1')
    sockets.add(socket.pipe(other)).add(other.pipe(socket) as Socket)
    for (const one of [socket, other]) one.on('error', () => {})
  }).listen(0, '127.0.0.1')
  await once(proxy, 'listening')
  const redis = await connectRedis(`redis://127.0.0.1:${(proxy.address() as AddressInfo).port}`, silent)
  const outbox = await openRedis(redis, PROJECT, silent, { leaseMs: 200, maxEntries: MAX_ENTRIES })
  t.teardown(() => {
    redis.disconnect()
    for (const socket of sockets) socket.destroy()
    proxy.close()
  })
  for (const socket of sockets) socket.unpipe()
  isDead = true
  t.equal(await outbox.put(event()), 'unknown')
  t.equal(await outbox.put(event()), 'unknown', 'a new connection may be dead as well')
  isDead = false
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
  const outbox = await openRedis(redis, PROJECT, silent, { leaseMs: 500, maxEntries: MAX_ENTRIES })
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
    await (await openRedis(redis, PROJECT, log, { leaseMs: 500, maxEntries: MAX_ENTRIES })).close()
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

t.test('a connection that is lost is logged, and one that Redis closes while it is idle is back without a loss', needsRedis, async t => {
  const server = await startRedis(t)
  const logged: string[] = []
  const log = { ...silent, warn: (fields: object, message: string) => { if (!message.startsWith('Redis durability')) logged.push(message) } }
  const redis = await connectRedis(server.url, log)
  const other = await connectRedis(server.url, silent)
  t.teardown(() => { for (const one of [redis, other]) one.disconnect() })
  const outbox = await openRedis(redis, PROJECT, log, { leaseMs: 500, maxEntries: MAX_ENTRIES })
  for (let count = 0; count < 3; count++) {
    await other.call('CLIENT', 'KILL', 'TYPE', 'normal', 'SKIPME', 'yes')
    await sleep(2)
    t.equal(await outbox.put(event()), 'stored')
    t.equal((await outbox.next(10)).length, count + 1)
  }
  await sleep(400)
  t.same(logged, [])
  server.child.kill('SIGKILL')
  await server.exit
  t.equal(await outbox.put(event()), 'unknown')
  await sleep(400)
  t.match(outbox.outage(), { part: 'Redis', since: Date })
  const next = await startRedis(t, { port: server.port, dir: server.dir })
  while (await outbox.put(event()) !== 'stored') await sleep(50)
  t.same(new Set(logged), new Set(['outbox unavailable', 'Redis connection lost', 'Redis connection restored']))
  t.equal(next.port, server.port)
  t.equal(outbox.outage(), undefined)
  t.equal(await outbox.disk(), undefined)
  await outbox.close()
})

t.test('a Redis that cannot hold the outbox is an error with its own words', needsRedis, async t => {
  const primary = await startRedis(t)
  const replica = await startRedis(t, { more: ['--replicaof', '127.0.0.1', String(primary.port)] })
  const admin = await connectRedis(primary.url, silent)
  t.teardown(() => admin.disconnect())
  await admin.acl('SETUSER', 'reader', 'on', '>CANARY-SECRET', '~*', '+@all', '-@scripting')
  const urlOf = (user: string) => `redis://${user}:CANARY-SECRET@127.0.0.1:${primary.port}`
  const open = async (url: string) => {
    const redis = await connectRedis(url, silent)
    try {
      await (await openRedis(redis, PROJECT, silent, { leaseMs: 500, maxEntries: MAX_ENTRIES })).close()
    } finally {
      redis.disconnect()
    }
  }
  await open(primary.url)
  await t.rejects(open(replica.url), { message: /^REDIS_URL: Redis cannot hold the outbox: .*READONLY/ })
  await t.rejects(open(urlOf('reader')), { message: /^REDIS_URL: Redis cannot hold the outbox: .*NOPERM/ })
  await t.rejects(open(urlOf('nobody')), { message: /^REDIS_URL: .*WRONGPASS/ })
  await t.rejects(open(`${primary.url}/99`), { message: /^REDIS_URL: .*DB index is out of range/ })
  await admin.config('SET', 'maxclients', '1')
  await t.rejects(open(primary.url), { message: /^REDIS_URL: .*(max number of clients|EPIPE|ECONNRESET)/ })
  await admin.config('SET', 'maxclients', '100')
  await admin.set('{identify-relay:a-project}:version', 2)
  await t.rejects(open(primary.url), { message: /^REDIS_URL: Redis cannot hold the outbox: the outbox is of a later release/ })
})

t.test('identities that are gone from Redis are an error with their number', needsRedis, async t => {
  const server = await startRedis(t)
  const redis = await connectRedis(server.url, silent)
  t.teardown(() => redis.disconnect())
  const logged: object[] = []
  const log = { ...silent, error: (fields: object, message: string) => { logged.push({ ...fields, message }) } }
  const outbox = await openRedis(redis, PROJECT, log, { leaseMs: 500, maxEntries: MAX_ENTRIES })
  for (let count = 0; count < 5; count++) await outbox.put(event())
  await redis.flushall()
  t.same(await outbox.next(10), [])
  for (let count = 0; count < 3; count++) await outbox.put(event())
  await redis.del('{identify-relay:a-project}:waiting')
  t.same(await outbox.next(10), [])
  t.same(await outbox.next(10), [])
  t.same(logged, [5, 3].map(identities => ({ identities, message: 'queued identities are gone from Redis' })))
  await redis.xadd('{identify-relay:a-project}:waiting', '*', 'claim', 'key', 'event', '{"no":"event"}')
  t.same(await outbox.next(10), [])
  t.match(await outbox.dead(10), [{ event: undefined, reason: /^unreadable/ }], 'what is no event becomes a dead letter')
  await outbox.close()
})

t.test('with MIXPANEL_PROJECT_ID the outbox outlives a change of the token', needsRedis, async t => {
  const server = await startRedis(t)
  const redis = await connectRedis(server.url, silent)
  t.teardown(() => redis.disconnect())
  const open = async (env: Record<string, string>) => {
    const project = projectOf(readConfig({ MIXPANEL_TOKEN: 'old', ...env }, () => ''))
    const outbox = await openRedis(redis, project, silent, { leaseMs: 500, maxEntries: MAX_ENTRIES })
    t.teardown(() => outbox.close())
    return outbox
  }
  const first = await open({})
  t.equal(await first.put(event()), 'stored')
  const second = await open({ MIXPANEL_PROJECT_ID: '7' })
  t.equal(second.counts().waiting, 1, 'it takes over what was queued before the variable was set')
  t.equal(await first.put(event()), 'stored', 'and shares it with relays that are not restarted yet')
  const third = await open({ MIXPANEL_PROJECT_ID: '7', MIXPANEL_TOKEN: 'new' })
  t.equal(third.counts().waiting, 2)
  const fresh = await open({ MIXPANEL_PROJECT_ID: '8' })
  t.equal(fresh.counts().waiting, 2, 'a token belongs to one project')
  t.equal((await open({ MIXPANEL_TOKEN: 'another' })).counts().waiting, 0)
})

t.test('what Redis answers decides what is known: a refusal stored nothing, silence may have', needsRedis, async t => {
  const server = await startRedis(t)
  let answer: ((socket: Socket) => void) | undefined
  const proxy = createServer(socket => {
    const other = connect(server.port, '127.0.0.1')
    for (const one of [socket, other]) one.on('error', () => {}).on('close', () => { socket.destroy(); other.destroy() })
    socket.on('data', chunk => {
      if (answer !== undefined && /eval/i.test(String(chunk))) answer(socket)
      else other.write(chunk)
    })
    other.pipe(socket)
  }).listen(0, '127.0.0.1')
  await once(proxy, 'listening')
  const redis = await connectRedis(`redis://127.0.0.1:${(proxy.address() as AddressInfo).port}`, silent)
  const outbox = await openRedis(redis, PROJECT, silent, { leaseMs: 200, maxEntries: MAX_ENTRIES })
  t.teardown(async () => {
    answer = undefined
    await outbox.close()
    redis.disconnect()
    proxy.close()
  })
  // As Redis 6.2, 7 and 8, and Valkey word them.
  const refusals = [
    "ERR Error running script (call to f_0): @user_script:13: @user_script: 13: -OOM command not allowed when used memory > 'maxmemory'.",
    "OOM command not allowed when used memory > 'maxmemory'. script: 0, on @user_script:13.",
    "READONLY You can't write against a read only replica. script: 0, on @user_script:13.",
    'ERR Error running script (call to f_0): @user_script:13: -READONLY You can\'t write against a read only replica.',
    'MISCONF Redis is configured to save RDB snapshots, but it\'s currently unable to persist to disk.',
    'MISCONF Errors writing to the AOF file: No space left on device',
    'NOREPLICAS Not enough good replicas to write.',
    'NOPERM User default has no permissions to run the \'xadd\' command',
    'BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.',
    'LOADING Redis is loading the dataset in memory',
    'MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to \'no\'.',
    'CLUSTERDOWN The cluster is down'
  ]
  for (const text of refusals) {
    answer = socket => socket.write(`-${text}\r\n`)
    t.equal(await outbox.put(event()), 'rejected', text)
    answer = undefined
    while (await outbox.has('a key') !== 'no') await sleep(10)
  }
  for (const [what, silence] of [
    ['a cut connection', (socket: Socket) => socket.destroy()],
    ['no answer', () => {}],
    ['half of one', (socket: Socket) => socket.write('*5\r\n:1\r\n')]
  ] as const) {
    answer = silence
    t.equal(await outbox.put(event()), 'unknown', what)
    answer = undefined
    while (await outbox.has('a key') !== 'no') await sleep(10)
  }
  t.equal(await outbox.put(event()), 'stored')
  t.equal(outbox.counts().waiting, 1)
})
