import { setTimeout as sleep } from 'node:timers/promises'
import type { Browser, Page } from 'playwright-core'
import { t, type Test } from 'tap'
import { launchChromium, needsChromium, WAIT_MS } from './chromium.ts'
import { freePort, identity, startSandbox, type Env } from './helper.ts'
import { startProcess, startServer } from './processes.ts'

const SECRET = 'CANARY-SECRET of at least 32 bytes'

/** The hosts other than loopback that pages have asked for. */
const outside: string[] = []
let browser: Browser

t.before(async () => { browser = await launchChromium(t, outside) as Browser })

/** The relay as a process in front of a sandbox, with examples/browser on an origin that it lists and on a foreign one. */
async function start (t: Test, env: Env = {}) {
  const sandbox = await startSandbox(t)
  const port = String(await freePort())
  const relay = await startServer(t, sandbox.url, { CORS_ORIGINS: `http://127.0.0.1:${port}`, ...env })
  const { JWT_SECRET = '' } = env
  const [origin, foreign] = await Promise.all([port, '0'].map(async PORT => {
    const { until } = startProcess(t, 'examples/browser/serve.js', [], { PORT, RELAY_URL: relay.url, JWT_SECRET })
    return String((await until(/Open (\S+) for/))[1])
  })) as [string, string]

  /** Resolves when the relay has answered `count` requests of one method, with the statuses in their order. */
  async function answered (count: number, method = 'POST'): Promise<number[]> {
    await relay.until(new RegExp(`(?:"method":"${method}"[^]*?"msg":"request completed"[^]*?){${count}}`))
    const lines = relay.output().matchAll(new RegExp(`"method":"${method}","route":[^,]+,"status":(\\d+)`, 'g'))
    return [...lines].map(([, status]) => Number(status))
  }
  /** The events at Mixpanel. */
  const events = () => sandbox.ledger.rows()
  return { sandbox, relay, origin, foreign, answered, events }
}

/** Opens a page in a new profile, which has no preflight in its cache. */
async function open (t: Test, url: string): Promise<Page> {
  const context = await browser.newContext()
  t.teardown(() => context.close())
  context.setDefaultTimeout(WAIT_MS)
  const page = await context.newPage()
  page.on('pageerror', error => t.fail(`an error in the page: ${error.message}`))
  await page.goto(url)
  return page
}

/** Opens the page of examples/browser. Resolves when it has its anonymous id from the SDK. */
async function openExample (t: Test, origin: string) {
  const page = await open(t, origin)
  return { page, anonymousId: await shown(page, 'anonymous-id') }
}

/** Resolves with the text of an output element once it has one. */
async function shown (page: Page, id: string): Promise<string> {
  const value = await page.waitForFunction(`document.getElementById('${id}').value.replace(/^Sending.*/, '')`)
  return String(await value.jsonValue())
}

interface Given { userId: string, anonymousId: string, token?: string }

/** Calls `identify` of examples/browser in a page of the example. */
const identifyIn = async (page: Page, relayUrl: string, given: Given) => page.evaluate(async ({ module, token, ...options }) => {
  const { identify } = await import(module)
  return identify({ ...options, ...token !== undefined && { getToken: () => token } })
    .then((answer: string) => ({ answer }), (error: { message: string, problem: unknown }) => ({ message: error.message, problem: error.problem }))
}, { module: new URL('/identify.js', page.url()).href, relayUrl, ...given })

/** The globals of a page that the functions below use in Chromium. */
declare const addEventListener: (event: string, listener: () => void) => void
declare const document: { body: { innerHTML: string }, forms: { submit (): void }[] }
declare const navigator: { sendBeacon (url: string, body: string | Blob): boolean }

interface Attempt {
  name: string
  /** Sends the body from the page, now or when the page unloads. */
  send: (given: { url: string, body: string }) => unknown
  /** The first request of the attempt. */
  first: 'OPTIONS' | 'POST'
  /** True where the browser sends `Origin: null`, from any page. */
  isOpaque?: boolean
}

// A function runs in the page, so it may use nothing of this file.
const ATTEMPTS: Attempt[] = [
  {
    name: 'fetch',
    send: ({ url, body }) => { fetch(url, { method: 'POST', headers: { 'content-type': 'application/json' }, body }).catch(() => {}) },
    first: 'OPTIONS'
  },
  { name: 'fetch of text/plain', send: ({ url, body }) => { fetch(url, { method: 'POST', body }).catch(() => {}) }, first: 'POST' },
  { name: 'fetch without CORS', send: ({ url, body }) => { fetch(url, { method: 'POST', mode: 'no-cors', body }) }, first: 'POST' },
  {
    name: 'fetch with keepalive on unload',
    send: ({ url, body }) => addEventListener('pagehide', () => {
      fetch(url, { method: 'POST', keepalive: true, headers: { 'content-type': 'application/json' }, body })
    }),
    first: 'OPTIONS'
  },
  {
    name: 'fetch of text/plain with keepalive on unload',
    send: ({ url, body }) => addEventListener('pagehide', () => { fetch(url, { method: 'POST', keepalive: true, body }) }),
    first: 'POST'
  },
  { name: 'beacon', send: ({ url, body }) => navigator.sendBeacon(url, body), first: 'POST' },
  { name: 'beacon of JSON', send: ({ url, body }) => navigator.sendBeacon(url, new Blob([body], { type: 'application/json' })), first: 'OPTIONS' },
  { name: 'beacon on unload', send: ({ url, body }) => addEventListener('pagehide', () => { navigator.sendBeacon(url, body) }), first: 'POST' },
  {
    name: 'beacon of JSON on unload',
    send: ({ url, body }) => addEventListener('pagehide', () => { navigator.sendBeacon(url, new Blob([body], { type: 'application/json' })) }),
    first: 'OPTIONS'
  },
  {
    name: 'form',
    // A form of text/plain sends name=value, so its name ends within a string of the JSON.
    send ({ url, body }) {
      const name = body.replace(/}$/, ',"properties":{"form":"').replaceAll('"', '&quot;')
      document.body.innerHTML = `<form method="post" enctype="text/plain" action="${url}"><input name="${name}" value="&quot;}}"></form>`
      document.forms[0]?.submit()
    },
    first: 'POST'
  },
  {
    name: 'script in a sandboxed frame',
    send ({ url, body }) {
      const script = `<script>fetch('${url}', { method: 'POST', body: '${body}' }).catch(() => {})</script>`.replaceAll('"', '&quot;')
      document.body.innerHTML = `<iframe sandbox="allow-scripts" srcdoc="${script}"></iframe>`
    },
    first: 'POST',
    isOpaque: true
  }
]

t.test('a page on an origin of CORS_ORIGINS identifies in each way that names its origin', needsChromium, async t => {
  const { relay, origin, answered, events } = await start(t)
  const expected: string[] = []
  let count = 0
  for (const { name, send, isOpaque = false } of ATTEMPTS) {
    const page = await open(t, `${origin}/config.json`)
    const body = identity({ identified_id: name })
    await page.evaluate(send, { url: `${relay.url}/identify`, body: JSON.stringify(body) })
    if (name.endsWith('unload')) await page.goto('about:blank')
    t.equal((await answered(++count)).at(-1), isOpaque ? 403 : 200, name)
    if (!isOpaque) expected.push(name)
  }
  t.same(events().map(({ properties }) => properties.distinct_id), expected, 'Mixpanel has each identity that got 200')
})

t.test('a page on a foreign origin identifies in no way', needsChromium, async t => {
  const { sandbox, relay, origin, foreign, answered, events } = await start(t)
  const counts = { OPTIONS: 0, POST: 0 }
  for (const { name, send, first } of ATTEMPTS) {
    const page = await open(t, `${foreign}/config.json`)
    await page.evaluate(send, { url: `${relay.url}/identify`, body: JSON.stringify(identity()) })
    if (name.endsWith('unload')) await page.goto('about:blank')
    t.equal((await answered(++counts[first], first)).at(-1), 403, name)
  }
  const { page, anonymousId } = await openExample(t, foreign)
  const { message, problem } = await identifyIn(page, relay.url, { userId: 'user-42', anonymousId })
  t.match(message, /Failed to fetch/, 'the page cannot read why')
  t.equal(problem, undefined)
  t.same(sandbox.requests, [], 'Mixpanel got nothing')

  const allowed = await openExample(t, origin)
  t.same(await identifyIn(allowed.page, relay.url, { userId: 'user-42', anonymousId: allowed.anonymousId }), { answer: 'accepted' })
  t.equal(events().length, 1, 'Mixpanel has the identity of the page on the other origin alone')
  const statuses = await answered(++counts.POST)
  t.same(statuses.filter(status => status !== 403), [200])
})

t.test('the example identifies with the anonymous id of the SDK and the token of the user', needsChromium, async t => {
  const { origin, events } = await start(t, { JWT_SECRET: SECRET })
  const { page, anonymousId } = await openExample(t, origin)
  t.match(anonymousId, /^\$device:[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/)
  await page.reload()
  t.equal(await shown(page, 'anonymous-id'), anonymousId, 'the SDK keeps its id from page to page')
  await page.fill('#user', 'ann@example.com')
  await page.click('text=Sign in')
  t.equal(await shown(page, 'answer'), 'accepted')
  t.match(events(), [{ outcome: 'merged', properties: { distinct_id: 'ann@example.com', $identified_id: 'ann@example.com', $anon_id: anonymousId } }])
  t.notOk(await page.isVisible('#beacon'), 'a page with tokens offers no beacon')
})

t.test('an identity that the example sends while its page unloads arrives', needsChromium, async t => {
  const { relay, origin, answered, events } = await start(t, { JWT_SECRET: SECRET })
  const { page, anonymousId } = await openExample(t, origin)
  const token = await tokenOf(page, 'user-42')
  await page.evaluate(async ({ module, token, ...options }) => {
    const { identify } = await import(module)
    addEventListener('pagehide', () => { identify({ ...options, getToken: () => token }) })
  }, { module: `${origin}/identify.js`, token, relayUrl: relay.url, userId: 'user-42', anonymousId })
  await page.goto('about:blank')
  t.same(await answered(1), [200])
  t.match(events(), [{ properties: { distinct_id: 'user-42', $anon_id: anonymousId } }])
})

/** Signs a user in to the page's backend, and resolves with the user's token. */
const tokenOf = async (page: Page, user: string) => page.evaluate(async user => {
  await fetch(`/sign-in?user=${user}`, { method: 'POST' })
  return (await fetch('/token')).text()
}, user)

t.test("a page with a user's token identifies as that user alone, and a page or beacon without a token not at all", needsChromium, async t => {
  const { sandbox, relay, origin, answered, events } = await start(t, { JWT_SECRET: SECRET })
  const { page, anonymousId } = await openExample(t, origin)
  const token = await tokenOf(page, 'user-42')
  const other = await identifyIn(page, relay.url, { userId: 'user-43', anonymousId, token })
  t.match(other, { problem: { status: 403, code: 'forbidden', retryable: false } }, "another user's id")
  t.match(await identifyIn(page, relay.url, { userId: 'user-42', anonymousId }), { problem: { status: 401, code: 'unauthenticated' } }, 'no token')
  const [head, , signature] = token.split('.')
  const claims = Buffer.from(JSON.stringify({ sub: 'user-43', exp: Date.now() })).toString('base64url')
  const forged = await identifyIn(page, relay.url, { userId: 'user-43', anonymousId, token: `${head}.${claims}.${signature}` })
  t.match(forged, { problem: { status: 401, code: 'unauthenticated' } }, 'a token with another claim')
  await page.evaluate(({ url, body }) => navigator.sendBeacon(url, body), { url: `${relay.url}/identify`, body: JSON.stringify(identity()) })
  t.same(await answered(4), [403, 401, 401, 401], 'each was sent once, the beacon last')
  t.same(sandbox.requests, [], 'Mixpanel got nothing')
  t.same(await identifyIn(page, relay.url, { userId: 'user-42', anonymousId, token }), { answer: 'accepted' })
  t.match(events(), [{ properties: { distinct_id: 'user-42', $anon_id: anonymousId } }])
})

t.test('the example identifies without a token, also by a beacon, where anonymous callers may', needsChromium, async t => {
  const { origin, answered, events } = await start(t, { API_KEYS: 'CANARY-SECRET-of-a-service', ALLOW_ANONYMOUS: 'true' })
  const { page, anonymousId } = await openExample(t, origin)
  await page.click('text=Send a beacon')
  t.match(await shown(page, 'answer'), /no answer/)
  t.same(await answered(1), [200])
  await page.click('text=Sign in')
  await page.waitForFunction("document.getElementById('answer').value === 'accepted'")
  t.match(events(), [{ properties: { distinct_id: 'user-42', $anon_id: anonymousId } }])
})

t.test('the example repeats a request after the time in Retry-After, a bounded number of times, and no request that is invalid', needsChromium, async t => {
  const { sandbox, relay, origin, answered, events } = await start(t)
  const { page, anonymousId } = await openExample(t, origin)
  t.match(await identifyIn(page, relay.url, { userId: 'null', anonymousId }), { problem: { status: 400, errors: [{ pointer: '/identified_id' }] } })
  sandbox.faults.add({ name: 'rate_limited', retry_after: '3' })
  t.same(await identifyIn(page, relay.url, { userId: 'user-42', anonymousId }), { answer: 'accepted' })
  t.same(await answered(3), [400, 503, 200], 'the invalid request was sent once, the other twice')
  const [failedAt = 0, repeatedAt = 0] = [...relay.output().matchAll(/"time":(\d+),"method":"POST"/g)].slice(1).map(([, time]) => Number(time))
  t.ok(repeatedAt - failedAt >= 2900, `the repeat comes after Retry-After, and came after ${repeatedAt - failedAt} ms`)

  sandbox.faults.add({ name: 'edge_down', times: 1000 })
  const { problem } = await identifyIn(page, relay.url, { userId: 'user-43', anonymousId: identity().anon_id })
  t.match(problem, { retryable: true })
  t.equal((await answered(7)).length, 7, 'four requests')
  t.equal(events().length, 1)
})

t.test('no page has asked for another host, and the SDK would have been seen', needsChromium, async t => {
  const { origin } = await start(t)
  const { page } = await openExample(t, origin)
  t.same(outside, [])
  await page.evaluate(async module => {
    const { default: mixpanel } = await import(module)
    mixpanel.set_config({ api_host: 'https://sdk.test' })
    mixpanel.track('an event')
  }, `${origin}/mixpanel.module.js`)
  // The SDK sends on unload what it holds back.
  await page.goto('about:blank')
  while (outside.length === 0) await sleep(50)
  t.same(new Set(outside), new Set(['sdk.test']))
})
