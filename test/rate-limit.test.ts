import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { addressKey } from '../src/http/address.ts'
import { createRateLimitStore } from '../src/http/plugins/rate-limit-store.ts'
import { connectRedis } from '../src/redis.ts'
import { identity, needsRedis, startRedis, startRelay, type Env } from './helper.ts'

const silent = { debug () {}, info () {}, warn () {}, error () {} }
const batchOf = (count: number) => ({ method: 'POST', url: '/identify/batch', payload: { identities: Array.from({ length: count }, () => identity()) } })

t.test('a batch counts as many requests as it has identities', async t => {
  const { inject, post, sandbox } = await startRelay(t, { RATE_LIMIT_MAX: '10' })
  t.equal((await inject(batchOf(7))).statusCode, 200)
  const refused = await inject(batchOf(4))
  t.match(refused.json(), { status: 429, code: 'too_many_requests', retryable: true })
  t.match(refused.headers, { 'retry-after': /^\d+$/, 'ratelimit-limit': '10', 'ratelimit-remaining': '0', 'ratelimit-reset': /^\d+$/ })
  t.equal((await post(identity())).statusCode, 200, 'what is refused is not counted, but for the request itself')
  t.equal((await inject(batchOf(1))).statusCode, 200)
  t.equal((await post(identity())).statusCode, 429)
  t.equal(sandbox.ledger.rows().length, 9)
  const never = await (await startRelay(t, { RATE_LIMIT_MAX: '10' })).inject(batchOf(11))
  t.match(never.json(), { status: 400, code: 'invalid_request', errors: [{ pointer: '/identities', detail: /more than 10 items.*RATE_LIMIT_MAX/ }] })
})

t.test('every route but health counts against one limit', async t => {
  const routes: [method: string, url: string, headers?: Env][] = [
    ['GET', '/nope'], ['PUT', '/identify'], ['GET', '/docs'], ['GET', '/docs/swagger-ui.css'], ['GET', '/openapi.json'], ['OPTIONS', '/identify'],
    ['OPTIONS', '/identify', { origin: 'https://app.example.com', 'access-control-request-method': 'POST' }],
    ['POST', '/identify', { origin: 'https://evil.test' }]
  ]
  for (const [method, url, headers = {}] of routes) {
    const { inject } = await startRelay(t, { RATE_LIMIT_MAX: '1', CORS_ORIGINS: 'https://app.example.com' })
    t.not((await inject({ method, url, headers })).statusCode, 429, url)
    const refused = await inject({ method, url, headers })
    t.equal(refused.statusCode, 429, url)
    t.equal(refused.headers['access-control-allow-origin'], headers.origin === 'https://app.example.com' ? headers.origin : undefined, 'a page can read it')
    for (const path of ['/livez', '/readyz', '/healthz']) t.equal((await inject({ url: path })).statusCode, 200)
  }
})

t.test('a clock that is set changes no limit', async t => {
  const { post } = await startRelay(t, { RATE_LIMIT_MAX: '1' })
  t.equal((await post(identity())).statusCode, 200)
  for (const now of [0, 5e12]) {
    const clock = t.capture(Date, 'now', () => now)
    t.equal((await post(identity())).statusCode, 429)
    clock.restore()
  }
  const brief = await startRelay(t, { RATE_LIMIT_MAX: '1', RATE_LIMIT_WINDOW_MS: '200' })
  t.same([(await brief.post(identity())).statusCode, (await brief.post(identity())).statusCode], [200, 429])
  await sleep(250)
  t.equal((await brief.post(identity())).statusCode, 200)
})

t.test('the table of callers is bounded, in count and in what it keeps of each', async t => {
  const store = createRateLimitStore({ max: 2, windowMs: 60_000, log: silent })
  t.equal(store.child({} as never), store, 'all routes share one budget')
  await store.add('first', 2)
  t.match(await store.add('first', 1), { current: 3 })
  for (let caller = 0; caller < 99_999; caller++) await store.add(`caller ${caller}`, 1)
  t.match(await store.add('first', 1), { current: 3 }, 'a hundred thousand are remembered')
  await store.add('one more', 1)
  t.match(await store.add('first', 1), { current: 1 })
  const keys: [ip: string, key: string][] = [
    ['192.0.2.1', '192.0.2.1'], ['192.0.2.1:4000', '192.0.2.1'], ['::ffff:192.0.2.1', '192.0.2.1'], ['[2001:db8::1]:443', '2001:db8::'],
    ['2001:db8::1', '2001:db8::'], ['FE80::1%eth0', 'fe80::'], ['fe80::1%/../x', 'fe80::1%/../x'], ['unknown', 'unknown'], ['', ''], ['x'.repeat(16_000), 'x'.repeat(64)]
  ]
  for (const [ip, key] of keys) t.equal(addressKey(ip), key)
})

t.test('whatever a proxy forwards is a key, and no error', async t => {
  const { inject } = await startRelay(t, { TRUST_PROXY: '10.0.0.0/8', RATE_LIMIT_MAX: '1000' })
  for (const forwarded of ['fe80::1%eth0', '::ffff:1.2.3.4', '1.2.3.4.5', '[::1', 'x'.repeat(10_000), '::1%', '%', '2001:db8::1/64', '"_hidden"', ' , ,']) {
    const answer = await inject({ method: 'POST', url: '/identify', payload: identity(), remoteAddress: '10.1.2.3', headers: { 'x-forwarded-for': forwarded } })
    t.equal(answer.statusCode, 200, forwarded.slice(0, 20))
  }
})

/** How many of some requests that come together get each status. */
async function together (relay: Awaited<ReturnType<typeof startRelay>>, count: number) {
  const statuses = (await Promise.all(Array.from({ length: count }, () => relay.inject({ url: '/nope' })))).map(answer => answer.statusCode)
  return [404, 429].map(status => statuses.filter(one => one === status).length)
}

async function shared (t: Test, env: Env) {
  const redis = await startRedis(t)
  const said: string[] = []
  const connection = await connectRedis(redis.url, silent)
  t.teardown(() => connection.disconnect())
  const relays = await Promise.all([0, 1].map(() => startRelay(t, { REDIS_URL: redis.url, ...env }, {}, connection)))
  return { redis, said, connection, relays: relays as [typeof relays[0], typeof relays[0]] }
}

t.test('with Redis relays count together, batches too; without an answer each goes by its own count', needsRedis, async t => {
  const { redis, relays: [one, other] } = await shared(t, { RATE_LIMIT_MAX: '100' })
  t.same(await together(one, 60), [60, 0])
  t.equal((await other.inject(batchOf(41))).statusCode, 429)
  t.equal((await other.inject(batchOf(39))).statusCode, 200)
  t.same(await together(one, 5), [0, 5])
  redis.child.kill('SIGSTOP')
  // Its own count of this window is 65: it has counted what Redis then refused.
  const since = performance.now()
  t.same(await together(one, 150), [35, 115], 'counted when they came, not when Redis failed to answer')
  t.ok(performance.now() - since < 1500)
  redis.child.kill('SIGCONT')
  const complaints = one.logged().filter(line => line.msg === 'rate limits are not shared')
  t.equal(complaints.length, 1, 'once a minute')
  t.match(complaints[0], { level: 40, cause: /./ })
})

t.test('where Redis refuses, it is told why', needsRedis, async t => {
  const { connection, relays: [relay] } = await shared(t, { RATE_LIMIT_MAX: '3' })
  await connection.config('SET', 'maxmemory', '1')
  t.same(await together(relay, 5), [3, 2])
  t.match(relay.logged().find(line => line.msg === 'rate limits are not shared'), { cause: /OOM/ })
})
