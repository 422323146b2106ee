import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { addressKey } from '#src/http/address.js'
import { createRateLimitStore } from '#src/http/plugins/rate-limit-store.js'
import { connectRedis } from '#src/redis.js'
import { identity, needsRedis, silent, startRedis, startRelay, type Env } from './helper.ts'

const batchOf = (count: number) => ({ method: 'POST', url: '/identify/batch', payload: { identities: Array.from({ length: count }, () => identity()) } })

t.test('the limit counts by address, is told in headers, and is not escaped by forged headers', async t => {
  const { inject, sandbox } = await startRelay(t, { env: { RATE_LIMIT_MAX: '3', RATE_LIMIT_WINDOW_MS: '60000' } })
  const from = (remoteAddress: string, headers: Env = {}, url = '/identify') =>
    inject({ method: 'POST', url, payload: identity(), headers, remoteAddress })
  for (const left of ['2', '1', '0']) {
    const answer = await from('192.0.2.1', { 'x-forwarded-for': `203.0.113.${left}`, 'x-real-ip': '1.1.1.1', forwarded: 'for=9.9.9.9' })
    t.equal(answer.statusCode, 200, `${left} requests are left`)
  }
  const refused = await from('192.0.2.1', { 'x-forwarded-for': '203.0.113.77' })
  t.match(refused.json(), { status: 429, code: 'too_many_requests', retryable: true })
  t.match(refused.headers, { 'retry-after': /^\d+$/, 'ratelimit-limit': '3', 'ratelimit-remaining': '0', 'ratelimit-reset': /^\d+$/ })
  for (const url of ['/nope', '/identify/batch', '/docs', '/openapi.json']) {
    t.equal((await from('192.0.2.1', {}, url)).statusCode, 429, `${url} counts against the same limit`)
  }
  t.equal((await from('192.0.2.1', { origin: 'https://evil.test' })).statusCode, 429, 'a refused origin counts as well')
  t.equal((await from('192.0.2.2')).statusCode, 200, 'another address has its own count')
  for (const host of ['::1', '::2', '::3']) t.equal((await from(`2001:db8:1:1${host}`)).statusCode, 200)
  t.equal((await from('2001:db8:1:1::4')).statusCode, 429, 'IPv6 addresses count by /64')
  t.equal((await from('2001:db8:1:2::1')).statusCode, 200)
  t.equal((await inject({ url: '/livez', remoteAddress: '192.0.2.1' })).statusCode, 200, 'health checks are not counted')
  t.equal(sandbox.requests.length, 8, 'refused requests are not sent')
})

t.test('a flood of addresses frees no caller that is at its limit, and memory is bounded', async t => {
  const store = createRateLimitStore({ max: 2, windowMs: 60_000, log: silent })
  const count = (key: string) => store.countNow(key)
  t.same([count('blocked'), count('blocked'), count('blocked')], [true, true, false])
  t.ok(count('half'))
  for (let address = 0; address < 100_000; address++) count(`address-${address}`)
  t.notOk(count('blocked'), 'the blocked caller stays blocked')
  t.same([count('half'), count('half'), count('half')], [true, true, false], 'a caller below its limit is forgotten in its favour')
  const before = process.memoryUsage().heapUsed
  for (let address = 0; address < 300_000; address++) count(`flood-${address}`)
  const mb = (process.memoryUsage().heapUsed - before) / 1e6
  t.ok(mb < 60, `300,000 more addresses take less than 60 MB, and took ${mb.toFixed()}`)
})

t.test('X-Forwarded-For is believed from TRUST_PROXY alone', async t => {
  const behind = await startRelay(t, { env: { RATE_LIMIT_MAX: '1', TRUST_PROXY: '10.0.0.0/8, 192.0.2.9' } })
  const via = async (remoteAddress: string, client: string) => (await behind.inject({
    method: 'POST', url: '/identify', payload: identity(), headers: { 'x-forwarded-for': client }, remoteAddress
  })).statusCode
  t.equal(await via('10.1.2.3', '203.0.113.1'), 200)
  t.equal(await via('10.1.2.3', '203.0.113.2'), 200, 'behind a trusted proxy each client has its own count')
  t.equal(await via('192.0.2.9', '6.6.6.6, 203.0.113.2'), 429, 'forged addresses to the left do not count')
  t.equal(await via('10.1.2.3', '203.0.113.9:4000'), 200)
  t.equal(await via('10.1.2.3', '203.0.113.9:4001'), 429, 'the port does not matter')
  t.equal(await via('10.1.2.3', '[2001:db8::1]:443'), 200)
  t.equal(await via('10.1.2.3', '[2001:db8::1]'), 429)
  t.equal(behind.logged().filter(line => line.msg === 'X-Forwarded-For not trusted').length, 0)
  t.equal(await via('192.0.2.8', '203.0.113.3'), 200)
  t.equal(await via('192.0.2.8', '203.0.113.4'), 429, 'any other peer is counted by its own address')
  t.match(behind.logged().filter(line => line.msg === 'X-Forwarded-For not trusted'), [{ level: 40, address: '192.0.2.8', hint: /TRUST_PROXY/ }], 'it is logged once')
})

t.test('a batch counts as many requests as it has identities', async t => {
  const { inject, post, sandbox } = await startRelay(t, { env: { RATE_LIMIT_MAX: '10' } })
  t.equal((await inject(batchOf(7))).statusCode, 200)
  const refused = await inject(batchOf(4))
  t.match(refused.json(), { status: 429, code: 'too_many_requests', retryable: true })
  t.match(refused.headers, { 'retry-after': /^\d+$/, 'ratelimit-limit': '10', 'ratelimit-remaining': '0', 'ratelimit-reset': /^\d+$/ })
  t.equal((await post(identity())).statusCode, 200, 'a refused batch counts as one request')
  t.equal((await inject(batchOf(1))).statusCode, 200)
  t.equal((await post(identity())).statusCode, 429)
  t.equal(sandbox.ledger.rows().length, 9)
  const never = await (await startRelay(t, { env: { RATE_LIMIT_MAX: '10' } })).inject(batchOf(11))
  t.match(never.json(), { status: 400, code: 'invalid_request', errors: [{ pointer: '/identities', detail: /more than 10 items.*RATE_LIMIT_MAX/ }] })
})

t.test('all routes but the health checks count against one limit', async t => {
  const routes: [method: string, url: string, headers?: Env][] = [
    ['GET', '/nope'], ['PUT', '/identify'], ['GET', '/docs'], ['GET', '/docs/swagger-ui.css'], ['GET', '/openapi.json'], ['OPTIONS', '/identify'],
    ['OPTIONS', '/identify', { origin: 'https://app.example.com', 'access-control-request-method': 'POST' }],
    ['POST', '/identify', { origin: 'https://evil.test' }]
  ]
  for (const [method, url, headers = {}] of routes) {
    const { inject } = await startRelay(t, { env: { RATE_LIMIT_MAX: '1', CORS_ORIGINS: 'https://app.example.com' } })
    t.not((await inject({ method, url, headers })).statusCode, 429, url)
    const refused = await inject({ method, url, headers })
    t.equal(refused.statusCode, 429, url)
    t.equal(refused.headers['access-control-allow-origin'], headers.origin === 'https://app.example.com' ? headers.origin : undefined, 'a listed page can read the 429')
    for (const path of ['/livez', '/readyz', '/healthz']) t.equal((await inject({ url: path })).statusCode, 200)
  }
})

t.test('a change of the clock changes no limit', async t => {
  const { post } = await startRelay(t, { env: { RATE_LIMIT_MAX: '1' } })
  t.equal((await post(identity())).statusCode, 200)
  for (const now of [0, 5e12]) {
    const clock = t.capture(Date, 'now', () => now)
    t.equal((await post(identity())).statusCode, 429)
    clock.restore()
  }
  const brief = await startRelay(t, { env: { RATE_LIMIT_MAX: '1', RATE_LIMIT_WINDOW_MS: '200' } })
  t.same([(await brief.post(identity())).statusCode, (await brief.post(identity())).statusCode], [200, 429])
  await sleep(250)
  t.equal((await brief.post(identity())).statusCode, 200)
})

t.test('the table of callers is bounded in count and in the length of a key', async t => {
  const store = createRateLimitStore({ max: 2, windowMs: 60_000, log: silent })
  t.equal(store.child({} as never), store, 'all routes share one store')
  await store.add('first', 2)
  for (let caller = 0; caller < 99_999; caller++) store.countNow(`caller ${caller}`)
  t.match(await store.add('first', 0), { current: 2 }, 'a hundred thousand callers are remembered')
  store.countNow('one more')
  t.match(await store.add('first', 1), { current: 1 })
  await store.charge('blocked', 7)
  store.countNow('blocked')
  for (let caller = 0; caller < 99_999; caller++) {
    for (let count = 0; count < 3; count++) store.countNow(`blocked ${caller}`)
  }
  t.match(await store.add('blocked', 1), { current: 8 }, 'a hundred thousand more are remembered at their limit')
  for (let count = 0; count < 3; count++) store.countNow('one more that is blocked')
  t.match(await store.add('blocked', 1), { current: 1 })
  const keys: [ip: string, key: string][] = [
    ['192.0.2.1', '192.0.2.1'], ['192.0.2.1:4000', '192.0.2.1'], ['::ffff:192.0.2.1', '192.0.2.1'], ['[2001:db8::1]:443', '2001:db8::'],
    ['2001:db8::1', '2001:db8::'], ['FE80::1%eth0', 'fe80::'], ['fe80::1%/../x', 'fe80::1%/../x'], ['unknown', 'unknown'], ['', ''], ['x'.repeat(16_000), 'x'.repeat(64)]
  ]
  for (const [ip, key] of keys) t.equal(addressKey(ip), key)
})

t.test('any value of X-Forwarded-For is a key and never an error', async t => {
  const { inject } = await startRelay(t, { env: { TRUST_PROXY: '10.0.0.0/8', RATE_LIMIT_MAX: '1000' } })
  for (const forwarded of ['fe80::1%eth0', '::ffff:1.2.3.4', '1.2.3.4.5', '[::1', 'x'.repeat(10_000), '::1%', '%', '2001:db8::1/64', '"_hidden"', ' , ,']) {
    const answer = await inject({ method: 'POST', url: '/identify', payload: identity(), remoteAddress: '10.1.2.3', headers: { 'x-forwarded-for': forwarded } })
    t.equal(answer.statusCode, 200, forwarded.slice(0, 20))
  }
})

/** Of `count` concurrent requests, how many get 404 and how many 429. */
async function together (relay: Awaited<ReturnType<typeof startRelay>>, count: number) {
  const statuses = (await Promise.all(Array.from({ length: count }, () => relay.inject({ url: '/nope' })))).map(answer => answer.statusCode)
  return [404, 429].map(status => statuses.filter(one => one === status).length)
}

async function shared (t: Test, env: Env) {
  const redis = await startRedis(t)
  const connection = await connectRedis(redis.url, silent)
  t.teardown(() => connection.disconnect())
  const relays = await Promise.all([0, 1].map(() => startRelay(t, { env: { REDIS_URL: redis.url, ...env }, redis: connection })))
  return { redis, connection, relays: relays as [typeof relays[0], typeof relays[0]] }
}

t.test('relays share their counts through Redis, and each uses its own count while Redis does not answer', needsRedis, async t => {
  const { redis, relays: [one, other] } = await shared(t, { RATE_LIMIT_MAX: '100' })
  t.same(await together(one, 60), [60, 0])
  t.equal((await other.inject(batchOf(41))).statusCode, 429)
  t.equal((await other.inject(batchOf(39))).statusCode, 200)
  t.same(await together(one, 5), [0, 5])
  redis.child.kill('SIGSTOP')
  // In this window the relay itself has counted 65 requests.
  const since = performance.now()
  t.same(await together(one, 150), [35, 115], 'a request counts when it arrives, not when Redis fails to answer')
  t.ok(performance.now() - since < 1500, 'the requests do not wait for Redis one after the other')
  redis.child.kill('SIGCONT')
  const warnings = one.logged().filter(line => line.msg === 'rate limit store unavailable')
  t.equal(warnings.length, 1, 'the warning is logged once a minute')
  t.match(warnings[0], { level: 40, cause: /./ })
})

t.test('the log has the cause where Redis refuses a command', needsRedis, async t => {
  const { connection, relays: [relay] } = await shared(t, { RATE_LIMIT_MAX: '3' })
  await connection.config('SET', 'maxmemory', '1')
  t.same(await together(relay, 5), [3, 2])
  t.match(relay.logged().find(line => line.msg === 'rate limit store unavailable'), { cause: /OOM/ })
})
