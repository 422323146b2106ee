import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Test } from 'tap'
import { Pool } from 'undici'
import { FAULTS, LATE_FAULTS, type Fault } from '#src/sandbox/faults.js'
import { createCallers } from './load.ts'
import { identity, startSandbox, temporary, TOKEN, type Env } from './helper.ts'
import { violations } from './delivery-check.ts'
import { SERVER, startProcess, startServer } from './processes.ts'

/** Returns NODE_OPTIONS with which the thread of the outbox runs `code` first. `Database` is the class of libsql. */
export function inOutboxThread (code: string): string {
  const dataUrl = (text: string) => `data:text/javascript,${encodeURIComponent(text)}`
  const inThread = dataUrl(`import Database from 'file://${process.cwd()}/node_modules/libsql/index.js'\n${code}`)
  return `--import=${dataUrl(`
    import threads from 'node:worker_threads'
    import { syncBuiltinESMExports } from 'node:module'
    threads.Worker = class extends threads.Worker {
      constructor (url, options) { super(url, { ...options, execArgv: [${JSON.stringify(`--import=${inThread}`)}] }) }
    }
    syncBuiltinESMExports()`)}`
}

/** Kills the relay repeatedly while callers fill its outbox. Mixpanel is unreachable, or with `isFlapping` comes and goes. */
export async function killed (t: Test, { rounds, writers, isFlapping = false, env = {} as Env }: { rounds: number, writers: number, isFlapping?: boolean, env?: Env }) {
  const sandbox = await startSandbox(t)
  const outage = { name: 'edge_down' as const, times: 1_000_000 }
  const settings = { OUTBOX: `file:${temporary(t)}/outbox`, DEADLINE_MS: '2000', MIXPANEL_TIMEOUT_MS: '1000', ...env }
  let url = ''
  const callers = createCallers(() => url, { async: 0.5 })
  sandbox.faults.add(outage)
  let kills = 0
  for (let round = 0; round < rounds; round++) {
    const server = await startServer(t, sandbox.url, settings)
    url = server.url
    callers.start(writers)
    const before = callers.calls.length
    await sleep(100 + Math.random() * 500)
    // On a busy machine the first answers take longer.
    while (callers.calls.length < before + writers) await sleep(10)
    if (isFlapping) {
      sandbox.faults.clear()
      // The breaker sends its first probe after a second.
      await sleep(800 + Math.random() * 700)
      if (round % 2 === 0) sandbox.faults.add(outage)
    }
    await server.kill()
    kills++
    await callers.stop()
    sandbox.faults.clear()
    sandbox.faults.add(outage)
  }
  sandbox.faults.clear()
  const server = await startServer(t, sandbox.url, settings)
  await server.emptied()
  const exit = await server.kill('SIGTERM')
  return { statuses: callers.statuses(), exit, found: violations(callers.calls, sandbox.ledger.rows(), { repeats: kills * (400 + writers) }) }
}

/** Five thousand identities wait in an outage. They are delivered within five seconds of the first success after it. */
export async function catchUp (t: Test, sandbox: Awaited<ReturnType<typeof startSandbox>>, env: Env): Promise<void> {
  const server = await startServer(t, sandbox.url, env)
  sandbox.faults.add({ name: 'edge_down', times: 1_000_000 })
  for (let count = 0; count < 10; count++) {
    const answer = await fetch(`${server.url}/identify/batch`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', prefer: 'respond-async' },
      body: JSON.stringify({ identities: Array.from({ length: 500 }, () => identity()) })
    })
    t.equal(answer.status, 202)
  }
  t.equal((await server.parts()).outbox.waiting, 5000)
  // The forwarder has met the outage.
  await sleep(3000)
  sandbox.faults.clear()
  while (sandbox.ledger.rows().length === 0) await sleep(5)
  const since = performance.now()
  while (sandbox.ledger.rows().length < 5000) await sleep(20)
  const ms = performance.now() - since
  t.comment(`all are delivered ${ms.toFixed(0)} ms after the first success`)
  t.ok(ms < 5000, `all are delivered within 5 s, and were in ${ms.toFixed(0)} ms`)
  await server.emptied()
  t.equal(await server.kill('SIGTERM'), 0)
}

/** The identified ids of the dead letters, from `outbox dead`. */
async function deadLetters (t: Test, env: Env): Promise<string[]> {
  const { exit, output } = startProcess(t, SERVER, ['outbox', 'dead'], env)
  t.equal(await exit, 0)
  return output().split('\n').slice(0, -1).map(line => JSON.parse(line).identified_id)
}

/** Callers meet every fault in turn, with an outbox; then Mixpanel recovers. */
export async function everyFault (t: Test, { requests }: { requests: number }) {
  const sandbox = await startSandbox(t)
  const env = { MIXPANEL_TOKEN: TOKEN, OUTBOX: `file:${temporary(t)}/outbox`, DEADLINE_MS: '1000', MIXPANEL_TIMEOUT_MS: '300' }
  const server = await startServer(t, sandbox.url, env)
  const callers = createCallers(() => server.url)
  const refusing = ['refused', 'echo', 'long_echo', 'mute_zero', 'bad_request', 'huge_refusal', 'names_one_takes_none', 'slow_zero']
  const names = [...refusing, ...[...Object.keys(FAULTS), ...LATE_FAULTS].filter(name => !refusing.includes(name))] as Fault['name'][]
  const statuses: Record<string, Record<string, number>> = {}
  for (const name of names) {
    sandbox.faults.add({ name, times: 1_000_000, ms: 50 })
    const before = callers.calls.length
    await Promise.all(Array.from({ length: 20 }, async () => {
      for (let count = 0; count < requests / 20; count++) await callers.call()
    }))
    statuses[name] = {}
    for (const { status = 0 } of callers.calls.slice(before)) statuses[name][status] = (statuses[name][status] ?? 0) + 1
    sandbox.faults.clear()
    // The breaker closes again.
    while (await callers.call() !== 200) await sleep(200)
  }
  await server.emptied()
  // A stored event may have met one of the refusing faults.
  const dead = await deadLetters(t, env)
  t.equal(await server.kill('SIGTERM'), 0)
  return { statuses, found: violations(callers.calls, sandbox.ledger.rows(), { repeats: callers.calls.length, dead }) }
}

/** A balancer that asks /readyz four times a second, and sends each request to the next relay that is ready. */
export async function startBalancer (t: Test) {
  const backends = new Map<string, { pool: Pool, isReady: boolean }>()
  let turn = 0
  const timer = setInterval(() => {
    for (const [url, backend] of backends) {
      fetch(`${url}/readyz`).then(answer => { backend.isReady = answer.ok }, () => { backend.isReady = false })
    }
  }, 250)
  const server = createServer(async (request, response) => {
    const ready = [...backends.values()].filter(({ isReady }) => isReady)
    const backend = ready[turn++ % ready.length]
    try {
      if (backend === undefined) throw new Error('no relay is ready')
      const answer = await backend.pool.request({
        method: 'POST', path: request.url ?? '/', headers: { 'content-type': 'application/json' }, body: await text(request)
      })
      response.writeHead(answer.statusCode).end(await answer.body.text())
    } catch {
      response.writeHead(599).end()
    }
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    clearInterval(timer)
    server.closeAllConnections()
    server.close()
    for (const { pool } of backends.values()) pool.destroy()
  })
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    add: (url: string) => { backends.set(url, { pool: new Pool(url, { connections: 64 }), isReady: false }) },
    isReady: (url: string) => backends.get(url)?.isReady === true
  }
}

/** Relays replace each other behind a balancer, under load; Mixpanel is unreachable half of the time. */
export async function rolling (t: Test, { rounds, callers: count, env }: { rounds: number, callers: number, env: (round: number) => Env }) {
  const sandbox = await startSandbox(t)
  const balancer = await startBalancer(t)
  const callers = createCallers(() => balancer.url, { pauseMs: 10 })
  const join = async (round: number) => {
    const server = await startServer(t, sandbox.url, { SHUTDOWN_DELAY_MS: '1200', DEADLINE_MS: '3000', ...env(round) })
    balancer.add(server.url)
    while (!balancer.isReady(server.url)) await sleep(50)
    return server
  }
  let server = await join(0)
  callers.start(count)
  const codes: (number | null)[] = []
  for (let round = 1; round <= rounds; round++) {
    const next = await join(round)
    if (round % 2 === 0) sandbox.faults.add({ name: 'edge_down', times: 1_000_000 })
    codes.push(await server.kill('SIGTERM'))
    sandbox.faults.clear()
    server = next
  }
  await callers.stop()
  codes.push(await server.kill('SIGTERM'))
  return { sandbox, callers, codes }
}
