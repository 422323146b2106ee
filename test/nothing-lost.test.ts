import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import Database from 'libsql'
import { t } from 'tap'
import { violations, type Call } from './delivery-check.ts'
import { identity, leaks, needsRedis, startRedis, startSandbox, temporary, TOKEN } from './helper.ts'
import { createCallers } from './load.ts'
import { SERVER, startProcess, startServer } from './processes.ts'
import { killed } from './scenarios.ts'
import type { Row } from '#src/sandbox/ledger.js'

const outage = { name: 'edge_down' as const, times: 1_000_000 }

// Most of these tests wait for a process or for a bound in time.
t.jobs = 3

t.test('violations finds each kind of broken promise', async t => {
  const call = (id: string, anon: string, status?: number): Call =>
    ({ identity: { identified_id: id, anon_id: anon, properties: { a: 1 } }, ...status !== undefined && { status } })
  const row = (id: string, anon: string, more: object = {}): Row => ({
    endpoint: 'track', event: '$identify', outcome: 'merged', arrived: 0, properties: { a: 1, distinct_id: id, $identified_id: id, $anon_id: anon, time: 1, $insert_id: `${id}-${anon}`, ...more }
  })
  t.same(violations([call('u', 'x', 200), call('v', 'y', 202), call('w', 'z', 503), call('k', 'k')], [row('v', 'y'), row('u', 'x')]), [])
  t.match(violations([call('u', 'x', 202)], []), [/^u got 202 and is lost$/])
  t.same(violations([call('u', 'x', 202)], [], { dead: ['u'] }), [])
  for (const status of [400, 422, 429, 503]) t.match(violations([call('u', 'x', status)], [row('u', 'x')]), [/has arrived$/])
  t.same(violations([call('u', 'x', 503)], [row('u', 'x')], { doubtful: 1 }), [])
  t.same(violations([call('u', 'x', 504)], [row('u', 'x')]), [])
  t.match(violations([call('u', 'x', 200)], [row('u', 'x', { a: 2 })]), [/^u arrived as/])
  t.match(violations([call('u', 'x', 200)], [row('u', 'x', { more: 1 })]), [/^u arrived as/])
  t.match(violations([call('u', 'x', 200)], [row('u', 'x'), row('u', 'x')]), [/^1 duplicates arrived, 0 were allowed$/])
  t.same(violations([call('u', 'x', 200)], [row('u', 'x'), row('u', 'x')], { repeats: 1 }), [])
  t.match(violations([call('u', 'x', 200)], [row('u', 'x'), row('u', 'x', { time: 2 })], { repeats: 1 }), [/two forms/])
  t.match(violations([call('u', 'x', 202), call('v', 'x', 200)], [row('v', 'x'), row('u', 'x')]), [/^u was the first with x, but v arrived first$/])
  t.same(violations([call('u', 'x'), call('v', 'x', 200)], [row('u', 'x'), row('v', 'x')]), [])
  t.match(violations([], [row('u', 'x')]), [/was never sent/])
})

t.test('a relay that is killed three times in an outage delivers every identity that got 202', async t => {
  const { statuses, exit, found } = await killed(t, { rounds: 3, writers: 16 })
  t.same(found, [])
  t.equal(exit, 0)
  t.ok(statuses[202]! > 30, `more than 30 identities were stored: ${JSON.stringify(statuses)}`)
})

t.test('while another program locks the file: 503 if nothing was sent, 502 or 504 if Mixpanel may have it', async t => {
  const sandbox = await startSandbox(t)
  const directory = `${temporary(t)}/outbox`
  const server = await startServer(t, sandbox.url, { OUTBOX: `file:${directory}`, MIXPANEL_TIMEOUT_MS: '1000', DEADLINE_MS: '2000' })
  const callers = createCallers(() => server.url)
  const shell = new Database(`${directory}/relay/outbox.db`)
  shell.exec('BEGIN IMMEDIATE')
  sandbox.faults.add(outage)
  t.equal(await callers.call(), 502)
  sandbox.faults.clear()
  sandbox.faults.add({ name: 'rate_limited', times: 1 })
  t.equal(await callers.call(), 503)
  sandbox.faults.add({ name: 'hang', times: 10 })
  t.equal(await callers.call(), 504)
  sandbox.faults.clear()
  t.equal(await callers.call(), 200, 'an identity that Mixpanel accepts does not need the outbox')
  shell.exec('ROLLBACK')
  shell.close()
  sandbox.faults.add(outage)
  t.equal(await callers.call(), 202)
  sandbox.faults.clear()
  await server.emptied()
  t.same(violations(callers.calls, sandbox.ledger.rows(), { repeats: 1 }), [])
  t.equal(await server.kill('SIGTERM'), 0)
})

t.test('at SIGTERM identities that wait for a hanging Mixpanel are stored and get 202', async t => {
  const sandbox = await startSandbox(t)
  const server = await startServer(t, sandbox.url, {
    OUTBOX: `file:${temporary(t)}/outbox`, MIXPANEL_TIMEOUT_MS: '20000', DEADLINE_MS: '25000', SHUTDOWN_TIMEOUT_MS: '2000'
  })
  sandbox.faults.add({ name: 'hang', times: 1000 })
  const callers = createCallers(() => server.url)
  const answers = Promise.all(Array.from({ length: 20 }, () => callers.call()))
  await sleep(300)
  t.equal(await server.kill('SIGTERM'), 0)
  t.same(new Set(await answers), new Set([202]))
})

t.test('two relays share outbox and limits through a Redis that stops, dies and returns', needsRedis, async t => {
  let redis = await startRedis(t, { fsync: 'everysec' })
  const sandbox = await startSandbox(t)
  const env = { OUTBOX: 'redis', REDIS_URL: redis.url, DEADLINE_MS: '2000' }
  const relays = await Promise.all([env, env].map(one => startServer(t, sandbox.url, one)))
  const [one, other] = relays as [typeof relays[0], typeof relays[0]]
  t.match(one.output(), /"appendfsync":"everysec".*Redis durability insufficient/)
  const callers = createCallers(() => one.url)
  t.equal(await callers.call(), 200)

  sandbox.faults.add(outage)
  for (let count = 0; count < 5; count++) t.equal(await callers.call(), 202)
  const list = startProcess(t, SERVER, ['outbox', 'list'], { ...env, MIXPANEL_TOKEN: TOKEN }, { isCovered: true })
  t.equal(await list.exit, 0)
  t.equal(list.output().split('\n').length, 6)
  const anon = randomUUID()
  t.equal(await callers.call(anon), 202)
  const elsewhere = createCallers(() => other.url)
  sandbox.faults.clear()
  sandbox.faults.add({ name: 'wait', ms: 300, times: 1000 })
  t.equal(await elsewhere.call(anon), 202, 'the other relay stores a later identity of that anonymous id as well')
  sandbox.faults.clear()
  await one.emptied()

  redis.child.kill('SIGSTOP')
  const stopped = await Promise.all(Array.from({ length: 20 }, () => callers.call()))
  t.same(new Set(stopped), new Set([503]))
  redis.child.kill('SIGCONT')
  while (await callers.call() !== 200) await sleep(50)
  redis.child.kill('SIGKILL')
  await redis.exit
  t.equal(await callers.call(), 503)
  redis = await startRedis(t, { port: redis.port, dir: redis.dir })
  while (await callers.call() !== 200) await sleep(50)
  await one.until(/Redis durability sufficient/)
  await one.emptied()
  for (const server of relays) t.equal(await server.kill('SIGTERM'), 0)
  t.same(violations([...callers.calls, ...elsewhere.calls], sandbox.ledger.rows(), { repeats: 20, doubtful: 21 }), [])
  for (const server of relays) t.same(leaks(server.output()), [])

  const limited = await Promise.all([0, 1].map(() => startServer(t, sandbox.url, { REDIS_URL: `${redis.url}/1`, RATE_LIMIT_MAX: '6' }, { isCovered: true })))
  const statuses: number[] = []
  for (let count = 0; count < 10; count++) {
    const answer = await fetch(`${limited[count % 2]!.url}/identify`, { method: 'POST', body: JSON.stringify(identity()) })
    statuses.push(answer.status)
    if (answer.status === 429) t.match(answer.headers.get('ratelimit-limit'), '6')
  }
  t.same(statuses, [200, 200, 200, 200, 200, 200, 429, 429, 429, 429], 'together the two relays admit six requests')
  redis.child.kill('SIGKILL')
  await redis.exit
  const alone = await fetch(`${limited[0]!.url}/identify`, { method: 'POST', body: JSON.stringify(identity()) })
  t.equal(alone.status, 200, 'without Redis each relay uses its own count')
  for (const server of limited) t.equal(await server.kill('SIGTERM'), 0)
})
