import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { violations } from '../delivery-check.ts'
import { startSandbox, temporary } from '../helper.ts'
import { createCallers } from '../load.ts'
import { startServer } from '../processes.ts'
import { catchUp } from '../scenarios.ts'

const outage = { name: 'edge_down' as const, times: 1_000_000 }

/** Compiles the library of slow-fsync.c. Returns its path, or undefined without a compiler. */
function slowFsync (t: Test): string | undefined {
  const library = join(temporary(t), 'slow-fsync.so')
  return spawnSync('cc', ['-shared', '-fPIC', '-o', library, 'test/slow/slow-fsync.c', '-ldl']).status === 0 ? library : undefined
}

/** The median and the p99 of /livez in ms, asked every 10 ms until `end` resolves. */
async function probe (url: string, end: Promise<unknown>) {
  const times: number[] = []
  const over = new AbortController()
  end.finally(() => over.abort())
  while (!over.signal.aborted) {
    const since = performance.now()
    await (await fetch(`${url}/livez`)).arrayBuffer()
    times.push(performance.now() - since)
    await sleep(10)
  }
  times.sort((a, b) => a - b)
  return { median: times[times.length >> 1] ?? Infinity, p99: times[Math.ceil(times.length * 0.99) - 1] ?? Infinity }
}

const shown = ({ median, p99 }: { median: number, p99: number }) => `${median.toFixed(1)} ms (p99 ${p99.toFixed(1)})`

t.test('a disk on which an fsync takes half a second delays no other answer', async t => {
  const library = slowFsync(t)
  if (library === undefined) return t.pass('a slow disk', { skip: 'cc is not installed' })
  const figures: Record<string, Awaited<ReturnType<typeof probe>>> = {}
  for (const [name, env] of [['fast', {}], ['slow', { LD_PRELOAD: library, FSYNC_MS: '500' }]] as const) {
    const sandbox = await startSandbox(t)
    const server = await startServer(t, sandbox.url, { OUTBOX: `file:${temporary(t)}/outbox`, ...env })
    figures[`${name}, idle`] = await probe(server.url, sleep(2000))
    sandbox.faults.add(outage)
    const callers = createCallers(() => server.url, { async: 1 })
    callers.start(16)
    figures[`${name}, accepting`] = await probe(server.url, sleep(5000))
    await callers.stop()
    const { waiting } = (await server.parts()).outbox
    sandbox.faults.clear()
    figures[`${name}, delivering`] = await probe(server.url, server.emptied())
    t.comment(`${name} disk: ${waiting} identities waited`)
    t.same(violations(callers.calls, sandbox.ledger.rows(), { repeats: 400 }), [])
    t.equal(await server.kill('SIGTERM'), 0)
  }
  for (const [name, figure] of Object.entries(figures)) t.comment(`/livez, ${name}: ${shown(figure)}`)
  for (const name of ['accepting', 'delivering']) {
    // A quantile of the machine's own noise stands beside it.
    const bound = 20 + 2 * figures[`fast, ${name}`]!.p99
    const { p99 } = figures[`slow, ${name}`]!
    t.ok(p99 <= bound, `while ${name} on a slow disk /livez takes ${p99.toFixed(1)} ms at p99, at most ${bound.toFixed(1)}`)
  }
})

t.test('a disk that hangs does not delay the exit', async t => {
  const library = slowFsync(t)
  if (library === undefined) return t.pass('a slow disk', { skip: 'cc is not installed' })
  const sandbox = await startSandbox(t)
  const env = { LD_PRELOAD: library, FSYNC_MS: '60000', SHUTDOWN_TIMEOUT_MS: '1000', DEADLINE_MS: '1000', OUTBOX: `file:${temporary(t)}/outbox` }
  const fast = await startServer(t, sandbox.url, { OUTBOX: env.OUTBOX })
  t.equal(await fast.kill('SIGTERM'), 0)
  const server = await startServer(t, sandbox.url, env)
  sandbox.faults.add(outage)
  const answer = server.post().then(({ status }) => status, () => 'none')
  await sleep(1500)
  const since = performance.now()
  server.child.kill('SIGTERM')
  await server.exit
  const ms = performance.now() - since
  t.ok(ms < 6000, `SHUTDOWN_TIMEOUT_MS and 3 s have passed, and ${ms.toFixed(0)} ms did`)
  t.not(await answer, 202)
})

t.test('five thousand identities that wait on a slow disk are delivered within five seconds of the first success', async t => {
  const library = slowFsync(t)
  if (library === undefined) return t.pass('a slow disk', { skip: 'cc is not installed' })
  const sandbox = await startSandbox(t)
  await catchUp(t, sandbox, { OUTBOX: `file:${temporary(t)}/outbox`, LD_PRELOAD: library, FSYNC_MS: '100' })
})
