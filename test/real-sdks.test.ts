import { setTimeout as sleep } from 'node:timers/promises'
import Mixpanel from 'mixpanel'
import type { Browser, Page } from 'playwright-core'
import { t, type Test } from 'tap'
import { launchChromium, needsChromium, WAIT_MS } from './chromium.ts'
import { freePort, startSandbox, temporary, TOKEN, type Env } from './helper.ts'
import { startProcess, startServer } from './processes.ts'

// The SDKs are those of npm, unmodified.

let browser: Browser

t.before(async () => { browser = await launchChromium(t) as Browser })

interface Row { event: unknown, properties: Record<string, unknown>, outcome: string }
type Server = Awaited<ReturnType<typeof startServer>>

/** The relay as a process in front of a sandbox, with examples/browser on an origin that it lists and on a foreign one. */
async function start (t: Test, env: Env = {}, relayPort = '0') {
  const sandbox = await startSandbox(t)
  const port = String(await freePort())
  const settings = { COMPAT: 'events', PORT: relayPort, CORS_ORIGINS: `http://127.0.0.1:${port}`, ...env }
  const relay = await startServer(t, sandbox.url, settings)
  const [origin, foreign] = await Promise.all([port, '0'].map(async PORT => {
    const { until } = startProcess(t, 'examples/browser/serve.js', [], { PORT, RELAY_URL: relay.url })
    return String((await until(/Open (\S+) for/))[1])
  })) as [string, string]
  const rows = () => sandbox.ledger.rows() as readonly Row[]
  /** Resolves with the events that `isWanted` once there are `count`. */
  async function until (isWanted: (row: Row) => boolean, what: string, count = 1): Promise<Row[]> {
    for (const end = Date.now() + WAIT_MS; Date.now() < end; await sleep(50)) {
      const found = rows().filter(isWanted)
      if (found.length >= count) return found
    }
    throw new Error(`${count} of ${what} have not arrived: ${JSON.stringify(rows())} ${relay.output().slice(-2000)}`)
  }
  /** Resolves with the events of one name once there are `count`. */
  const arrived = (name: string, count?: number) => until(({ event }) => event === name, name, count)
  /** Resolves with the identities of one user. They travel apart from the events of a request, so either may arrive first. */
  const merged = (userId: string) => until(({ event, properties }) => event === '$identify' && properties.distinct_id === userId, `identities of ${userId}`)
  const restart = () => startServer(t, sandbox.url, settings)
  return { sandbox, relay, origin, foreign, rows, arrived, merged, restart }
}

/** The log lines of requests to /track. */
const lines = (relay: Server) => relay.output().split('\n').filter(line => line.includes('"route":"/track"') && !line.includes('"OPTIONS"')).map(line => JSON.parse(line) as { status: number, method: string, events: number, refused: number })

async function requests (relay: Server, count: number) {
  for (const end = Date.now() + WAIT_MS; Date.now() < end && lines(relay).length < count; await sleep(50));
  return lines(relay)
}

declare const mixpanel: {
  init (token: string, config: object): void
  track (name: string, properties?: object, callback?: (answer: unknown) => void): void
  identify (id: unknown): void
  alias (id: unknown): void
  reset (): void
  get_distinct_id (): string
}
declare const submit: (method: string, url: string) => void

/** A page with the SDK of the browser, on an origin of its own profile. */
async function open (t: Test, origin: string, relayUrl: string, config: object = {}, token = 'dummy', context?: Awaited<ReturnType<Browser['newContext']>>): Promise<Page> {
  const profile = context ?? await browser.newContext()
  if (context === undefined) t.teardown(() => profile.close())
  profile.setDefaultTimeout(WAIT_MS)
  const page = await profile.newPage()
  page.on('pageerror', error => t.fail(`an error in the page: ${error.message}`))
  await page.goto(`${origin}/config.json`)
  await load(page, relayUrl, config, token)
  return page
}

const load = (page: Page, relayUrl: string, config: object, token = 'dummy') => page.evaluate(async ({ relayUrl, config, token }) => {
  const { default: sdk } = await import(`${'/mixpanel.module.js'}`)
  Object.assign(globalThis, { mixpanel: sdk })
  mixpanel.init(token, { api_host: relayUrl, persistence: 'localStorage', autocapture: false, track_pageview: false, record_sessions_percent: 0, batch_flush_interval_ms: 200, ...config })
}, { relayUrl, config, token })

/** Resolves with the answer that the SDK gives to its callback. */
const trackIn = (page: Page, name: string) => page.evaluate(name => new Promise(resolve => mixpanel.track(name, {}, resolve)), name)

t.test('the JavaScript SDK sends what it tracks and identifies through the relay, in each of its forms', needsChromium, async t => {
  const { relay, origin, arrived, merged } = await start(t)
  const forms: [name: string, config: object][] = [
    ['queue', {}], ['queue of JSON', { api_payload_format: 'json' }], ['at once', { batch_requests: false }], ['at once, verbose', { batch_requests: false, verbose: true }],
    ['GET', { batch_requests: false, api_method: 'GET' }], ['no address', { ip: false }], ['no token', { property_blacklist: ['token'] }], ['own headers', { xhr_headers: { 'x-own': '1' } }]
  ]
  for (const [name, config] of forms) {
    const page = await open(t, origin, relay.url, config)
    const text = '\u{1F600} a+b&c%20d "\\ é\n'
    const device = await page.evaluate(({ name, text }) => {
      const id = mixpanel.get_distinct_id()
      mixpanel.track(`before ${name}`, { text, cut: `${'x'.repeat(254)}\u{1F600}` })
      mixpanel.identify(`user of ${name}`)
      mixpanel.track(`after ${name}`)
      return id
    }, { name, text })
    const [before] = await arrived(`before ${name}`)
    t.match(before?.properties, { text, distinct_id: device, $insert_id: String, time: Number }, name)
    await arrived(`after ${name}`)
    t.match((await merged(`user of ${name}`))[0], { outcome: 'merged', properties: { $anon_distinct_id: device } }, name)
    t.equal('ip' in before!.properties, name !== 'no address')
  }
  t.ok(lines(relay).every(({ status, refused }) => status === 200 && refused === 0))
  const verbose = await open(t, origin, relay.url, { batch_requests: false, verbose: true })
  t.same(await trackIn(verbose, 'asked'), { error: null, status: 1 })
  const plain = await open(t, origin, relay.url, { batch_requests: false })
  t.equal(await trackIn(plain, 'asked'), 1)
})

t.test('the JavaScript SDK merges no junk, no previous user, and reads why', needsChromium, async t => {
  const { relay, origin, rows, arrived, merged } = await start(t)
  for (const id of ['null', '0', 7, { a: 1 }, 'anonymous']) {
    const page = await open(t, origin, relay.url)
    await page.evaluate(id => { mixpanel.identify(id); mixpanel.track('after junk') }, id)
    await arrived('after junk')
    await page.close()
  }
  const page = await open(t, origin, relay.url)
  await page.evaluate(() => { mixpanel.identify('first'); mixpanel.identify('second'); mixpanel.track('after a second user') })
  await arrived('after a second user')
  await page.evaluate(() => { mixpanel.reset(); mixpanel.identify('third'); mixpanel.alias('fourth'); mixpanel.track('after a reset') })
  await arrived('after a reset')
  await merged('third')
  t.same(rows().filter(({ event }) => event === '$identify').map(({ properties }) => properties.distinct_id).sort(), ['first', 'third'])
  t.ok(lines(relay).some(({ refused }) => refused > 0))
})

t.test('the JavaScript SDK keeps its queue through an outage of Mixpanel, and nothing arrives twice', needsChromium, async t => {
  const { relay, sandbox, origin, rows, arrived } = await start(t, { DEADLINE_MS: '500' })
  sandbox.faults.add({ name: 'edge_down', times: 1_000_000 })
  const page = await open(t, origin, relay.url)
  await page.evaluate(() => { for (let index = 0; index < 120; index++) mixpanel.track('in an outage', { index }) })
  t.equal((await requests(relay, 2)).at(-1)?.status, 503)
  sandbox.faults.clear()
  await arrived('in an outage', 120)
  const ids = rows().filter(({ event }) => event === 'in an outage').map(({ properties }) => `${properties.index} ${properties.$insert_id}`)
  t.equal(new Set(ids).size, 120)

  const stored = await start(t, { DEADLINE_MS: '500', OUTBOX: `file:${temporary(t)}/outbox` })
  stored.sandbox.faults.add({ name: 'edge_down', times: 1_000_000 })
  const other = await open(t, stored.origin, stored.relay.url)
  await other.evaluate(() => { mixpanel.identify('user-42'); for (let index = 0; index < 120; index++) mixpanel.track('in an outage', { index }) })
  for (const end = Date.now() + WAIT_MS; Date.now() < end && (await stored.relay.parts()).outbox.waiting < 121;) await sleep(50)
  t.ok(lines(stored.relay).every(({ status }) => status === 200), 'with an outbox the SDK does not notice')
  await stored.relay.kill('SIGKILL')
  stored.sandbox.faults.clear()
  await stored.restart()
  await stored.arrived('in an outage', 120)
  t.match(await stored.arrived('$identify'), [{ outcome: 'merged' }])
  t.equal(stored.rows().length, 121)
})

t.test('a page that unloads sends a beacon, and its queue again on the next page, where it is known', needsChromium, async t => {
  const { relay, sandbox, origin, rows, arrived } = await start(t)
  // What another page has left in the queue is sent after twice the interval.
  const page = await open(t, origin, relay.url, { batch_flush_interval_ms: 3000 })
  await page.evaluate(() => mixpanel.track('on unload'))
  await page.goto(`${origin}/config.json`)
  const [first] = await arrived('on unload')
  t.match(sandbox.ledger.deduplicated().length, 1)
  await load(page, relay.url, {})
  const both = await arrived('on unload', 2)
  t.same(both[1]?.properties.$insert_id, first?.properties.$insert_id)
  t.same(both[1]?.properties.time, first?.properties.time)
  t.equal(sandbox.ledger.deduplicated().length, 1, 'Mixpanel counts it once')
  t.equal(rows().length, 2)

  const closed = await start(t, { API_KEYS: 'CANARY-KEY-of-a-service' })
  const stranger = await open(t, closed.origin, closed.relay.url, { batch_flush_interval_ms: 3000 })
  await stranger.evaluate(() => mixpanel.track('without a key'))
  await stranger.goto(`${closed.origin}/config.json`)
  t.match(await requests(closed.relay, 1), [{ status: 401 }], 'a beacon carries no key')
  await load(stranger, closed.relay.url, { xhr_headers: { authorization: 'Bearer CANARY-KEY-of-a-service' } })
  await closed.arrived('without a key')
})

t.test('a page on a foreign origin reaches Mixpanel in no way', needsChromium, async t => {
  const { relay, sandbox, foreign } = await start(t)
  const page = await open(t, foreign, relay.url, { batch_requests: false })
  t.equal(await trackIn(page, 'foreign'), 0)
  const merge = Buffer.from(JSON.stringify({ event: '$identify', properties: { distinct_id: 'u', $anon_distinct_id: '5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11' } })).toString('base64url')
  const url = `${relay.url}/track?data=${merge}`
  let count = (await requests(relay, 1)).length
  const ways: [name: string, way: (url: string) => unknown][] = [
    ['an image', url => { Object.assign(globalThis, { image: Object.assign(new (globalThis as unknown as { Image: new () => object }).Image(), { src: url, referrerPolicy: 'no-referrer' }) }) }],
    ['a pixel', url => { Object.assign(globalThis, { image: Object.assign(new (globalThis as unknown as { Image: new () => object }).Image(), { src: `${url}&img=1` }) }) }],
    ['a fetch without CORS', url => { fetch(url, { mode: 'no-cors', referrerPolicy: 'no-referrer' }).catch(() => {}) }],
    ['a fetch', url => { fetch(url).catch(() => {}) }],
    ['a beacon', url => { (globalThis as unknown as { navigator: { sendBeacon (url: string): void } }).navigator.sendBeacon(url) }],
    ['a form', url => { submit('post', url) }],
    ['a form with GET', url => { submit('get', url) }],
    ['a link', url => { (globalThis as unknown as { location: { href: string } }).location.href = url }]
  ]
  const submitting = `function submit (method, url) {
    const form = document.body.appendChild(document.createElement('form'))
    Object.assign(form, { method, action: url })
    Object.assign(form.appendChild(document.createElement('input')), { name: 'data', value: '${merge}' })
    form.submit()
  }`
  for (const [name, way] of ways) {
    await page.goto(`${foreign}/config.json`)
    await page.evaluate(`(() => { ${submitting}; (${String(way)})(${JSON.stringify(url)}) })()`)
    t.match((await requests(relay, ++count)).at(-1), { status: 403 }, name)
  }
  await page.goto('about:blank')
  await page.goto(url, { referer: 'http://127.0.0.1/' }).catch(() => {})
  t.match((await requests(relay, ++count)).at(-1), { status: 403 }, 'an address that is opened')
  t.same(sandbox.requests, [], 'Mixpanel got nothing')
})

t.test('an old queue with another token arrives, under the token of the relay', needsChromium, async t => {
  const { relay, sandbox, origin, arrived } = await start(t)
  const token = 'a'.repeat(32)
  const context = await browser.newContext()
  t.teardown(() => context.close())
  const page = await open(t, origin, relay.url, { batch_flush_interval_ms: 3000 }, token, context)
  await page.evaluate(() => mixpanel.track('from the old queue'))
  await page.close()
  await open(t, origin, relay.url, {}, token, context)
  await arrived('from the old queue')
  t.ok(sandbox.requests.every(({ body }) => !body.includes(token) && body.includes(encodeURIComponent(TOKEN))))
  await relay.until(/"msg":"events with the token of another project"/)
})

t.test('the page of the SDK in examples/browser signs in and out through the relay', needsChromium, async t => {
  const { relay, origin, rows, arrived } = await start(t)
  const context = await browser.newContext()
  t.teardown(() => context.close())
  context.setDefaultTimeout(WAIT_MS)
  const page = await context.newPage()
  await page.goto(`${origin}/sdk.html`)
  await page.click('#track')
  await page.waitForFunction('document.getElementById("answer").value.includes(\'"status":1\')')
  await page.click('text=Sign in')
  await arrived('Sign in')
  await page.click('#sign-out')
  t.match(await page.evaluate('document.getElementById("id").value'), /^\$device:/)
  t.match((await arrived('$identify'))[0], { outcome: 'merged', properties: { distinct_id: 'user-42' } })
  t.ok(rows().length >= 3 && lines(relay).every(({ status }) => status === 200))
})

/** Calls the SDK for Node. Resolves with the error that it gives to its callback. */
const call = (work: (callback: (error: unknown) => void) => void) => new Promise<unknown>(resolve => work(error => resolve(error ?? undefined)))

t.test('the SDK for Node sends single events and batches, and reads success and failure', async t => {
  const sandbox = await startSandbox(t)
  const relay = await startServer(t, sandbox.url, { COMPAT: 'events', DEADLINE_MS: '500' })
  for (const config of [{}, { verbose: true }, { geolocate: true }]) {
    const sdk = Mixpanel.init('dummy', { host: `127.0.0.1:${relay.port}`, protocol: 'http', ...config })
    sandbox.ledger.clear()
    t.equal(await call(done => sdk.track('one', { distinct_id: 'user-42', text: 'é\u{1F600}+/?' }, done)), undefined)
    t.equal(await call(done => sdk.track('large', { distinct_id: 'user-42', text: 'x'.repeat(12_000) }, done)), undefined, 'an event of 12 KB is a GET of 16 KB')
    const events = Array.from({ length: 120 }, (_, index) => ({ event: 'batch', properties: { distinct_id: 'user-42', index, text: '?>~ÿ', token: index % 2 === 0 ? 'other' : 'dummy' } }))
    t.equal(await call(done => sdk.track_batch(events as never, done as never)), undefined)
    t.equal(await call(done => sdk.alias('user-42', 'user-43', done)), undefined)
    t.equal(sandbox.ledger.rows().length, 123)
    t.ok(sandbox.requests.every(({ body }) => !body.includes('dummy') && !body.includes('other')))
    t.match(sandbox.ledger.rows()[0]?.properties, { text: 'é\u{1F600}+/?' })
    t.match(await call(done => sdk.alias('null', 'user-43', done)), Error)
    sandbox.faults.add({ name: 'edge_down', times: 1000 })
    t.match(await call(done => sdk.track('away', { distinct_id: 'u' }, done)), Error)
    t.match(await call(done => sdk.people.set('u', { a: 1 }, done)), Error, 'profiles are not forwarded')
    sandbox.faults.clear()
    // The breaker has counted these failures.
    while (await call(done => sdk.track('recovered', { distinct_id: 'u' }, done)) !== undefined) await sleep(200)
  }
  t.equal(await relay.kill('SIGTERM'), 0)
})

t.test('what the SDK for Node sends in an outage is in the outbox, and arrives after a kill with its time', async t => {
  const sandbox = await startSandbox(t)
  const env = { COMPAT: 'events', DEADLINE_MS: '500', OUTBOX: `file:${temporary(t)}/outbox` }
  const relay = await startServer(t, sandbox.url, env)
  const sdk = Mixpanel.init('dummy', { host: `127.0.0.1:${relay.port}`, protocol: 'http' })
  sandbox.faults.add({ name: 'edge_down', times: 1_000_000 })
  const errors = await Promise.all(Array.from({ length: 50 }, (_, index) => call(done => sdk.track('stored', { distinct_id: 'user-42', index }, done))))
  t.same(new Set(errors), new Set([undefined]))
  const before = Date.now() / 1000
  await relay.kill('SIGKILL')
  await sleep(1500)
  sandbox.faults.clear()
  const next = await startServer(t, sandbox.url, env)
  await next.emptied()
  t.same(sandbox.ledger.rows().map(({ properties }) => properties.index).sort((a, b) => Number(a) - Number(b)), Array.from({ length: 50 }, (_, index) => index))
  t.ok(sandbox.ledger.rows().every(({ properties }) => Number(properties.time) <= before))
})

t.test('a shutdown refuses no event of an SDK that has a connection', async t => {
  const sandbox = await startSandbox(t)
  const relay = await startServer(t, sandbox.url, { COMPAT: 'events', SHUTDOWN_DELAY_MS: '300' })
  const sdk = Mixpanel.init('dummy', { host: `127.0.0.1:${relay.port}`, protocol: 'http' })
  sandbox.faults.add({ name: 'wait', ms: 1000 })
  const pending = call(done => sdk.track('under way', { distinct_id: 'u' }, done))
  await sleep(100)
  relay.child.kill('SIGTERM')
  await sleep(100)
  t.equal(await call(done => sdk.track('during the delay', { distinct_id: 'u' }, done)), undefined)
  t.equal(await pending, undefined)
  t.equal(await relay.exit, 0)
  t.equal(sandbox.ledger.rows().length, 2)
})

/** What the SDKs of other languages send, as recorded; `own` marks what their answer must be. */
t.test('recorded requests of the SDKs for Python, PHP, Ruby, Go, Java and phones get what each reads as success and as failure', async t => {
  const sandbox = await startSandbox(t)
  const relay = await startServer(t, sandbox.url, { COMPAT: 'events', DEADLINE_MS: '500' })
  const now = Date.now() / 1000
  const form = 'application/x-www-form-urlencoded'
  const one = (more = {}) => ({ event: 'e', properties: { token: 'dummy', distinct_id: 'u', ...more } })
  const b64 = (data: unknown) => Buffer.from(JSON.stringify(data)).toString('base64')
  const uri = encodeURIComponent
  const isOne = (text: string) => text === '1'
  const isJson = (text: string) => JSON.parse(text).status === 1 && 'error' in JSON.parse(text)
  const sdks: [name: string, method: string, path: string, type: string, body: () => string, isTaken: (text: string) => boolean][] = [
    ['python', 'POST', '/track', form, () => `data=${uri(JSON.stringify(one({ time: now + 0.25, $insert_id: 'f'.repeat(32) })))}&verbose=1&ip=0`, isJson],
    ['python, buffered', 'POST', '/track', form, () => `data=${uri(JSON.stringify([one({ time: now }), one({ time: now })]))}&verbose=1&ip=0`, isJson],
    ['go', 'POST', '/track?verbose=1', 'application/json', () => JSON.stringify([one(), one()]), isJson],
    ['go, alias', 'POST', '/track', form, () => `data=${uri(JSON.stringify({ event: '$create_alias', properties: { token: 'dummy', alias: 'a', distinct_id: 'u' } }))}`, isOne],
    ['php', 'POST', '/track', form, () => `data=${b64([one({ time: now + 0.123456 })])}`, isOne],
    ['ruby', 'POST', '/track', form, () => `data=${uri(b64(one({ time: Math.round(now * 1000) })))}&verbose=1`, isJson],
    ['java', 'POST', '/track?ip=0', `${form};charset=utf8`, () => `data=${uri(b64([one({ time: Math.round(now * 1000) })]))}`, isOne],
    ['swift', 'POST', '/track/?ip=1', 'application/json', () => JSON.stringify([{ ...one({ time: Math.round(now * 1000) }), $mp_metadata: { $mp_event_id: 'e1' } }]), isOne],
    ['android', 'POST', '/track/?ip=1', `${form}; charset=utf-8`, () => `data=${uri(b64([{ ...one({ time: Math.round(now * 1000) }), $mp_metadata: { $mp_event_id: 'e2' } }]))}`, isOne]
  ]
  for (const [name, method, path, type, body, isTaken] of sdks) {
    const send = async () => {
      const answer = await fetch(relay.url + path, { method, headers: { 'content-type': type }, body: body() })
      return { status: answer.status, text: await answer.text() }
    }
    const before = sandbox.ledger.rows().length
    const taken = await send()
    t.ok(taken.status === 200 && isTaken(taken.text), `${name} reads success: ${taken.text}`)
    t.ok(sandbox.ledger.rows().length > before)
    if (['php', 'java', 'swift', 'android'].includes(name)) {
      await send()
      const [first, again] = sandbox.ledger.rows().slice(before).map(({ properties }) => properties.$insert_id)
      t.ok(first !== undefined && first === again, `a repeat of ${name} is harmless`)
    }
    sandbox.faults.add({ name: 'rate_limited' })
    const failed = await send()
    t.ok(failed.status === 503 && !isTaken(failed.text), `${name} reads failure: ${failed.text}`)
  }
})
