import { randomUUID } from 'node:crypto'
import { rmSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import Database from 'libsql'
import { t } from 'tap'
import { createCallers } from './load.ts'
import { identity, leaks, needsRedis, startProcess, startRedis, startSandbox, temporary, TOKEN, type Env } from './helper.ts'
import { violations, type Call } from './delivery-check.ts'
import type { Row } from '../src/sandbox/ledger.ts'
import { killed, SERVER, startServer } from './scenarios.ts'

const outage = { name: 'edge_down' as const, times: 1_000_000 }

t.test('the check sees what it is there to see', async t => {
  const call = (id: string, anon: string, status?: number): Call =>
    ({ identity: { identified_id: id, anon_id: anon, properties: { a: 1 } }, ...status !== undefined && { status } })
  const row = (id: string, anon: string, more: object = {}): Row => ({
    endpoint: 'track', event: '$identify', outcome: 'merged', properties: { a: 1, distinct_id: id, $identified_id: id, $anon_id: anon, time: 1, $insert_id: `${id}-${anon}`, ...more }
  })
  t.same(violations([call('u', 'x', 200), call('v', 'y', 202), call('w', 'z', 503), call('k', 'k')], [row('v', 'y'), row('u', 'x')]), [])
  t.match(violations([call('u', 'x', 202)], []), [/^u was told 202 and is lost$/])
  t.same(violations([call('u', 'x', 202)], [], { dead: ['u'] }), [])
  for (const status of [400, 422, 429, 503]) t.match(violations([call('u', 'x', status)], [row('u', 'x')]), [/has arrived$/])
  t.same(violations([call('u', 'x', 503)], [row('u', 'x')], { doubtful: 1 }), [])
  t.same(violations([call('u', 'x', 504)], [row('u', 'x')]), [])
  t.match(violations([call('u', 'x', 200)], [row('u', 'x', { a: 2 })]), [/^u arrived as/])
  t.match(violations([call('u', 'x', 200)], [row('u', 'x', { more: 1 })]), [/^u arrived as/])
  t.match(violations([call('u', 'x', 200)], [row('u', 'x'), row('u', 'x')]), [/^1 arrived once more, 0 were allowed$/])
  t.same(violations([call('u', 'x', 200)], [row('u', 'x'), row('u', 'x')], { repeats: 1 }), [])
  t.match(violations([call('u', 'x', 200)], [row('u', 'x'), row('u', 'x', { time: 2 })], { repeats: 1 }), [/two forms/])
  t.match(violations([call('u', 'x', 202), call('v', 'x', 200)], [row('v', 'x'), row('u', 'x')]), [/^u claimed x first, but v arrived first$/])
  t.same(violations([call('u', 'x'), call('v', 'x', 200)], [row('u', 'x'), row('v', 'x')]), [])
  t.match(violations([], [row('u', 'x')]), [/nobody sent it/])
})

t.test('killed in the middle of an outage, three times: who was told 202 arrives', async t => {
  const { told, exit, broken } = await killed(t, { rounds: 3, writers: 32 })
  t.same(broken, [])
  t.equal(exit, 0)
  t.ok(told[202]! > 100, JSON.stringify(told))
})

t.test('one process a directory; operators are answered by the one that has it', async t => {
  const sandbox = await startSandbox(t)
  const env = { MIXPANEL_TOKEN: TOKEN, OUTBOX: `file:${temporary(t)}/outbox` }
  const server = await startServer(t, sandbox.url, env)
  const second = startProcess(t, SERVER, [], { ...env, PORT: '0' })
  t.equal(await second.exit, 1)
  t.match(second.output(), /^The relay cannot go on: another process uses the outbox in .*\/outbox\.\n$/)

  sandbox.faults.add(outage)
  const callers = createCallers(() => server.url, { async: 1 })
  for (let count = 0; count < 600; count++) await callers.call()
  const order = async (...args: string[]) => {
    const { exit, output } = startProcess(t, SERVER, ['outbox', ...args], env)
    const code = await exit
    t.same(leaks(output()), [])
    return { code, lines: output().split('\n').slice(0, -1) }
  }
  const list = await order('list')
  t.equal(list.code, 0)
  t.same(list.lines.map(line => JSON.parse(line).identified_id), callers.calls.map(({ identity }) => identity.identified_id))
  t.same(await order('dead'), { code: 0, lines: [] })
  t.same(await order('drop', '1'), { code: 0, lines: ['0 dropped.', '1 unknown: see outbox dead.'] })
  t.same(await order('drop'), { code: 1, lines: ['outbox drop takes ids, or all.'] })
  t.match((await server.parts()).outbox, { waiting: 600, dead: 0 })

  await server.kill()
  t.same((await order('list')).lines, list.lines, 'without a relay it looks for itself')
  t.same(await order('nonsense'), { code: 1, lines: ['outbox: list, dead, replay or drop?'] })
  const next = await startServer(t, sandbox.url, env)
  t.same(await order('list'), list, 'and the next relay answers as well')
  t.same(await order('replay'), { code: 1, lines: ['outbox replay takes ids, or all.'] })
  sandbox.faults.clear()
  await next.drained()
  t.equal(await next.kill('SIGTERM'), 0)
  t.same(violations(callers.calls, sandbox.ledger.rows(), { repeats: 400 }), [])
})

t.test('a relay that cannot make its socket, and operators whom nobody answers', async t => {
  const sandbox = await startSandbox(t)
  const env: Env = { MIXPANEL_TOKEN: TOKEN, OUTBOX: `file:${t.testdir({})}/${'long'.repeat(40)}` }
  const server = await startServer(t, sandbox.url, env)
  t.match(server.output(), /no socket in the outbox directory/)
  const { exit, output } = startProcess(t, SERVER, ['outbox', 'list'], env)
  t.equal(await exit, 1)
  t.match(output(), /^\/.*operators\.sock is too long for a socket: stop the relay\.\n$/)
  const directory = `${temporary(t)}/outbox`
  await startServer(t, sandbox.url, { OUTBOX: `file:${directory}` })
  rmSync(`${directory}/operators.sock`)
  const unheard = startProcess(t, SERVER, ['outbox', 'list'], { ...env, OUTBOX: `file:${directory}` })
  t.equal(await unheard.exit, 1)
  t.match(unheard.output(), /^The process that uses \/.*\/outbox does not take orders \(ENOENT\): stop it first\.\n$/)
  const off = startProcess(t, SERVER, ['outbox', 'list'], { MIXPANEL_TOKEN: TOKEN })
  t.equal(await off.exit, 1)
  t.equal(off.output(), 'OUTBOX is off: there is nothing to look at.\n')
})

t.test('directories that cannot be the outbox, and one that is not there', async t => {
  const run = async (directory: string, ...args: string[]) => {
    const { exit, output } = startProcess(t, SERVER, args, { MIXPANEL_TOKEN: TOKEN, OUTBOX: `file:${directory}`, PORT: '0' })
    return [await exit, output()]
  }
  t.match(await run('README.md'), [1, /^The relay cannot go on: README\.md cannot be the outbox: .+\.\n$/])
  t.match(await run('/nowhere/outbox', 'outbox', 'list'), [1, 'There is no /nowhere/outbox.\n'])
})

t.test('while another program has the file locked: 503 where nothing was kept or sent, 502 or 504 where Mixpanel may have it', async t => {
  const sandbox = await startSandbox(t)
  const directory = `${temporary(t)}/outbox`
  const server = await startServer(t, sandbox.url, { OUTBOX: `file:${directory}`, MIXPANEL_TIMEOUT_MS: '200', DEADLINE_MS: '400' })
  const callers = createCallers(() => server.url)
  const shell = new Database(`${directory}/outbox.db`)
  shell.exec('BEGIN IMMEDIATE')
  sandbox.faults.add(outage)
  t.equal(await callers.call(), 502)
  sandbox.faults.clear()
  sandbox.faults.add({ name: 'rate_limited', times: 1 })
  t.equal(await callers.call(), 503)
  sandbox.faults.add({ name: 'hang', times: 10 })
  t.equal(await callers.call(), 504)
  sandbox.faults.clear()
  t.equal(await callers.call(), 200, 'it is not in the way of those who need no outbox')
  shell.exec('ROLLBACK')
  shell.close()
  sandbox.faults.add(outage)
  t.equal(await callers.call(), 202)
  sandbox.faults.clear()
  await server.drained()
  t.same(violations(callers.calls, sandbox.ledger.rows(), { repeats: 1 }), [])
  t.equal(await server.kill('SIGTERM'), 0)
})

t.test('SIGTERM while Mixpanel hangs for longer than we have: everybody is kept, told so, and exit 0', async t => {
  const sandbox = await startSandbox(t)
  const server = await startServer(t, sandbox.url, {
    OUTBOX: `file:${temporary(t)}/outbox`, MIXPANEL_TIMEOUT_MS: '20000', DEADLINE_MS: '25000', SHUTDOWN_TIMEOUT_MS: '2000'
  })
  sandbox.faults.add({ name: 'hang', times: 1000 })
  const callers = createCallers(() => server.url)
  const waiting = Promise.all(Array.from({ length: 20 }, () => callers.call()))
  await sleep(300)
  t.equal(await server.kill('SIGTERM'), 0)
  t.same(new Set(await waiting), new Set([202]))
})

t.test('what OUTBOX does not need is not loaded', async t => {
  const report = `data:text/javascript,${encodeURIComponent(`
    import module from 'node:module'
    process.on('exit', () => console.log('loaded:' + Object.keys(module._cache).filter(path => /libsql|ioredis/.test(path)).length))`)}`
  const sandbox = await startSandbox(t)
  const loaded = async (env: Env) => {
    const server = await startServer(t, sandbox.url, { ...env, NODE_OPTIONS: `--import=${report}` })
    t.equal(await server.kill('SIGTERM'), 0)
    return Number((await server.until(/loaded:(\d+)/))[1])
  }
  t.equal(await loaded({}), 0)
  t.ok(await loaded({ OUTBOX: `file:${temporary(t)}/outbox` }) > 0, 'the report works')
})

t.test('Redis: out of reach at start is a sentence without the secret', async t => {
  for (const env of [{ OUTBOX: 'redis' }, {}]) {
    const server = startProcess(t, SERVER, [], { MIXPANEL_TOKEN: TOKEN, REDIS_URL: 'redis://:CANARY-SECRET@127.0.0.1:9', PORT: '0', ...env })
    t.equal(await server.exit, 1)
    t.equal(server.output(), 'The relay cannot go on: REDIS_URL: Redis cannot be reached (ECONNREFUSED).\n')
  }
})

t.test('Redis: two relays share outbox and limits; killed, stopped, and back', needsRedis, async t => {
  let redis = await startRedis(t, { fsync: 'everysec' })
  const sandbox = await startSandbox(t)
  const env = { OUTBOX: 'redis', REDIS_URL: redis.url, DEADLINE_MS: '2000' }
  const relays = await Promise.all([env, env].map(one => startServer(t, sandbox.url, one)))
  const [one, other] = relays as [typeof relays[0], typeof relays[0]]
  t.match(one.output(), /"appendfsync":"everysec".*a 202 may not survive the loss of power at Redis/)
  const callers = createCallers(() => one.url)
  t.equal(await callers.call(), 200)

  sandbox.faults.add(outage)
  for (let count = 0; count < 5; count++) t.equal(await callers.call(), 202)
  const list = startProcess(t, SERVER, ['outbox', 'list'], { ...env, MIXPANEL_TOKEN: TOKEN })
  t.equal(await list.exit, 0)
  t.equal(list.output().split('\n').length, 6)
  const anon = randomUUID()
  t.equal(await callers.call(anon), 202)
  const elsewhere = createCallers(() => other.url)
  sandbox.faults.clear()
  sandbox.faults.add({ name: 'wait', ms: 300, times: 1000 })
  t.equal(await elsewhere.call(anon), 202, 'the other one follows an earlier claim as well')
  sandbox.faults.clear()
  await one.drained()

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
  await one.until(/a 202 survives the loss of power at Redis/)
  await one.drained()
  for (const server of relays) t.equal(await server.kill('SIGTERM'), 0)
  t.same(violations([...callers.calls, ...elsewhere.calls], sandbox.ledger.rows(), { repeats: 20, doubtful: 21 }), [])
  for (const server of relays) t.same(leaks(server.output()), [])

  const limited = await Promise.all([0, 1].map(() => startServer(t, sandbox.url, { REDIS_URL: `${redis.url}/1`, RATE_LIMIT_MAX: '6' })))
  const told: number[] = []
  for (let count = 0; count < 10; count++) {
    const answer = await fetch(`${limited[count % 2]!.url}/identify`, { method: 'POST', body: JSON.stringify(identity()) })
    told.push(answer.status)
    if (answer.status === 429) t.match(answer.headers.get('ratelimit-limit'), '6')
  }
  t.same(told, [200, 200, 200, 200, 200, 200, 429, 429, 429, 429], 'together they let six pass')
  redis.child.kill('SIGKILL')
  await redis.exit
  const alone = await fetch(`${limited[0]!.url}/identify`, { method: 'POST', body: JSON.stringify(identity()) })
  t.equal(alone.status, 200, 'without Redis each goes by its own count')
  for (const server of limited) t.equal(await server.kill('SIGTERM'), 0)
})
