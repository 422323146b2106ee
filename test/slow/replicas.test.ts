import { spawnSync } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync, writeFileSync } from 'node:fs'
import { createServer, request, type IncomingMessage } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { createCallers } from '../load.ts'
import { freePort, needsRedis, startRedis, startSandbox } from '../helper.ts'
import { violations } from '../delivery-check.ts'
import { startCommand, startServer } from '../processes.ts'

const hasHaproxy = spawnSync('haproxy', ['-v']).status === 0
const needsBoth = { skip: needsRedis.skip || (hasHaproxy ? false : 'haproxy is not installed') }

const RATE = 200
const MAX_OPEN = 400
/** Requests that may be in flight when a process is killed: what then became of their identities is unknown. */
const IN_FLIGHT = 50

/** HAProxy with the configuration of docker-compose.yml. Only the addresses of the relays differ. */
async function startHaproxy (t: Test, ports: number[]) {
  const text = readFileSync('examples/replicas/haproxy.cfg', 'utf8')
  const servers = ports.map(port => `  server relay-${port} 127.0.0.1:${port}`).join('\n')
  const config = text.replace(/^ +server-template .*$/m, servers)
  t.not(config, text, 'haproxy.cfg has the line that is replaced')
  const path = join(t.testdir({}), 'haproxy.cfg')
  writeFileSync(path, config)
  const port = await freePort()
  const haproxy = startCommand(t, 'haproxy', ['-db', '-f', path], { BIND: `127.0.0.1:${port}` })
  const url = `http://127.0.0.1:${port}`
  while (!await fetch(`${url}/readyz`).then(({ ok }) => ok, () => false)) await sleep(50)
  return { ...haproxy, url }
}

/**
 * Makes RATE requests a second, however long the answers take; fewer only where MAX_OPEN are open. One in ten has the
 * anonymous id of an earlier one, for another user.
 */
function startLoad (call: (anon?: string) => Promise<number | undefined>) {
  const open = new Set<Promise<unknown>>()
  const taken: string[] = []
  let made = 0
  async function one (): Promise<void> {
    const isReused = taken.length > 0 && Math.random() < 0.1
    const anon = isReused ? taken.shift() as string : randomUUID()
    const status = await call(anon)
    if (!isReused && (status === 200 || status === 202)) taken.push(anon)
  }
  const since = performance.now()
  const timer = setInterval(() => {
    for (const due = (performance.now() - since) / 1000 * RATE; made < due; made++) {
      if (open.size === MAX_OPEN) continue
      const promise = one().finally(() => open.delete(promise))
      open.add(promise)
    }
  }, 5)
  return {
    async stop (): Promise<void> {
      clearInterval(timer)
      await Promise.all(open)
    }
  }
}

t.test('three relays behind HAProxy lose nothing while each of them and their Redis is killed, and callers see only 200, 202 and 503', needsBoth, async t => {
  let redis = await startRedis(t)
  const sandbox = await startSandbox(t)
  const ports = [await freePort(), await freePort(), await freePort()]
  const start = (port: number) => startServer(t, sandbox.url, { PORT: String(port), OUTBOX: 'redis', REDIS_URL: redis.url, TRUST_PROXY: '127.0.0.1' })
  const relays = await Promise.all(ports.map(start))
  const haproxy = await startHaproxy(t, ports)
  const callers = createCallers(() => haproxy.url)

  let kills = 0
  async function killAndRestart (index: number): Promise<void> {
    kills++
    await relays[index]!.kill()
    await sleep(1500)
    relays[index] = await start(ports[index]!)
    await sleep(1500)
  }
  async function killRedis (): Promise<void> {
    kills++
    redis.child.kill('SIGKILL')
    await redis.exit
    await sleep(1000)
    redis = await startRedis(t, { port: redis.port, dir: redis.dir })
    await sleep(2000)
  }

  const unexpected = (...expected: string[]) => Object.keys(callers.statuses()).filter(status => !expected.includes(status))

  const load = startLoad(callers.call)
  await sleep(2000)
  await killAndRestart(0)
  const { 200: accepted = 0, 202: queued = 0 } = callers.statuses()
  t.ok(accepted + queued > callers.calls.length * 0.9, `one relay of three is not missed: ${JSON.stringify(callers.statuses())}`)
  await killRedis()
  sandbox.faults.add({ name: 'edge_down', times: 1_000_000 })
  await sleep(2000)
  await killAndRestart(1)
  t.same(unexpected('200', '202', '503'), [], JSON.stringify(callers.statuses()))
  // Mixpanel may have an identity that cannot be stored: the relay says so with 502 or 504.
  await killRedis()
  sandbox.faults.clear()
  await killAndRestart(2)
  await load.stop()

  t.comment(JSON.stringify(callers.statuses()))
  t.same(unexpected('200', '202', '502', '503', '504'), [], JSON.stringify(callers.statuses()))
  t.same(callers.calls.filter(({ status = 0, code }) => status > 299 && code === undefined), [], 'each of these answers is from a relay')
  t.ok(callers.statuses()[202]! > 100, 'identities were queued')
  t.equal(callers.withoutRetryAfter(), 0, 'each 503 has a Retry-After')
  await relays[0]!.emptied()
  for (const relay of relays) t.equal(await relay.kill('SIGTERM'), 0)
  // HAProxy repeats a request at another relay, which gives the event a time of its own.
  const rows = sandbox.ledger.rows().map(row => ({ ...row, properties: { ...row.properties, time: 0 } as typeof row.properties }))
  t.same(violations(callers.calls, rows, { repeats: callers.calls.length, doubtful: IN_FLIGHT * kills }), [])
  const repeats = rows.length - new Set(rows.map(({ properties }) => properties.$insert_id)).size
  t.comment(`${repeats} duplicates, ${violations(callers.calls, rows, { repeats }).length} identities with 503 that arrived`)
})

t.test('HAProxy repeats the largest identity where a relay dies with it, and says so where it cannot repeat', needsBoth, async t => {
  let dropped = 0
  const server = createServer((incoming, response) => {
    if (incoming.method === 'GET') response.end()
    else incoming.resume().on('end', () => dropped++ === 0 ? incoming.socket.destroy() : response.end('{}'))
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => { server.close().closeAllConnections() })
  const { url } = await startHaproxy(t, [(server.address() as AddressInfo).port])
  /** Each request has a connection of its own: on one that HAProxy has used before it closes without an answer. */
  async function post (bytes: number) {
    dropped = 0
    const one = request(`${url}/identify`, { method: 'POST', agent: false, headers: { authorization: `Bearer ${'x'.repeat(8000)}` } })
    one.end('x'.repeat(bytes))
    const [answer] = await once(one, 'response') as [IncomingMessage]
    return { status: answer.statusCode, headers: answer.headers, body: await text(answer) }
  }
  // The server is up for HAProxy after its first check.
  while ((await fetch(`${url}/readyz`)).status !== 200) await sleep(50)
  for (const bytes of [100, 65_536]) {
    t.equal((await post(bytes)).status, 200)
    t.equal(dropped, 2, 'it was sent twice')
  }
  const problem = { headers: { 'retry-after': '1', 'content-type': 'application/problem+json' } }
  const unknown = await post(200_000)
  t.match(unknown, { status: 502, ...problem }, 'a large batch is sent once')
  t.match(JSON.parse(unknown.body), { status: 502, retryable: true, detail: /outcome is unknown/ })
  server.close().closeAllConnections()
  const none = await post(100)
  t.match(none, { status: 503, ...problem })
  t.match(JSON.parse(none.body), { status: 503, retryable: true })
})
