import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { createCallers } from '../load.ts'
import { needsRedis, startRedis, startSandbox } from '../helper.ts'
import { violations } from '../delivery-check.ts'
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
