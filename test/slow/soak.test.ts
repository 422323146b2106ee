import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { createCallers } from '../load.ts'
import { startSandbox, temporary } from '../helper.ts'
import { violations } from '../delivery-check.ts'
import { startServer } from '../processes.ts'

/** A shorter soak has fewer samples of the heap. */
const SECONDS = Number(process.env.SOAK_SECONDS ?? 180)

/** Prints the size of the heap every five seconds, after a garbage collection. */
const gauge = `data:text/javascript,${encodeURIComponent(`
  import { setFlagsFromString } from 'node:v8'
  import { runInNewContext } from 'node:vm'
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc')
  setInterval(() => { collect(); console.log('heap ' + process.memoryUsage().heapUsed) }, 5000).unref()`)}`

t.test(`in ${SECONDS} seconds of load and faults the heap does not grow, and nothing is lost`, async t => {
  const sandbox = await startSandbox(t)
  const server = await startServer(t, sandbox.url, {
    OUTBOX: `file:${temporary(t)}/outbox`, DEADLINE_MS: '2000', MIXPANEL_TIMEOUT_MS: '500', NODE_OPTIONS: `--import=${gauge}`
  })
  const callers = createCallers(() => server.url, { async: 0.1, pauseMs: 20 })
  const faults = ['edge_down', 'hang', 'reset_after', 'rate_limited', 'wait', 'garbage'] as const
  const samples: { calls: number, heap: number }[] = []
  let seen = 0
  const until = Date.now() + SECONDS * 1000
  callers.start(16)
  for (let round = 0; Date.now() < until; round++) {
    if (round % 10 === 0) sandbox.faults.add({ name: faults[round / 10 % faults.length]!, times: 1_000_000, ms: 50 })
    if (round % 10 === 3) sandbox.faults.clear()
    await sleep(1000)
    sandbox.requests.length = 0
    const output = server.output()
    for (const [, heap] of output.slice(seen).matchAll(/^heap (\d+)$/gm)) samples.push({ calls: callers.calls.length, heap: Number(heap) })
    seen = output.lastIndexOf('\n')
  }
  await callers.stop()
  sandbox.faults.clear()
  await server.emptied()
  t.equal(await server.kill('SIGTERM'), 0)

  // The last two thirds, because at first code is compiled and caches fill.
  const late = samples.slice(Math.floor(samples.length / 3))
  const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length
  const [calls, heap] = [mean(late.map(sample => sample.calls)), mean(late.map(sample => sample.heap))]
  const slope = late.reduce((sum, one) => sum + (one.calls - calls) * (one.heap - heap), 0) / late.reduce((sum, one) => sum + (one.calls - calls) ** 2, 0)
  t.comment(`${late.length} samples, ${callers.calls.length} calls ${JSON.stringify(callers.statuses())}; ` +
    `heap ${(heap / 2 ** 20).toFixed(1)} MiB, ${(slope * 1000 / 1024).toFixed(1)} KiB for a thousand calls`)
  t.ok(late.length >= SECONDS / 12, `there are enough samples of the heap: ${late.length}`)
  t.ok(slope * 1000 < 20 * 1024, 'the heap grows by less than 20 KiB for a thousand calls')
  t.same(violations(callers.calls, sandbox.ledger.rows(), { repeats: callers.calls.length }), [])
})
