import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { freePort, TOKEN } from '../helper.ts'
import { createCallers } from '../load.ts'
import { readMetrics, sum } from '../metrics-reader.ts'
import { startServer } from '../processes.ts'
import { createSandbox } from '#src/sandbox/app.js'

/** How long Mixpanel is away. */
const OUTAGE_MS = Number(process.env.OUTAGE_SECONDS ?? 60) * 1000

/** By then an operator must see what is wrong. */
const SEEN_MS = 5000

t.test('during an outage /metrics and /status say within 5 s what is wrong, how much waits and since when, and afterwards that all is delivered', async t => {
  const port = await freePort()
  const first = createSandbox({ token: TOKEN })
  await first.app.listen({ host: '127.0.0.1', port })
  const metricsPort = await freePort()
  const relay = await startServer(t, `http://127.0.0.1:${port}`, { METRICS_PORT: String(metricsPort), OUTBOX: `file:${t.testdir({})}` })
  const metricsUrl = `http://127.0.0.1:${metricsPort}`
  interface Status { status: string, reasons: { code: string, since: string }[], outbox: { waiting: number, oldest: string } }
  const status = async () => await (await fetch(`${metricsUrl}/status`)).json() as Status
  const gauge = async (name: string) => (await readMetrics(metricsUrl)).get(`identify_relay_${name}`) ?? NaN
  const callers = createCallers(() => relay.url, { pauseMs: 50 })
  callers.start(4)
  await sleep(2000)
  t.equal((await status()).status, 'ok')

  await first.app.close()
  const began = Date.now()
  let seen: Status
  do {
    await sleep(100)
    seen = await status()
  } while (!(seen.status === 'degraded' && seen.outbox.waiting > 0 && seen.outbox.oldest !== null) && Date.now() - began < SEEN_MS)
  t.comment(`seen after ${Date.now() - began} ms`)
  t.match(seen.reasons[0], { code: /^mixpanel_(failing|unavailable)$/, since: String })
  t.ok(Math.abs(Date.parse(String(seen.reasons[0]?.since)) - began) < SEEN_MS, 'since when Mixpanel fails')
  t.ok(Math.abs(Date.parse(seen.outbox.oldest) - began) < SEEN_MS, 'since when the oldest one waits')
  t.ok(await gauge('outbox_waiting') > 0 && await gauge('degraded') === 1)
  t.ok(Date.now() - began < SEEN_MS + 1000)

  let last = 0
  while (Date.now() - began < OUTAGE_MS) {
    await sleep(5000)
    const [waiting, oldest, open, failing] = [await gauge('outbox_waiting'), await gauge('outbox_oldest_seconds'), await gauge('breaker_open'), await gauge('mixpanel_failing_seconds')]
    t.ok(waiting > last && open === 1, `${waiting} wait, more than before, and Mixpanel is not asked`)
    for (const age of [oldest, failing]) t.ok(Math.abs(age - (Date.now() - began) / 1000) < 4, `for ${age} s, the time of the outage`)
    last = waiting
  }

  const second = createSandbox({ token: TOKEN })
  await second.app.listen({ host: '127.0.0.1', port })
  t.teardown(() => second.app.close())
  await callers.stop()
  while (await gauge('outbox_waiting') > 0) await sleep(200)
  await sleep(500)
  t.match(await status(), { status: 'ok', reasons: [], outbox: { waiting: 0, oldest: null } })
  const metrics = await readMetrics(metricsUrl)
  const received = callers.calls.filter(({ status: code }) => code !== undefined).length
  const inOutbox = (outcome: string) => sum(metrics, 'identify_relay_outbox_identities_total', { outcome })
  t.equal(sum(metrics, 'identify_relay_identities_total'), received)
  t.ok(inOutbox('stored') > 100)
  t.equal(inOutbox('delivered'), inOutbox('stored'), 'all that was queued is delivered')
  t.equal(await relay.kill('SIGTERM'), 0)
})
