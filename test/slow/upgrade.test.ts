import { spawnSync } from 'node:child_process'
import { existsSync, symlinkSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { violations } from '../delivery-check.ts'
import { needsRedis, startRedis, startSandbox, temporary, TOKEN } from '../helper.ts'
import { createCallers } from '../load.ts'
import { SERVER, startProcess, startServer } from '../processes.ts'

const outage = { name: 'edge_down' as const, times: 1_000_000 }

/** The first release whose outbox must be readable. */
const FIRST = 'd963357'

/** Builds the first release beside this one. Returns its program, or undefined where Git does not have it. */
function firstRelease (t: Test): string | undefined {
  const directory = temporary(t)
  const { status } = spawnSync('sh', ['-c', `git archive ${FIRST} src tsconfig.json package.json | tar -x -C "$0"`, directory])
  if (status !== 0 || !existsSync(join(directory, 'src'))) return undefined
  symlinkSync(resolve('node_modules'), join(directory, 'node_modules'))
  // Its types are those of earlier libraries, so only what tsc emits counts.
  spawnSync(process.execPath, [resolve('node_modules/typescript/bin/tsc'), '-p', directory, '--skipLibCheck'])
  const program = join(directory, 'dist/server.js')
  return existsSync(program) ? program : undefined
}

/** The first release as a process in front of a sandbox. */
async function startFirst (t: Test, program: string, sandboxUrl: string, env: Record<string, string>) {
  const server = startProcess(t, program, [], { MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: sandboxUrl, PORT: '0', RATE_LIMIT_MAX: '1000000000', ...env })
  const [, url] = await server.until(/Server listening at (http:[^"]+)"/) as unknown as [string, string]
  return { ...server, url }
}

t.test('an upgrade beside the first release loses and reorders nothing', { timeout: 120_000, ...needsRedis }, async t => {
  const program = firstRelease(t)
  if (program === undefined) return t.pass('an upgrade', { skip: `Git does not have ${FIRST}` })

  await t.test('two relays at one Redis', async t => {
    const redis = await startRedis(t)
    const sandbox = await startSandbox(t)
    const env = { OUTBOX: 'redis', REDIS_URL: redis.url, DEADLINE_MS: '2000', MIXPANEL_TIMEOUT_MS: '1000' }
    const old = await startFirst(t, program, sandbox.url, env)
    const next = await startServer(t, sandbox.url, env)
    const urls = [old.url, next.url]
    let turn = 0
    const callers = createCallers(() => urls[turn++ % urls.length]!, { pauseMs: 2 })
    for (let round = 0; round < 3; round++) {
      sandbox.faults.add(outage)
      callers.start(16)
      await sleep(1500)
      sandbox.faults.clear()
      await sleep(1500)
      await callers.stop()
    }
    sandbox.faults.add(outage)
    callers.start(16)
    await sleep(500)
    // The first release dies with what it has leased.
    old.child.kill('SIGKILL')
    await old.exit
    urls.shift()
    await sleep(500)
    await callers.stop()
    sandbox.faults.clear()
    await next.emptied()
    t.ok(callers.statuses()[202]! > 50, JSON.stringify(callers.statuses()))
    t.same(violations(callers.calls, sandbox.ledger.rows(), { repeats: 4 * 400 }), [])
    t.equal(await next.kill('SIGTERM'), 0)
  })

  await t.test('one directory', async t => {
    const sandbox = await startSandbox(t)
    const env = { OUTBOX: `file:${temporary(t)}/outbox` }
    sandbox.faults.add(outage)
    const old = await startFirst(t, program, sandbox.url, env)
    const callers = createCallers(() => old.url, { async: 0.5 })
    callers.start(16)
    await sleep(2000)
    const second = startProcess(t, SERVER, [], { MIXPANEL_TOKEN: TOKEN, PORT: '0', ...env })
    t.equal(await second.exit, 1, 'the directory belongs to the running relay')
    t.match(second.output(), /another process uses the outbox/)
    old.child.kill('SIGKILL')
    await old.exit
    await callers.stop()
    const next = await startServer(t, sandbox.url, env)
    sandbox.faults.clear()
    await next.emptied()
    t.ok(callers.statuses()[202]! > 50, JSON.stringify(callers.statuses()))
    t.same(violations(callers.calls, sandbox.ledger.rows(), { repeats: 500 }), [])
    t.equal(await next.kill('SIGTERM'), 0)
  })
})
