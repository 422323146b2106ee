import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { mkdirSync, readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { readConfig } from '#src/config.js'
import { buildMetricsApp } from '#src/http/metrics-app.js'
import { createStatus, type StatusSources } from '#src/http/status.js'
import { NO_METRICS, openMetrics } from '#src/metrics.js'
import type { Outbox } from '#src/outbox/outbox.js'
import { connectRedis } from '#src/redis.js'
import { runAdminCommand } from '#src/commands/admin.js'
import {
  emptied, identity, leaks, needsRedis, silent, startRedis, startRelay, startRelayWithOutbox, startSandbox, temporary, TOKEN, type Env
} from './helper.ts'
import { parseMetrics, readMetrics, sum } from './metrics-reader.ts'
import { startServer } from './processes.ts'

/** The relay as a process with METRICS_PORT. */
async function startMeasured (t: Test, sandboxUrl: string, env: Env = {}, isCovered = false) {
  const server = await startServer(t, sandboxUrl, { METRICS_PORT: '0', ...env }, { isCovered })
  const [, metricsUrl] = await server.until(/"url":"([^"]+)","msg":"metrics listening"/) as unknown as [string, string]
  return {
    ...server,
    metricsUrl,
    metrics: () => readMetrics(metricsUrl),
    async status () {
      const answer = await fetch(`${metricsUrl}/status`)
      return { code: answer.status, ...await answer.json() as { reasons: { code: string, since?: string }[], outbox: { waiting: number, oldest: string | null } } }
    }
  }
}

const batchOf = (identities: unknown[]) => ({ method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ identities }) })

t.test('every identity that is received has one outcome, and every queued one has a fate', async t => {
  const sandbox = await startSandbox(t)
  const relay = await startMeasured(t, sandbox.url, { OUTBOX: `file:${temporary(t)}`, MAX_BATCH: '10', DEADLINE_MS: '1000', MIXPANEL_TIMEOUT_MS: '300' }, true)
  let received = 0
  const batch = async (identities: unknown[], query = '') => {
    received += identities.length
    return (await fetch(`${relay.url}/identify/batch${query}`, batchOf(identities))).status
  }
  const single = async (body: unknown) => {
    received++
    return (await relay.post(body)).status
  }
  await Promise.all(Array.from({ length: 30 }, () => single(identity())))
  t.equal(await single({}), 400)
  t.equal(await batch([identity(), {}, identity({ anon_id: 'x' })]), 207)
  t.equal(await batch(Array(3).fill(7)), 400, 'no identity is an object')
  sandbox.faults.add({ name: 'refused', times: 2 })
  t.equal(await single(identity()), 422)
  for (const name of ['edge_down', 'reset', 'wait', 'rate_limited', 'bad_gateway', 'reset_after'] as const) sandbox.faults.add({ name, times: 4, ms: 500 })
  await Promise.all([
    ...Array.from({ length: 60 }, () => single(identity())), batch(Array.from({ length: 50 }, () => identity()))
  ])
  const asked = await fetch(`${relay.url}/identify`, { ...batchOf([]), headers: { 'content-type': 'application/json', prefer: 'respond-async' }, body: JSON.stringify(identity()) })
  received++
  t.equal(asked.status, 202)
  const preview = await fetch(`${relay.url}/identify?dry_run=1`, { ...batchOf([]), body: JSON.stringify(identity()) })
  received++
  t.equal(preview.status, 200)
  sandbox.faults.clear()
  await relay.emptied()
  await sleep(300)
  const metrics = await relay.metrics()
  t.equal(sum(metrics, 'identify_relay_identities_total'), received, 'the sum of all outcomes is what was received')
  const ofOutcome = (outcome: string) => sum(metrics, 'identify_relay_identities_total', { outcome })
  const inOutbox = (outcome: string) => sum(metrics, 'identify_relay_outbox_identities_total', { outcome })
  t.equal(ofOutcome('dry_run'), 1)
  t.equal(sum(metrics, 'identify_relay_identities_total', { code: 'invalid_request' }), 6)
  t.equal(sum(metrics, 'identify_relay_identities_total', { code: 'refused_by_mixpanel' }), 1)
  t.ok(ofOutcome('queued') > 1, 'the faults queue some')
  t.equal(inOutbox('stored'), ofOutcome('queued'))
  t.equal(inOutbox('stored'), inOutbox('delivered') + inOutbox('dead_lettered'), 'what was queued was delivered')
  const merged = sandbox.ledger.rows().filter(({ outcome }) => outcome === 'merged').length
  t.equal(merged, ofOutcome('accepted') + inOutbox('delivered'), 'as the ledger of the sandbox has it')
  t.equal(metrics.get('identify_relay_mixpanel_batch_size_count'), sum(metrics, 'identify_relay_mixpanel_requests_total'))
  t.ok(sum(metrics, 'identify_relay_mixpanel_retries_total') > 0)
  t.equal(await relay.kill('SIGTERM'), 0)
})

t.test('no metric and no status has an id or a secret, and neither is on the public port', async t => {
  const sandbox = await startSandbox(t)
  const key = 'CANARY-KEY-0123456789'
  const relay = await startMeasured(t, sandbox.url, { API_KEYS: `web:${key}`, OUTBOX: `file:${temporary(t)}` })
  const sent = identity({ identified_id: 'CANARY-SECRET-user' })
  const headers = { 'content-type': 'application/json', authorization: `Bearer ${key}` }
  t.equal((await fetch(`${relay.url}/identify`, { method: 'POST', headers, body: JSON.stringify(sent) })).status, 200)
  t.equal((await fetch(`${relay.url}/${sent.anon_id}`, { headers })).status, 404)
  t.equal((await fetch(`${relay.url}/identify`, { method: 'POST', headers: { ...headers, origin: `https://${key}.test` }, body: '{}' })).status, 403)
  for (const path of ['metrics', 'status', 'metrics/', 'status?verbose']) {
    const text = await (await fetch(`${relay.metricsUrl}/${path}`)).text()
    t.same([leaks(text), text.includes(sent.anon_id)], [[], false], path)
  }
  await relay.until(/"status":403,.*"origin":"https:\/\/\*\*\*\.test"/)
  const log = relay.output()
  t.same([leaks(log), log.includes(sent.anon_id)], [[], false], 'nor has the log')
  t.match(log, /"status":404,.*"path":"\/\*\*\*"/)
  for (const path of ['metrics', 'status']) t.equal((await fetch(`${relay.url}/${path}`, { headers })).status, 404, `/${path} on the public port`)
  for (const [method, path] of [['GET', 'identify'], ['POST', 'identify'], ['POST', 'metrics']]) {
    const answer = await fetch(`${relay.metricsUrl}/${path}`, { method: String(method) })
    t.match(await answer.json(), { status: 404, code: 'not_found', detail: 'This port has GET /metrics and GET /status.' })
  }
})

t.test('an outage, and what waits because of it, is on /metrics and /status at once', async t => {
  const sandbox = await startSandbox(t)
  const relay = await startMeasured(t, sandbox.url, { OUTBOX: `file:${temporary(t)}`, MIXPANEL_REGION: 'eu' })
  t.match(await relay.status(), {
    code: 200,
    status: 'ok',
    reasons: [],
    mode: 'original',
    region: 'eu',
    host: /^127\.0\.0\.1:\d+$/,
    endpoint: 'track',
    version: /^\d+\.\d+\.\d+$/,
    config_fingerprint: /^[0-9a-f]{12}$/,
    outbox: { waiting: 0, oldest: null, disk: { free: Number } },
    clock_skew_seconds: null
  })
  sandbox.faults.add({ name: 'edge_down', times: 1000 })
  const before = Date.now()
  for (let count = 0; count < 6; count++) t.equal((await relay.post()).status, 202)
  await relay.until(/"code":"mixpanel_unreachable","cause":"status 503","count":1,"msg":"breaker opened"/)
  const { code, reasons, outbox } = await relay.status()
  t.equal(code, 503)
  t.same(reasons.map(reason => reason.code), ['mixpanel_unavailable'])
  t.ok(Math.abs(Date.parse(String(reasons[0]?.since)) - before) < 5000)
  t.equal(outbox.waiting, 6)
  t.ok(Math.abs(Date.parse(String(outbox.oldest)) - before) < 5000)
  await sleep(1200)
  const during = await relay.metrics()
  const valueOf = (name: string) => during.get(`identify_relay_${name}`)
  t.same([valueOf('breaker_open'), valueOf('outbox_waiting'), valueOf('degraded')], [1, 6, 1])
  t.ok(Number(valueOf('outbox_oldest_seconds')) >= 1 && Number(valueOf('mixpanel_failing_seconds')) >= 1)
  sandbox.faults.clear()
  await relay.emptied()
  await relay.until(/"code":"accepted","since":"[^"]+","count":1,"msg":"breaker closed"/)
  t.match(await relay.status(), { code: 200, status: 'ok', outbox: { waiting: 0 } })
  const after = await relay.metrics()
  t.equal(sum(after, 'identify_relay_outbox_identities_total', { outcome: 'delivered' }), 6)
  t.equal(after.get('identify_relay_breaker_open'), 0)
  t.equal(sum(after, 'identify_relay_breaker_transitions_total', { to: 'closed' }), 1)
})

t.test('prom-client is loaded only with METRICS_PORT', async t => {
  const sandbox = await startSandbox(t)
  for (const env of [{}, { METRICS_PORT: '0' }]) {
    const directory = temporary(t)
    const server = await startServer(t, sandbox.url, { ...env, NODE_V8_COVERAGE: directory })
    t.equal((await server.post()).status, 200)
    t.equal(await server.kill('SIGTERM'), 0)
    const loaded = readdirSync(directory).map(name => readFileSync(join(directory, name), 'utf8')).join()
    t.match(loaded, 'node_modules/fastify')
    t.equal(loaded.includes('node_modules/prom-client'), 'METRICS_PORT' in env)
    t.equal(loaded.includes('http/status.js'), 'METRICS_PORT' in env)
  }
})

t.test('a METRICS_PORT in use is exit 1 and a sentence', async t => {
  const sandbox = await startSandbox(t)
  const first = await startMeasured(t, sandbox.url)
  const second = startServer(t, sandbox.url, { METRICS_PORT: new URL(first.metricsUrl).port })
  await t.rejects(second, /exited before.*The relay cannot continue: listen EADDRINUSE/s)
})

const version = '1.2.3'

/** The metrics app over given facts. */
async function startApp (t: Test, given: Partial<StatusSources> = {}, env: Env = {}) {
  const sources: StatusSources = {
    config: readConfig({ MIXPANEL_TOKEN: TOKEN, ...env }, () => ''),
    version,
    relay: { state: () => ({ in_flight: 0, id_merge: 'original', mixpanel: 'asked', last_verdict: null }), failingSince: () => undefined, clockSkew: () => 3 } as never,
    secrets: () => [],
    droppedLogLines: () => 7,
    load: () => ({ connections: 1, bytes_in_flight: 2 }),
    isShuttingDown: () => false,
    ...given
  }
  const metrics = await openMetrics(version)
  const app = buildMetricsApp({ metrics, status: createStatus(sources) })
  t.teardown(() => app.close())
  const reasons = async () => {
    const { statusCode, payload } = await app.inject('/status')
    const { reasons } = JSON.parse(payload) as { reasons: { code: string, detail: string }[] }
    t.equal(statusCode, reasons.length > 0 ? 503 : 200)
    return reasons
  }
  return { app, metrics, reasons }
}

/** A relay whose outbox is in this state. */
const withOutbox = (outbox: object, store: Partial<Outbox> = {}): Partial<StatusSources> => {
  const counts = { waiting: 0, dead: 0, bytes: 0, paused: false, ...outbox }
  return {
    relay: { state: () => ({ in_flight: 0, mixpanel: 'asked', last_verdict: null, outbox: counts }), failingSince: () => undefined, clockSkew: () => undefined } as never,
    outbox: { waiting: async () => [], disk: async () => undefined, counts: () => counts, ...store } as never
  }
}

t.test('/status says why the relay is degraded', async t => {
  const now = Date.now()
  const oldest = (seconds: number) => ({ waiting: async () => [{ id: '1', event: { time: now / 1000 - seconds } }] as never })
  const disk = (free: number, size = 1e12) => ({ disk: async () => ({ free, size }) })
  const cases: [code: string | undefined, given: Partial<StatusSources>, detail?: RegExp][] = [
    [undefined, {}],
    ['shutting_down', { isShuttingDown: () => true }],
    ['mixpanel_failing', { relay: { state: () => ({ in_flight: 0, mixpanel: 'asked', last_verdict: { code: 'mixpanel_rejected_credentials' } }), failingSince: () => new Date(), clockSkew: () => 1 } as never }, /mixpanel_rejected_credentials/],
    [undefined, withOutbox({ waiting: 1 }, oldest(290))],
    ['outbox_delayed', withOutbox({ waiting: 1 }, oldest(310)), /^The oldest of 1 queued identities waits for more than 300 s\.$/],
    ['outbox_delayed', withOutbox({ waiting: 1, paused: true }, oldest(310)), /an operator has paused/],
    [undefined, withOutbox({ waiting: 0 }, oldest(310))],
    [undefined, withOutbox({ waiting: 450_000, dead: 450_000, bytes: 900_000_000 })],
    ['outbox_nearly_full', withOutbox({ waiting: 450_000, dead: 450_001 })],
    ['outbox_nearly_full', withOutbox({ bytes: 970_000_000 })],
    ['outbox_unavailable', withOutbox({ unavailable_since: '2026-01-01T00:00:00.000Z', waits_for: 'disk' }), /waits for its disk/],
    ['outbox_rejecting', withOutbox({ rejecting_since: '2026-01-01T00:00:00.000Z' })],
    [undefined, withOutbox({}, disk(70_000_000))],
    ['disk_nearly_full', withOutbox({}, disk(60_000_000))],
    [undefined, withOutbox({}, disk(30_000_000, 100_000_000))],
    ['disk_nearly_full', withOutbox({}, disk(10_000_000, 100_000_000))],
    ['mixpanel_unavailable', { relay: { state: () => ({ in_flight: 0, mixpanel: 'unavailable', mixpanel_unavailable_since: '2026-01-01T00:00:00.000Z', last_verdict: { code: 'mixpanel_timed_out' } }), failingSince: () => new Date(), clockSkew: () => 1 } as never }, /only probes: mixpanel_timed_out/],
    ['redis_away', { redis: () => ({ since: new Date(), cause: 'ECONNREFUSED' }) }, /Redis is away: ECONNREFUSED/],
    [undefined, { redis: () => undefined }],
    ['secret_file_unusable', { secrets: () => [{ variable: 'API_KEYS', readAt: new Date(), problem: 'it is empty' }] }, /API_KEYS_FILE: it is empty/],
    ['jwks_stale', { jwks: () => 'stale' }],
    [undefined, { jwks: () => 'current' }],
    [undefined, { relay: { state: () => ({ in_flight: 0, mixpanel: 'asked', last_verdict: null }), failingSince: () => undefined, clockSkew: () => undefined } as never }]
  ]
  for (const [code, given, detail] of cases) {
    const { reasons, app } = await startApp(t, given, { OUTBOX: given.outbox === undefined ? 'off' : 'file:/x' })
    const found = await reasons()
    t.same(found.map(reason => reason.code), code === undefined ? [] : [code])
    if (detail !== undefined) t.match(found[0]?.detail, detail)
    const text = (await app.inject('/metrics')).payload
    t.match(text, `identify_relay_degraded ${found.length}`)
    t.match(text, 'identify_relay_log_lines_dropped_total 7')
  }
})

t.test('an outbox that does not answer holds up no report, and is asked once at a time', async t => {
  let asked = 0
  const never = () => { asked++; return new Promise<never>(() => {}) }
  const { reasons } = await startApp(t, withOutbox({ waiting: 5 }, { waiting: never }))
  const since = performance.now()
  t.same(await reasons(), [])
  t.ok(performance.now() - since < 2000)
  await sleep(300)
  await reasons()
  t.equal(asked, 1)
  const failing = await startApp(t, withOutbox({ waiting: 5 }, { waiting: async () => { throw new Error('a broken store') } }))
  t.same(await failing.reasons(), [])
})

t.test('scrapes that come together share one rendering', async t => {
  let rendered = 0
  const { app } = await startApp(t, { droppedLogLines: () => ++rendered })
  const answers = await Promise.all(Array.from({ length: 100 }, () => app.inject('/metrics')))
  t.same(new Set(answers.map(({ statusCode }) => statusCode)), new Set([200]))
  t.equal(rendered, 1)
  await sleep(300)
  await app.inject('/metrics')
  t.equal(rendered, 2)
})

t.test('silent connections do not keep Prometheus out', async t => {
  const { app } = await startApp(t)
  const url = new URL(await app.listen({ host: '127.0.0.1', port: 0 }))
  const silentOnes = Array.from({ length: 64 }, () => connect(Number(url.port), '127.0.0.1'))
  t.teardown(() => { for (const socket of silentOnes) socket.destroy() })
  for (const socket of silentOnes) socket.on('error', () => {})
  await Promise.all(silentOnes.map(socket => once(socket, 'connect')))
  const closed = silentOnes.map(socket => once(socket.resume(), 'close'))
  t.equal((await fetch(`${url.href}metrics`)).status, 200)
  await closed[0]
  t.equal(silentOnes.filter(socket => socket.destroyed).length, 1, 'the oldest one makes room')
  silentOnes[1]?.write('GET /metrics HTTP/1.1\r\n')
  await Promise.all(closed)
  t.equal((await fetch(`${url.href}metrics`)).status, 200)
})

t.test('every counter counts, and does nothing without METRICS_PORT', async t => {
  const { app, metrics } = await startApp(t)
  metrics.identities('failed', 'overloaded', 3)
  metrics.request('POST', '/identify', 200, 20)
  metrics.rateLimited('user')
  metrics.mixpanelRequest('accepted', 20, 7)
  metrics.retry()
  metrics.breaker('open')
  metrics.outbox('stored', 'late', 2)
  metrics.mergeGuard('MAX_ANON_PER_USER', 'warned')
  metrics.secretReload('API_KEYS', 'used')
  const series = parseMetrics((await app.inject('/metrics')).payload)
  const expected = {
    'identities_total{outcome="failed",code="overloaded"}': 3,
    'http_requests_total{method="POST",route="/identify",status="200"}': 1,
    'rate_limited_total{caller="user"}': 1,
    'mixpanel_requests_total{code="accepted"}': 1,
    mixpanel_batch_size_sum: 7,
    mixpanel_retries_total: 1,
    'breaker_transitions_total{to="open"}': 1,
    'outbox_identities_total{outcome="stored",reason="late"}': 2,
    'merge_guard_total{rule="MAX_ANON_PER_USER",action="warned"}': 1,
    'secret_reloads_total{variable="API_KEYS",result="used"}': 1,
    'http_request_duration_seconds_bucket{le="0.025",route="/identify"}': 1,
    'http_request_duration_seconds_bucket{le="0.01",route="/identify"}': 0,
    mixpanel_request_duration_seconds_sum: 0.02
  }
  for (const [name, value] of Object.entries(expected)) t.equal(series.get(`identify_relay_${name}`), value, name)
  t.equal(series.get('identify_relay_identities_total{outcome="failed",code="internal"}'), 0, 'a rate has a first value')
  t.ok(Number(series.get('process_resident_memory_bytes')) > 1e6)
  for (const count of Object.values(NO_METRICS)) t.equal((count as () => void)(), undefined)
  t.match((await app.inject('/')).json(), { status: 404, code: 'not_found' })
})

t.test('what is away is on /readyz?verbose, whatever uses it', async t => {
  const redis = await connectRedis('redis://127.0.0.1:9', silent, { isRequired: false })
  t.teardown(() => redis.disconnect())
  const { inject } = await startRelay(t, { redis })
  t.match((await inject({ url: '/readyz?verbose' })).json().parts, { redis: { state: 'away', since: String, cause: 'ECONNREFUSED' } })
  const connected = await startRelay(t, { redis: { defineCommand () {} } as never })
  t.match((await connected.inject({ url: '/readyz?verbose' })).json().parts, { redis: { state: 'connected' } })
  const relay = await startRelayWithOutbox(t, { env: { OUTBOX_MAX_BYTES: '1' } })
  const away = { prefer: 'respond-async' }
  t.match((await relay.post(identity(), { headers: away })).json(), { status: 503, code: 'overloaded', detail: /^The outbox is full/ })
  t.match(relay.relay.state().outbox, { rejecting_since: String })
  relay.outbox.outage = () => ({ part: 'disk', since: new Date(0) })
  relay.outbox.put = async () => 'unknown'
  relay.outbox.has = () => 'unknown'
  t.match(relay.relay.state().outbox, { unavailable_since: '1970-01-01T00:00:00.000Z', waits_for: 'disk' })
  for (const headers of [away, {}]) {
    t.match((await relay.post(identity(), { headers })).json(), { status: 503, detail: /The outbox waits for its disk since 1970-01-01T00:00:00\.000Z\.$/ })
  }
})

t.test('Redis away is on /status, /readyz?verbose, in the log and in the detail of an answer, with its part and time', needsRedis, async t => {
  const sandbox = await startSandbox(t)
  const redis = await startRedis(t)
  const relay = await startMeasured(t, sandbox.url, { REDIS_URL: redis.url, OUTBOX: 'redis' })
  t.equal((await relay.post()).status, 200)
  t.equal((await relay.metrics()).get('identify_relay_redis_up'), 1)
  const before = Date.now()
  redis.child.kill('SIGKILL')
  await relay.until(/"since":"[^"]+","uses":\["rate limits","outbox"\],"count":1,"msg":"Redis connection lost"/)
  const refused = await (await relay.post()).json() as { code: string, detail: string }
  t.match(refused, { code: 'overloaded', detail: /The outbox waits for its Redis since 20\d\d-[\d-]+T[\d:.]+Z\.$/ })
  t.match(await relay.status(), { code: 503, reasons: [{ code: 'outbox_unavailable', detail: /Redis/ }, { code: 'redis_away' }] })
  await relay.until(/"cause":"Redis is away"/)
  t.notMatch(relay.output(), /enableOfflineQueue|max retries/)
  const { parts } = await (await fetch(`${relay.url}/readyz?verbose`)).json() as { parts: { redis: { state: string, since: string } } }
  t.match(parts, { redis: { state: 'away', cause: String }, outbox: { waits_for: 'Redis' } })
  t.ok(Math.abs(Date.parse(parts.redis.since) - before) < 3000)
  t.equal((await relay.metrics()).get('identify_relay_redis_up'), 0)
  await startRedis(t, { port: redis.port, dir: redis.dir })
  await relay.until(/"msg":"Redis connection restored"/)
  await sleep(300)
  t.match(await relay.status(), { code: 200, redis: 'connected' })
  t.equal((await relay.post()).status, 200)
})

t.test('a Redis that is down at start stops no relay that uses it for limits alone', needsRedis, async t => {
  const sandbox = await startSandbox(t)
  const redis = await startRedis(t)
  redis.child.kill('SIGKILL')
  await redis.exit
  const env = { REDIS_URL: redis.url, RATE_LIMIT_MAX: '3' }
  const relay = await startMeasured(t, sandbox.url, env)
  t.match(relay.output(), /"cause":"ECONNREFUSED","since":"[^"]+","uses":\["rate limits"\],"count":1,"msg":"Redis connection lost"/)
  const statuses = async () => [(await relay.post()).status, (await relay.post()).status]
  t.same(await statuses(), [200, 200], 'it counts alone')
  t.match(await relay.status(), { code: 503, reasons: [{ code: 'redis_away' }] })
  await startRedis(t, { port: redis.port, dir: redis.dir })
  await relay.until(/"msg":"Redis connection restored"/)
  await sleep(300)
  t.match(await relay.status(), { code: 200 })
  t.same(await statuses(), [200, 200], 'and then with the others')
  t.same(await statuses(), [200, 429])
  t.equal(sum(await relay.metrics(), 'identify_relay_rate_limited_total', { caller: 'anonymous' }), 1)
})

t.test('a Redis that refuses a relay is a mistake, also where limits alone use it', needsRedis, async t => {
  const { port } = await startRedis(t, { more: ['--requirepass', 'right'] })
  const log = { ...silent, warn: () => t.fail('it is no outage') }
  await t.rejects(connectRedis(`redis://:CANARY-SECRET@127.0.0.1:${port}`, log, { isRequired: false }), { message: /^REDIS_URL: Redis cannot be reached \(WRONGPASS [^)]*\)$/ })
})

t.test('what operators do to the outbox is counted, and so is what has disappeared', async t => {
  const counts: unknown[] = []
  const metrics = { ...NO_METRICS, outbox: (...args: unknown[]) => { counts.push(args) } }
  const relay = await startRelayWithOutbox(t, { metrics, env: { DEAD_LETTER_DAYS: '1' } })
  relay.sandbox.faults.add({ name: 'refused', times: 4 })
  const post = (body = identity()) => relay.post(body, { headers: { prefer: 'respond-async' } })
  await post()
  await post()
  await emptied(relay)
  await sleep(50)
  const admin = async (...args: string[]) => {
    for await (const text of runAdminCommand(relay.outbox, relay.config, args, metrics)) t.type(text, 'string')
  }
  const [first] = await relay.outbox.dead(1)
  await admin('replay', String(first?.id))
  await emptied(relay)
  await admin('drop', 'all')
  await admin('pause')
  const user = randomUUID()
  await post(identity({ identified_id: user }))
  await admin('drop', '--user', user)
  t.match(counts, [
    ['stored', 'respond_async'], ['stored', 'respond_async'], ['dead_lettered', 'refused_by_mixpanel'], ['dead_lettered', 'refused_by_mixpanel'],
    ['replayed', 'operator', 1], ['delivered', 'accepted', 1], ['dropped', 'operator', 1], ['stored', 'respond_async'], ['erased', 'operator', 1], ['dropped', 'operator', 0]
  ])
  t.match(relay.logged().find(line => line.msg === 'identities dead-lettered'), { reasons: ['event, invalid'] })
})

t.test('files of secrets have an age, and a broken one is on /status', async t => {
  const sandbox = await startSandbox(t)
  const directory = temporary(t)
  mkdirSync(join(directory, 'run'))
  const path = join(directory, 'run', 'token')
  writeFileSync(path, TOKEN)
  const relay = await startServer(t, sandbox.url, {
    MIXPANEL_TOKEN: '', MIXPANEL_TOKEN_FILE: path, METRICS_PORT: '0', METRICS_HOST: '127.0.0.1', REDIS_URL: 'redis://127.0.0.1:9', JWT_SECRET: 's'.repeat(32), OUTBOX: `file:${directory}/outbox`
  }, { isCovered: true })
  const [, url] = await relay.until(/"url":"([^"]+)","msg":"metrics listening"/) as unknown as [string, string]
  t.match(await (await fetch(`${url}/status`)).json(), { secrets: [{ variable: 'MIXPANEL_TOKEN', age_seconds: Number, problem: null }], redis: 'away' })
  truncateSync(path)
  await relay.until(/secret file unusable/)
  t.match(await (await fetch(`${url}/status`)).json(), { status: 'degraded', reasons: [{ code: 'redis_away' }, { code: 'secret_file_unusable' }] })
  writeFileSync(path, `${TOKEN}2`)
  await relay.until(/secret reloaded/)
  await relay.until(/"msg":"outbox bound to earlier token"/)
  await sleep(300)
  t.match(await (await fetch(`${url}/status`)).json(), { reasons: [{ code: 'redis_away' }] })
  const metrics = await readMetrics(url)
  for (const result of ['used', 'refused']) t.equal(metrics.get(`identify_relay_secret_reloads_total{variable="MIXPANEL_TOKEN",result="${result}"}`), 1)
  t.ok(Number(metrics.get('identify_relay_secret_age_seconds{variable="MIXPANEL_TOKEN"}')) < 10)
  t.equal(await relay.kill('SIGTERM'), 0)
})
