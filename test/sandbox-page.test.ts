import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { request } from 'node:http'
import { connect, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Browser, Page } from 'playwright-core'
import { t, type Test } from 'tap'
import { createSandbox } from '#src/sandbox/app.js'
import { createClusters } from '#src/sandbox/clusters.js'
import { createFeed, type Update } from '#src/sandbox/feed.js'
import { createFaultScript } from '#src/sandbox/faults.js'
import { createLedger } from '#src/sandbox/ledger.js'
import { createRefusals } from '#src/sandbox/refusals.js'
import { createStreams } from '#src/sandbox/streams.js'
import { launchChromium, needsChromium, WAIT_MS } from './chromium.ts'
import { startRelay, startSandbox, TOKEN, type Env } from './helper.ts'

type Sandbox = Awaited<ReturnType<typeof startSandbox>>

const pair = (user: string, anon: string, more: Record<string, unknown> = {}) =>
  ({ event: '$identify', properties: { token: TOKEN, $identified_id: user, $anon_id: anon, ...more } })
const track = ({ url }: Sandbox, data: unknown, query = '') =>
  fetch(`${url}/track${query}`, { method: 'POST', body: new URLSearchParams({ data: JSON.stringify(data) }) })
const addFaults = ({ url }: Sandbox, ...faults: unknown[]) =>
  fetch(`${url}/__sandbox/faults`, { method: 'POST', body: JSON.stringify(faults) })

/** A stream of the page. `until` resolves with the first update that has not been read and for which `isWanted` is true. */
async function openStream (t: Test, { url }: Sandbox) {
  const closing = new AbortController()
  const { status, headers, body } = await fetch(`${url}/__sandbox/stream`, { signal: closing.signal })
  t.teardown(() => closing.abort())
  const updates: Update[] = []
  let isOpen = true
  async function read (): Promise<void> {
    let text = ''
    for await (const chunk of body?.pipeThrough(new TextDecoderStream()) ?? []) {
      const messages = (text + chunk).split('\n\n')
      text = messages.pop() ?? ''
      updates.push(...messages.map(message => JSON.parse(message.replace(/^(?:retry: \d+\n)?data: /, '')) as Update))
    }
  }
  read().catch(() => {}).finally(() => { isOpen = false })
  async function until (isWanted: (update: Update) => boolean = () => true): Promise<Update> {
    for (const end = Date.now() + 20_000; Date.now() < end; await sleep(10)) {
      for (let update = updates.shift(); update !== undefined; update = updates.shift()) if (isWanted(update)) return update
    }
    throw new Error('the stream had no such update')
  }
  return { status, headers, until, isOpen: () => isOpen, close: () => closing.abort() }
}

/** A feed without a server. */
function createSources (options: Parameters<typeof createLedger>[0] = {}) {
  const sources = { mode: options.mode ?? 'original' as const, ledger: createLedger(options), refusals: createRefusals(), faults: createFaultScript() }
  return { ...sources, feed: createFeed(sources) }
}

t.test('GET / is the page for a browser, and Mixpanel\'s answer for all others', async t => {
  const sandbox = await startSandbox(t)
  const page = await fetch(`${sandbox.url}/`, { headers: { accept: 'text/html,*/*;q=0.8' } })
  const html = await page.text()
  t.match(html, /^<!doctype html>/)
  t.match(html, '<option>edge_down</option>')
  t.match(html, '<option>slow_zero</option>')
  t.notMatch(html, /<script>|<style|style=|\son\w+=/, 'no part of it needs an exception in the policy')
  const policy = page.headers.get('content-security-policy') ?? ''
  t.match(policy, "default-src 'none'; script-src 'self';")
  t.notMatch(policy, /unsafe|\*|http|data:/)
  t.equal(page.headers.get('cross-origin-resource-policy'), 'same-origin')
  for (const [, path = ''] of html.matchAll(/(?:href|src)="(__sandbox[^"]+)"/g)) {
    const file = await fetch(`${sandbox.url}/${path}`)
    t.equal(file.status, 200, path)
    t.match(file.headers.get('content-type'), /^(?:text\/css|text\/javascript|image\/svg)/)
    t.equal(file.headers.get('x-content-type-options'), 'nosniff')
  }
  for (const headers of [{}, { accept: 'application/json' }]) {
    const answer = await fetch(`${sandbox.url}/`, { headers })
    t.match(await answer.json(), { error: /^Welcome/ })
    t.equal(answer.headers.get('vary'), 'accept')
  }
})

t.test('a stream begins with the whole state, and goes on with what arrives', async t => {
  const sandbox = await startSandbox(t)
  const [anon, other] = [randomUUID(), randomUUID()]
  const time = Math.floor(Date.now() / 1000)
  await track(sandbox, pair('u1', anon, { time, $insert_id: 'i', plan: 'pro' }))
  const stream = await openStream(t, sandbox)
  t.equal(stream.headers.get('content-type'), 'text/event-stream')
  t.equal(stream.headers.get('access-control-allow-origin'), null)
  const first = await stream.until()
  t.match(first, {
    isWhole: true,
    mode: 'original',
    counts: { events: 1, duplicates: 0, merged: 1, unmerged: 0, refused: 0 },
    rows: [{ id: 'row-0', endpoint: 'track', event: '$identify', user: 'u1', anon, time: time * 1000, outcome: 'merged', isDuplicate: false }],
    clusters: { total: 1, changed: [{ user: 'u1', pairs: [{ user: 'u1', anon }], more: 0, refused: [] }] },
    faults: [],
    hint: ''
  })
  t.match(JSON.parse(first.rows[0]?.filed ?? ''), { event: '$identify', properties: { plan: 'pro', $distinct_id_before_identity: 'u1' } })
  t.notMatch(JSON.stringify(first), TOKEN)

  await track(sandbox, [pair('u1', anon, { time, $insert_id: 'i' }), pair('u2', anon), pair('u2', anon), pair('u1', other), pair('u1', randomUUID(), { token: 'another' })])
  const second = await stream.until()
  t.match(second, { isWhole: false, counts: { events: 6, duplicates: 2, merged: 2, unmerged: 2 } })
  t.same(second.rows.map(({ id, outcome, isDuplicate }) => [id, outcome, isDuplicate]), [
    ['row-1', 'repeat', true], ['row-2', 'errAnonDistinctIdAssignedAlready', false],
    ['row-3', 'errAnonDistinctIdAssignedAlready', true], ['row-4', 'merged', false], ['row-5', 'unknown_token', false]
  ])
  t.equal(second.rows[4]?.filed, '', 'the project does not have it')
  t.match(second.clusters.changed, [{
    pairs: [{ user: 'u1', anon }, { user: 'u1', anon: other }], refused: [{ user: 'u2', anon, reason: 'errAnonDistinctIdAssignedAlready', times: 2 }]
  }])

  const late = await openStream(t, sandbox)
  t.same((await late.until()).rows.map(({ id }) => id), ['row-0', 'row-1', 'row-2', 'row-3', 'row-4', 'row-5'], 'a page that connects again gets each row once')
  await fetch(`${sandbox.url}/__sandbox`, { method: 'DELETE' })
  for (const { until } of [stream, late]) {
    t.match(await until(update => update.isWhole), { counts: { events: 0, refused: 0 }, rows: [], clusters: { total: 0, shown: [], changed: [] } })
  }
  await track(sandbox, pair('u3', anon))
  t.match(await late.until(), { isWhole: false, rows: [{ id: 'row-0', user: 'u3', outcome: 'merged' }] })
})

t.test('a stream shows what a fault or a rule refused, and the faults that wait', async t => {
  const sandbox = await startSandbox(t)
  const { until } = await openStream(t, sandbox)
  await addFaults(sandbox, { name: 'edge_down', times: 2 }, { name: 'wait', ms: 50 }, { name: 'internal' }, { name: 'mute_zero' })
  t.match(await until(({ faults }) => faults.length > 0), {
    faults: [{ name: 'edge_down', times: 2 }, { name: 'wait', times: 1 }, { name: 'internal', times: 1 }, { name: 'mute_zero', times: 1 }]
  })
  const anon = randomUUID()
  const found: unknown[] = []
  const next = async (count: number) => {
    while (found.length < count) {
      const { rows } = await until()
      found.push(...rows.map(({ outcome, endpoint, event, user, anon, detail }) => [outcome, endpoint, event, user, anon, detail]))
    }
    return found.splice(0)
  }
  await track(sandbox, pair('u1', anon))
  t.same(await next(1), [['fault', 'track', '$identify', 'u1', anon, 'edge_down: not processed.']])
  await track(sandbox, [pair('u1', anon), pair('u2', anon)])
  t.same(await next(1), [['fault', 'track', '$identify', 'u1', anon, 'edge_down: not processed. This is the first of 2 events.']])
  await track(sandbox, pair('u1', anon))
  t.same(await next(2), [['fault', 'track', '$identify', 'u1', anon, 'wait: processed all the same.'], ['merged', 'track', '$identify', 'u1', anon, 'The ids are one user.']])
  await fetch(`${sandbox.url}/api/2.0/export`)
  t.same(await next(1), [['fault', 'export', '', '', '', 'internal: not processed.']])
  await track(sandbox, pair('u1', anon, { text: 'x'.repeat(70_000) }))
  t.same(await next(1), [['fault', 'track', '', '', '', 'mute_zero: not processed.']], 'a large body is not parsed')
  await addFaults(sandbox, { name: 'edge_down' }, { name: 'edge_down' }, { name: 'slow_zero' })
  await fetch(`${sandbox.url}/import`, { method: 'POST', body: JSON.stringify(pair('u3', anon)) })
  await fetch(`${sandbox.url}/track`)
  t.equal(await (await track(sandbox, pair('u4', anon))).text(), '0')
  t.same(await next(3), [
    ['fault', 'import', '$identify', 'u3', anon, 'edge_down: not processed.'],
    ['fault', 'track', '', '', '', 'edge_down: not processed.'],
    ['fault', 'track', '$identify', 'u4', anon, 'slow_zero: not processed.']
  ])
  await track(sandbox, [pair('u5', anon, { token: '' }), pair('u1', anon)])
  t.same((await next(2)).sort(), [
    ['refused', 'track', '$identify', 'u5', anon, 'token, missing or empty.'], ['repeat', 'track', '$identify', 'u1', anon, 'These ids had merged before.']
  ])
  await track(sandbox, { event: { no: 'text' }, properties: { token: TOKEN, $user_id: 7, $device_id: 'd' } }, '?strict=1')
  t.same(await next(1), [['refused', 'track', '', '7', 'd', "'event' must not be missing or blank."]])
  const send = (body: unknown, query: string, credentials = `${TOKEN}:`) => fetch(`${sandbox.url}/import${query}`, {
    method: 'POST', body: typeof body === 'string' ? body : JSON.stringify(body), headers: { authorization: `Basic ${Buffer.from(credentials).toString('base64')}` }
  })
  for (const [body, query, reason, credentials] of [
    [[], '', 'Invalid credentials.', 'another:'], [[{}], '?strict=0', 'data, missing or empty.'], ['[', '', 'request body is not a list.'],
    [Array(2001).fill({}), '', 'more than 2000 events.']
  ] as const) {
    await send(body, query, credentials)
    t.same(await next(1), [['refused', 'import', '', '', '', reason]])
  }
  await addFaults(sandbox, { name: 'hang', times: 3 })
  await until(({ faults }) => faults.length === 1)
  await fetch(`${sandbox.url}/__sandbox/faults`, { method: 'DELETE' })
  t.same((await until()).faults, [])
  t.equal((await track(sandbox, pair('u1', anon))).status, 200)
})

t.test('a stream says which setting the mode of the project needs', async t => {
  const identify = pair('u', randomUUID())
  const association = { event: 'identity association', properties: { token: TOKEN, distinct_id: 'u', $user_id: 'u', $device_id: 'd' } }
  for (const [mode, event, hint] of [
    ['original', identify, /^$/], ['original', association, /MIXPANEL_ID_MERGE=original/], ['simplified', association, /^$/],
    ['simplified', identify, /MIXPANEL_ID_MERGE=simplified/], ['legacy', identify, /can merge nothing/], ['legacy', { event: 'x' }, /^$/]
  ] as const) {
    const { ledger, feed } = createSources({ mode })
    ledger.add('track', event)
    t.match(feed.update(true), { mode, hint })
  }
})

t.test('a foreign origin gets nothing from the sandbox\'s own paths', async t => {
  const sandbox = await startSandbox(t)
  const { port } = new URL(sandbox.url)
  /** fetch would not send these headers. */
  const send = async (method: string, path: string, headers: Env) => {
    const sent = request({ port, host: '127.0.0.1', method, path, headers, agent: false }).end(method === 'POST' ? '[{"name":"hang"}]' : '')
    const [answer] = await once(sent, 'response')
    answer.destroy()
    return answer.statusCode as number
  }
  const host = `localhost:${port}`
  const link = { 'sec-fetch-site': 'cross-site', 'sec-fetch-mode': 'navigate', 'sec-fetch-dest': 'document' }
  const cases: [headers: Env, isOwn: boolean, isLink?: boolean][] = [
    [{ host }, true],
    [{ host, origin: `http://${host}`, 'sec-fetch-site': 'same-origin' }, true],
    [{ host: 'sandbox:8081' }, true], [{ host: `[::1]:${port}` }, true], [{ host: 'app.localhost' }, true], [{ host: '192.168.1.7' }, true],
    [{ host: 'host.docker.internal' }, true], [{ host: 'sandbox.localhost', origin: 'https://sandbox.localhost' }, true],
    [{ host: 'rebound.example.com' }, false], [{ host: 'localhost.example.com' }, false], [{ host: '127.0.0.1.example.com' }, false], [{ host: 'a b' }, false],
    [{ host: 'rebound.example.com', origin: 'http://rebound.example.com' }, false],
    [{ host, origin: 'https://example.com' }, false], [{ host, origin: 'null' }, false], [{ host, origin: `http://127.0.0.1:${port}` }, false],
    [{ host, origin: 'http://localhost:3000' }, false], [{ host, 'sec-fetch-site': 'cross-site' }, false], [{ host, 'sec-fetch-site': 'same-site' }, false],
    [{ host, ...link }, false, true], [{ host, ...link, 'sec-fetch-dest': 'iframe' }, false]
  ]
  for (const [headers, isOwn, isLink = false] of cases) {
    const name = JSON.stringify(headers)
    t.equal(await send('GET', '/__sandbox/events', headers), isOwn || isLink ? 200 : 403, `GET ${name}`)
    t.equal(await send('GET', '/__sandbox/stream', headers), isOwn || isLink ? 200 : 403, `stream ${name}`)
    sandbox.faults.clear()
    t.equal(await send('POST', '/__sandbox/faults', headers), isOwn ? 204 : 403, `POST ${name}`)
    t.equal(sandbox.faults.pending().length, isOwn ? 1 : 0)
    for (const path of ['/__sandbox/faults', '/__sandbox']) t.equal(await send('DELETE', path, headers), isOwn ? 204 : 403, `DELETE ${name}`)
  }
  t.equal(await send('GET', '/__sandbox/livez', { host: 'sandbox.example.com' }), 200, 'a health check may have any name')
  t.equal(await send('HEAD', '/__sandbox/stream', { host }), 404)
})

t.test('sixteen pages may be open, and the fault script has a bound', async t => {
  const sandbox = await startSandbox(t)
  const streams = await Promise.all(Array.from({ length: 16 }, () => openStream(t, sandbox)))
  t.ok(streams.every(({ status }) => status === 200))
  const refused = await fetch(`${sandbox.url}/__sandbox/stream`)
  t.equal(refused.status, 503)
  t.match(await refused.json(), { error: /16 pages/ })
  streams[0]?.close()
  let again = await fetch(`${sandbox.url}/__sandbox/stream`)
  for (; again.status === 503; again = await fetch(`${sandbox.url}/__sandbox/stream`)) await again.body?.cancel()
  t.equal(again.status, 200, 'a page that is closed makes room')
  await again.body?.cancel()

  t.equal((await addFaults(sandbox, ...Array(1000).fill({ name: 'hang' }))).status, 204)
  t.equal((await addFaults(sandbox, { name: 'hang' })).status, 400)
  t.equal(sandbox.faults.pending().length, 1000)
})

t.test('a page that does not read is dropped, and the others go on', async t => {
  const sandbox = await startSandbox(t)
  const reader = await openStream(t, sandbox)
  const silent = connect({ port: Number(new URL(sandbox.url).port), host: '127.0.0.1' })
  // It is reset, because it has unread updates.
  silent.on('error', () => {})
  t.teardown(() => { silent.destroy() })
  const [served] = await once(sandbox.app.server, 'connection') as [Socket]
  silent.pause().write('GET /__sandbox/stream HTTP/1.1\r\nhost: localhost\r\n\r\n')
  const text = 'é'.repeat(255)
  let updates = 0
  for (; !served.destroyed && updates < 100; updates++) {
    for (let index = 0; index < 500; index++) sandbox.ledger.add('track', { event: text, properties: { distinct_id: text, a: text, b: text } })
    await track(sandbox, pair('u', randomUUID()))
    const { length } = sandbox.ledger.rows()
    await reader.until(({ counts }) => counts.events === length)
  }
  // The kernel holds some updates as well.
  t.ok(updates < 100, `the connection was closed after ${updates} updates`)
  await track(sandbox, pair('last', randomUUID()))
  await reader.until(({ rows }) => rows.some(({ user }) => user === 'last'))
  t.ok(reader.isOpen())
})

t.test('without a page an event costs no update', async t => {
  let updates = 0
  const streams = createStreams({ update: () => ({ updates: ++updates }) as never, stop () {} })
  streams.changed()
  await sleep(150)
  t.equal(updates, 0)
})

t.test('a page gets the last 500 rows, 200 clusters, 12 pairs of each, and 20 refused merges', async t => {
  const { ledger, refusals, feed } = createSources()
  for (let index = 0; index < 700; index++) ledger.add('track', pair(`u${index}`, randomUUID()))
  for (let index = 0; index < 15; index++) ledger.add('track', pair('u600', randomUUID()))
  for (let index = 0; index < 25; index++) ledger.add('track', pair('u600', `not-a-uuid-${index}`))
  const all = feed.update(true)
  t.equal(all.rows.length, 500)
  t.equal(all.rows.at(-1)?.id, 'row-739')
  t.match(all.counts, { events: 740, merged: 715, unmerged: 25 })
  t.match(all.clusters, { total: 700, shown: { length: 200 }, changed: { length: 200 } })
  const large = all.clusters.changed.find(({ user }) => user === 'u600')
  t.match(large, { pairs: { length: 12 }, more: 4, refused: { length: 20 } })
  t.equal(large?.refused.at(-1)?.anon, 'not-a-uuid-24')
  ledger.add('track', pair('u1', randomUUID()))
  const one = feed.update(false)
  t.equal(one.clusters.shown.length, 200)
  t.match(one.clusters.changed, [{ user: 'u1', pairs: { length: 2 } }], 'only what changed is sent')
  t.notOk(one.clusters.shown.includes(all.clusters.shown[0] ?? 0), 'the cluster that changed longest ago is no longer shown')

  ledger.add('track', pair('alone', 'no-uuid'))
  t.match(feed.update(false).clusters.changed, [{ user: 'alone', pairs: [], more: 0, refused: [{ user: 'alone', anon: 'no-uuid' }] }], 'a user without an anonymous id')

  for (let index = 0; index < 450; index++) refusals.add({ endpoint: 'track', kind: 'refused', reason: `r${index}`, events: () => [] })
  const { rows, counts } = feed.update(false)
  t.equal(counts.refused, 450)
  t.equal(rows.length, 250, 'the first of them are forgotten')
  t.match(rows.at(-1), { id: 'refusal-449', detail: 'r449.' })
  feed.stop()
  t.match(feed.update(false), { isWhole: true, rows: { length: 500 } }, 'after the last page has gone, the next update is whole')
})

t.test('a ledger with a bound drops its oldest rows, and forgets the clusters that changed longest ago', async t => {
  const { ledger, feed } = createSources({ maxBytes: 100_000, maxIds: 1000 })
  feed.update(true)
  const [first, long] = [randomUUID(), 'x'.repeat(1000)]
  ledger.add('track', pair('first', first))
  for (let index = 0; index < 600; index++) ledger.add('track', pair(`u${index}`, randomUUID(), { long, distinct_id: `u${index}` }))
  const rows = ledger.rows()
  t.ok(JSON.stringify(rows).length < 150_000)
  t.equal(ledger.dropped() + rows.length, 601)
  t.equal(ledger.clusters(9999).total, 500)
  const { counts, rows: shown, clusters } = feed.update(false)
  t.match(counts, { events: 601, duplicates: 0 })
  const last = ledger.rows().at(-1) as { properties: Record<string, unknown> }
  ledger.add('track', { event: '$identify', properties: last.properties })
  t.equal(feed.update(false).counts.duplicates, 1, 'of a row that is kept')
  t.equal(shown.at(-1)?.id, 'row-600')
  t.equal(clusters.total, 500)
  ledger.add('track', pair('second', first))
  t.equal(ledger.rows().at(-1)?.outcome, 'merged', 'a forgotten id is free')
  ledger.clear()
  t.same([ledger.rows(), ledger.dropped(), ledger.clusters(9)], [[], 0, { total: 0, clusters: [] }])
})

t.test('the larger of two clusters takes the ids of the smaller one', async t => {
  const { merge, recent } = createClusters()
  for (const [anon, user] of [['a', 'u'], ['b', 'u'], ['u', 'v'], ['c', 'v']] as const) t.equal(merge(anon, user).outcome, 'merged')
  const { total, clusters: [cluster] } = recent(9)
  t.equal(total, 1)
  t.same([...cluster?.ids ?? []].sort(), ['a', 'b', 'c', 'u', 'v'])
})

t.test('two clusters become one, with their refused merges', async t => {
  const { merge, refuse, recent } = createClusters({ maxIds: 30 })
  const sizes = () => recent(9).clusters.map(({ ids, pairs, refused }) => [ids.size, pairs.length, refused.size])
  for (const anon of ['a', 'b', 'c']) merge(anon, 'u')
  merge('d', 'v')
  t.equal(merge('d', 'u').outcome, 'errAnonDistinctIdAssignedAlready')
  t.equal(merge('a', 'v').outcome, 'errAnonDistinctIdAssignedAlready')
  t.same(sizes(), [[4, 3, 1], [2, 1, 1]].toReversed())
  t.equal(merge('v', 'u').outcome, 'merged')
  t.same(sizes(), [[6, 5, 2]])
  t.equal(merge('u', 'd').outcome, 'merged', 'two of one cluster')
  for (let index = 0; index < 30; index++) refuse({ anon: `x${index}`, user: 'w' }, 'errSameIDs', '')
  t.same(sizes(), [[6, 6, 2], [1, 0, 20]])
  merge('y', 'z')
  t.same(sizes(), [[1, 0, 20], [2, 1, 0]], 'a refused merge counts like an id')
})

let browser: Browser
t.before(async () => { browser = await launchChromium(t) as Browser })

interface PageOptions { isInterrupted?: boolean, width?: number, colorScheme?: 'light' | 'dark' }

/** The page of a sandbox, once it is connected. An error in it, such as one of its policy, fails the test. */
async function openPage (t: Test, url: string, { isInterrupted = false, width = 1280, colorScheme = 'light' }: PageOptions = {}): Promise<Page> {
  const context = await browser.newContext({ viewport: { width, height: 800 }, colorScheme })
  t.teardown(() => context.close())
  context.setDefaultTimeout(WAIT_MS)
  const page = await context.newPage()
  page.on('pageerror', error => t.fail(`an error in the page: ${error.message}`))
  page.on('console', message => message.type() === 'error' && !isInterrupted && t.fail(`an error in the page: ${message.text()}`))
  page.on('dialog', dialog => t.fail(`a dialog: ${dialog.message()}`))
  await page.goto(url)
  await page.waitForSelector('#connection.live')
  return page
}

/** Resolves when the page has a text. */
const shows = (page: Page, selector: string, text: string | RegExp) => page.locator(selector).filter({ hasText: text }).first().waitFor()

/** Resolves when the table has so many rows. The policy of the page refuses Playwright's own `waitForFunction`. */
async function hasRows (page: Page, count: number): Promise<void> {
  for (const end = Date.now() + WAIT_MS; await page.locator('#rows tr').count() !== count; await sleep(20)) {
    if (Date.now() > end) throw new Error(`the table does not have ${count} rows`)
  }
}

/** The texts of each row: event, user, anonymous id and outcome. */
const rowsOf = (page: Page) => page.locator('#rows tr').evaluateAll(rows =>
  (rows as unknown as { children: { innerText: string }[] }[]).map(({ children }) => [...children].slice(1).map(cell => cell.innerText.split('\n')[0])))

/** What Chromium tells a screen reader. */
async function accessibilityOf (page: Page): Promise<{ role: string, name: string, description: string }[]> {
  const client = await page.context().newCDPSession(page)
  const { nodes } = await client.send('Accessibility.getFullAXTree')
  return nodes.filter(({ ignored }) => !ignored).map(({ role, name, description }) =>
    ({ role: String(role?.value), name: String(name?.value ?? ''), description: String(description?.value ?? '') }))
}

for (const mode of ['original', 'simplified'] as const) {
  t.test(`events and clusters appear live, with ${mode} ID merge`, needsChromium, async t => {
    const { sandbox, post } = await startRelay(t, { env: { MIXPANEL_ID_MERGE: mode }, sandbox: { mode } })
    const page = await openPage(t, sandbox.url)
    await shows(page, '#mode', mode === 'original' ? 'Original ID Merge' : 'Simplified ID Merge')
    await shows(page, '#events-more', `MIXPANEL_URL=${sandbox.url}`)
    const [phone, web] = [randomUUID(), randomUUID()]
    // Duplicates have one `time`, in seconds.
    await sleep(1000 - Date.now() % 1000)
    for (const [user, anon] of [['user-42', phone], ['user-42', `$device:${web}`], ['user-42', phone], ['user-43', phone]] as const) {
      t.equal((await post({ identified_id: user, anon_id: anon })).statusCode, 200)
    }
    sandbox.faults.add({ name: 'refused', times: 2 })
    t.equal((await post({ identified_id: 'user-44', anon_id: phone })).statusCode, 422)
    await hasRows(page, 6)
    const event = mode === 'original' ? '$identify' : 'identity association'
    t.same(await rowsOf(page), [
      [event, 'user-44', phone, 'fault'],
      [event, 'user-44', phone, 'fault'],
      [event, 'user-43', phone, 'errAnonDistinctIdAssignedAlready'],
      [event, 'user-42', phone, 'repeat duplicate'],
      [event, 'user-42', mode === 'original' ? `$device:${web}` : web, 'merged'],
      [event, 'user-42', phone, 'merged']
    ])
    t.same(await page.locator('[data-count]').allInnerTexts(), ['4', '1', '2', '1', '2'])
    t.equal(await page.locator('figure').count(), 1)
    await shows(page, 'figcaption', 'user-42: 2 anonymous ids, 1 refused')
    t.equal(await page.locator('figure .node.user:not(.outside)').count(), 1)
    t.equal(await page.locator('figure .node.anon:not(.outside)').count(), 2)
    t.equal(await page.locator('figure .merge:not(.refused)').count(), 2)
    t.equal(await page.locator('figure .merge.refused').count(), 1)
    await page.click('#clusters-text summary')
    const list = await page.locator('#cluster-list li').allInnerTexts()
    t.match(list, [new RegExp(`^user-42 has ${phone}, .*${web}. Refused: user-43 with ${phone}, because the anonymous id has another user`)])
    await page.locator('#rows summary').first().click()
    await shows(page, '#rows pre', mode === 'original' ? '"$failure_reason": "errAnonDistinctIdAssignedAlready"' : '"$identity_failure_reason"')

    await post({ identified_id: 'user-50', anon_id: randomUUID() })
    await shows(page, 'figcaption', 'user-50: 1 anonymous id')
    t.equal(await page.locator('figure').count(), 2, 'the picture grows')
    t.ok(await page.locator('#rows details[open] pre').isVisible(), 'what was open stays open')
    await shows(page, '#announcement', 'Events 5, duplicates 1, merged 3')
  })
}

t.test('the buttons add faults and clear the sandbox', needsChromium, async t => {
  const sandbox = await startSandbox(t)
  const page = await openPage(t, sandbox.url, { isInterrupted: true })
  await track(sandbox, pair('u', randomUUID()))
  await shows(page, '#rows', 'merged')
  await page.fill('#times', '3')
  await page.click('text=503 unavailable')
  await shows(page, '#script', 'Waiting: edge_down × 3.')
  t.equal((await track(sandbox, pair('u', randomUUID()))).status, 503)
  await shows(page, '#script', 'edge_down × 2')
  await page.selectOption('#other', 'too_large')
  await page.click('text=Add fault')
  await shows(page, '#script', 'edge_down × 2, too_large × 3')
  await page.click('text=Clear faults')
  await shows(page, '#script', 'No fault is waiting')
  t.equal(await page.locator('#rows tr').count(), 2, 'the events are still there')
  await page.fill('#times', '0')
  await page.click('text=429 rate limit')
  t.same(sandbox.faults.pending(), [], 'a count that is invalid is not sent')
  await page.fill('#times', '1')
  sandbox.faults.add(...Array(1000).fill({ name: 'hang' }))
  await page.click('text=429 rate limit')
  await shows(page, '#failure', 'more than 1000 faults')
  await page.click('text=Clear everything')
  await hasRows(page, 0)
  await shows(page, '#clusters-more', 'No ids yet')
  t.equal(sandbox.ledger.rows().length, 0)

  await page.click('text=Pause')
  await track(sandbox, pair('paused', randomUUID()))
  await sleep(500)
  t.equal(await page.locator('#rows tr').count(), 0, 'a page that is paused does not change')
  await page.click('text=Go on')
  await shows(page, '#rows', 'paused')
})

t.test('the page works with the keyboard alone, and each control has a name', needsChromium, async t => {
  const sandbox = await startSandbox(t)
  await track(sandbox, [pair('u', randomUUID()), pair('v', 'no-uuid')])
  const page = await openPage(t, sandbox.url)
  await shows(page, '#rows', 'merged')
  const order: string[] = []
  for (const end = 'BODY'; order.length < 40;) {
    await page.keyboard.press('Tab')
    const [name, outline] = await page.evaluate(`(() => {
      const { id, innerText, tagName } = document.activeElement
      return [tagName === 'BODY' ? tagName : id || innerText, getComputedStyle(document.activeElement).outlineStyle]
    })()`) as [string, string]
    if (name === end) break
    t.equal(outline, 'solid', `${name} has a visible focus`)
    order.push(name)
    if (name === 'No answer') await page.keyboard.press('Enter')
    if (name === 'times') await page.keyboard.type('4')
  }
  t.same(order, ['times', '503 unavailable', '429 rate limit', '500 error', 'Refuse the event', 'No answer', 'Break the connection',
    'Wait 3 s, then answer', 'other', 'Add fault', 'clear-faults', 'clear', 'clusters', 'The clusters as a list', 'pause', 'As filed', 'As filed'])
  await shows(page, '#script', 'Waiting: hang × 4.')

  const nodes = await accessibilityOf(page)
  for (const role of ['banner', 'main', 'region', 'table', 'caption', 'columnheader', 'button', 'combobox', 'spinbutton', 'status']) {
    t.ok(nodes.some(node => node.role === role), `there is a ${role}`)
  }
  for (const { role, name } of nodes) {
    if (['button', 'combobox', 'spinbutton', 'table', 'image', 'img', 'region', 'DisclosureTriangle'].includes(role)) t.not(name, '', `a ${role} has a name`)
  }
  t.match(nodes.filter(({ role }) => ['image', 'img'].includes(role)).map(({ name }) => name).join('\n'), /Cluster of v.*Refused: v with no-uuid[^]*Cluster of u.*u has /)
  t.ok(await page.locator('#announcement[aria-live=polite]').count())
})

t.test('the page fits a phone, and its texts have contrast in light and dark', needsChromium, async t => {
  const sandbox = await startSandbox(t)
  const long = 'x'.repeat(255)
  await track(sandbox, [pair('u', randomUUID()), pair('v', 'no-uuid'), pair(long, randomUUID()), { event: long, properties: { token: 'wrong' } }])
  await addFaults(sandbox, { name: 'internal' }, { name: 'hang' })
  await track(sandbox, pair('u', randomUUID()))
  for (const colorScheme of ['light', 'dark'] as const) {
    for (const width of [360, 800, 1280]) {
      const page = await openPage(t, sandbox.url, { width, colorScheme, isInterrupted: false })
      await shows(page, '#rows', 'merged')
      t.ok(await page.evaluate('document.documentElement.scrollWidth') as number <= width, `${width} px: no horizontal scrolling`)
      t.same(await page.evaluate(LOW_CONTRAST), [], `${colorScheme}, ${width} px: contrast`)
    }
  }
})

/** Returns the texts whose contrast with their ground is below 4.5, as WCAG 2 counts it. It runs in the page. */
const LOW_CONTRAST = `(() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number)
  const luminance = color => numbers(color).slice(0, 3)
    .map(part => part / 255).map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0)
  const isOpaque = color => color !== 'rgba(0, 0, 0, 0)' && color !== 'none'
  function groundOf (element) {
    const rect = element.tagName === 'text' && element.parentNode.querySelector('rect')
    const fill = rect && getComputedStyle(rect).fill
    if (fill && isOpaque(fill)) return fill
    for (let at = element; at !== null; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor
      if (isOpaque(color)) return color
    }
  }
  for (const animation of document.getAnimations()) animation.finish()
  const texts = [...document.querySelectorAll('body *')].filter(({ tagName, childNodes }) =>
    !['title', 'desc', 'NOSCRIPT', 'OPTION'].includes(tagName) && [...childNodes].some(({ nodeType, data }) => nodeType === 3 && data.trim() !== ''))
  return texts.flatMap(element => {
    const { color, fill } = getComputedStyle(element)
    const [one, other] = [luminance(element.tagName === 'text' ? fill : color), luminance(groundOf(element))].sort((a, b) => b - a)
    const ratio = (one + 0.05) / (other + 0.05)
    return ratio < 4.5 ? [element.textContent + ': ' + ratio.toFixed(2)] : []
  })
})()`

t.test('the page connects again after a restart, and shows what the new sandbox has', needsChromium, async t => {
  const first = await startSandbox(t)
  await track(first, pair('before', randomUUID()))
  const page = await openPage(t, first.url, { isInterrupted: true })
  await shows(page, '#rows', 'before')
  await first.app.close()
  await shows(page, '#connection', 'Not connected')
  t.equal(await page.locator('#rows tr').count(), 1, 'what arrived stays on the page')
  const second = createSandbox({ token: TOKEN })
  t.teardown(() => second.app.close())
  second.ledger.add('track', pair('meanwhile', randomUUID()))
  await second.app.listen({ host: '127.0.0.1', port: Number(new URL(first.url).port) })
  await page.waitForSelector('#connection.live')
  await shows(page, '#rows', 'meanwhile')
  await track(first, pair('after', randomUUID()))
  await shows(page, '#rows', 'after')
  t.same((await rowsOf(page)).map(([, user]) => user), ['after', 'meanwhile'])
})

t.test('the page tries again while too many pages are open', needsChromium, async t => {
  const sandbox = await startSandbox(t)
  const streams = await Promise.all(Array.from({ length: 16 }, () => openStream(t, sandbox)))
  const opening = openPage(t, sandbox.url, { isInterrupted: true })
  await sleep(1000)
  for (const { close } of streams) close()
  await shows(await opening, '#connection', 'Live')
})

t.test('an id that looks like markup is text', needsChromium, async t => {
  const sandbox = await startSandbox(t)
  const page = await openPage(t, sandbox.url)
  const markup = '<img src=x onerror=alert(1)>'
  await track(sandbox, [
    pair(markup, randomUUID(), { [markup]: markup }), pair('</title><script>alert(2)</script>', 'no-uuid'),
    { event: markup, properties: { token: TOKEN, distinct_id: markup } }, { event: markup, properties: { token: '', distinct_id: markup } }
  ])
  await hasRows(page, 4)
  t.match((await rowsOf(page)).map(row => row.slice(0, 3)), [[markup, markup], [markup, markup], ['$identify', '</title><script>alert(2)</script>'], ['$identify', markup]])
  t.equal(await page.locator('main img, main script').count(), 0)
  await shows(page, 'figcaption', `${markup}: 1 anonymous id`)
})

t.test('a page of another origin can neither read nor change the sandbox', needsChromium, async t => {
  const sandbox = await startSandbox(t)
  const foreign = await startSandbox(t)
  await track(sandbox, pair('secret-user', randomUUID()))
  const page = await openPage(t, foreign.url, { isInterrupted: true })
  const url = `${sandbox.url}/__sandbox`
  const results = await page.evaluate(async url => Promise.all([
    fetch(`${url}/events`), fetch(`${url}/faults`, { method: 'POST', mode: 'no-cors', body: '[{"name":"hang"}]' }), fetch(url, { method: 'DELETE' })
  ].map(answer => answer.then(() => 'answered', () => 'refused'))), url)
  t.same(results, ['refused', 'refused', 'refused'], 'its own policy refuses them already')
  const plain = await browser.newContext()
  t.teardown(() => plain.close())
  const other = await plain.newPage()
  await other.goto(`${foreign.url}/__sandbox/livez`)
  await other.evaluate(async url => Promise.all([
    fetch(`${url}/events`), fetch(`${url}/stream`), fetch(`${url}/faults`, { method: 'POST', mode: 'no-cors', body: '[{"name":"hang"}]' }),
    fetch(url, { method: 'DELETE' })
  ].map(answer => answer.catch(() => {}))), url)
  t.same(sandbox.faults.pending(), [])
  t.equal(sandbox.ledger.rows().length, 1)
})
