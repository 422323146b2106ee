import { once } from 'node:events'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { connectRedis } from '#src/redis.js'
import { createCallers } from '../load.ts'
import { needsRedis, silent, startRedis, startSandbox } from '../helper.ts'
import { violations } from '../delivery-check.ts'
import { catchUp } from '../scenarios.ts'
import { startServer } from '../processes.ts'

t.test('two relays lose nothing while their Redis is killed and stopped, and one of them is killed', needsRedis, async t => {
  let redis = await startRedis(t)
  const sandbox = await startSandbox(t)
  const env = { OUTBOX: 'redis', REDIS_URL: redis.url, DEADLINE_MS: '2000', MIXPANEL_TIMEOUT_MS: '1000' }
  const relays = [await startServer(t, sandbox.url, env), await startServer(t, sandbox.url, env)]
  let turn = 0
  const callers = createCallers(() => relays[turn++ % relays.length]!.url, { pauseMs: 2 })
  const outage = { name: 'edge_down' as const, times: 1_000_000 }
  let faults = 0

  for (let round = 0; round < 3; round++) {
    sandbox.faults.add(outage)
    callers.start(32)
    await sleep(1500)
    redis.child.kill('SIGKILL')
    await redis.exit
    faults++
    await sleep(500)
    const before = callers.calls.length
    const since = callers.times.length
    await sleep(500)
    t.same(new Set(callers.calls.slice(before).map(({ status }) => status)), new Set([503]), 'without Redis every answer is 503')
    t.comment(`longest answer without Redis: ${Math.max(...callers.times.slice(since)).toFixed(0)} ms`)
    redis = await startRedis(t, { port: redis.port, dir: redis.dir })
    await sleep(1500)
    sandbox.faults.clear()
    await sleep(500)
    await callers.stop()
  }
  t.ok(callers.statuses()[202]! > 100, JSON.stringify(callers.statuses()))

  // A stopped Redis answers nothing, and only the first requests wait for it.
  sandbox.faults.add(outage)
  callers.start(32)
  await sleep(1000)
  redis.child.kill('SIGSTOP')
  faults++
  await sleep(300)
  const since = callers.times.length
  await sleep(2000)
  t.ok(callers.times.length - since > 32 * 4, 'each caller gets several answers')
  t.comment(`longest answer while Redis is stopped: ${Math.max(...callers.times.slice(since)).toFixed(0)} ms`)
  redis.child.kill('SIGCONT')
  await sleep(1000)

  // One relay dies with leased entries.
  await relays[0]!.kill()
  await callers.stop()
  const [, other] = relays
  sandbox.faults.clear()
  await other!.emptied()
  t.equal(await other!.kill('SIGTERM'), 0)
  t.comment(JSON.stringify(callers.statuses()))
  const repeats = callers.calls.length
  t.same(violations(callers.calls, sandbox.ledger.rows(), { repeats, doubtful: 32 * faults }), [])
})

t.test('five thousand identities that wait in Redis are delivered within five seconds of the first success', needsRedis, async t => {
  const redis = await startRedis(t)
  const sandbox = await startSandbox(t)
  await catchUp(t, sandbox, { OUTBOX: 'redis', REDIS_URL: redis.url })
})

t.test('a failover behind one address is over within two seconds', needsRedis, async t => {
  const primary = await startRedis(t)
  const replica = await startRedis(t, { more: ['--replicaof', '127.0.0.1', String(primary.port)] })
  let port = primary.port
  const sockets = new Set<Socket>()
  const address = createServer(socket => {
    const other = connect(port, '127.0.0.1')
    sockets.add(socket)
    for (const one of [socket, other]) one.on('error', () => {})
    socket.pipe(other).pipe(socket)
  }).listen(0, '127.0.0.1')
  await once(address, 'listening')
  t.teardown(() => {
    for (const socket of sockets) socket.destroy()
    address.close()
  })
  const sandbox = await startSandbox(t)
  const url = `redis://127.0.0.1:${(address.address() as AddressInfo).port}`
  const server = await startServer(t, sandbox.url, { OUTBOX: 'redis', REDIS_URL: url })
  sandbox.faults.add({ name: 'edge_down', times: 1_000_000 })
  const callers = createCallers(() => server.url, { pauseMs: 5 })
  const admin = await connectRedis(replica.url, silent)
  t.teardown(() => admin.disconnect())
  while (!(await admin.info('replication')).includes('master_link_status:up')) await sleep(100)
  callers.start(8)
  await sleep(1500)
  // As after a failover by an operator: the address leads to the new primary, and the old one still answers on its connections.
  const old = await connectRedis(primary.url, silent)
  t.teardown(() => old.disconnect())
  await old.call('REPLICAOF', '127.0.0.1', String(replica.port))
  await admin.call('REPLICAOF', 'NO', 'ONE')
  port = replica.port
  const since = performance.now()
  let from = callers.calls.length
  while (!callers.calls.slice(from).some(({ status }) => status === 202)) await sleep(10)
  const ms = performance.now() - since
  t.ok(ms < 2000, `identities are queued again after ${ms.toFixed(0)} ms`)
  from = callers.calls.length
  await sleep(1000)
  t.same(new Set(callers.calls.slice(from + 8).map(({ status }) => status)), new Set([202]))
  await callers.stop()
  sandbox.faults.clear()
  await server.emptied()
  const sent = new Set(sandbox.ledger.rows().map(row => row.properties.$identified_id))
  const lost = callers.calls.filter(({ status, identity }) => status === 202 && !sent.has(identity.identified_id))
  t.ok(lost.length < 10, `replication is asynchronous, so few may be lost, and ${lost.length} were`)
  t.equal(await server.kill('SIGTERM'), 0)
})
