import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { request } from 'node:http'
import { connect, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { createClusters } from '#src/sandbox/clusters.js'
import { createFeed, type Update } from '#src/sandbox/feed.js'
import { createFaultScript } from '#src/sandbox/faults.js'
import { createLedger } from '#src/sandbox/ledger.js'
import { createRefusals } from '#src/sandbox/refusals.js'
import { createStreams } from '#src/sandbox/streams.js'
import { startSandbox, TOKEN, type Env } from './helper.ts'

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
  await addFaults(sandbox, { name: 'edge_down', times: 2 }, { name: 'wait', ms: 1 }, { name: 'internal' }, { name: 'mute_zero' })
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
  t.same(await next(2), [
    ['repeat', 'track', '$identify', 'u1', anon, 'These ids had merged before.'], ['refused', 'track', '$identify', 'u5', anon, 'token, missing or empty.']
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
  for (let index = 0; index < 600; index++) ledger.add('track', pair(`u${index}`, randomUUID(), { long }))
  const rows = ledger.rows()
  t.ok(JSON.stringify(rows).length < 150_000)
  t.equal(ledger.dropped() + rows.length, 601)
  t.equal(ledger.clusters(9999).total, 500)
  const { counts, rows: shown, clusters } = feed.update(false)
  t.equal(counts.events, 601)
  t.equal(shown.at(-1)?.id, 'row-600')
  t.equal(clusters.total, 500)
  ledger.add('track', pair('second', first))
  t.equal(ledger.rows().at(-1)?.outcome, 'merged', 'a forgotten id is free')
  ledger.clear()
  t.same([ledger.rows(), ledger.dropped(), ledger.clusters(9)], [[], 0, { total: 0, clusters: [] }])
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
