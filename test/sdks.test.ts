import { randomUUID } from 'node:crypto'
import { connect } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { deflateSync, gzipSync } from 'node:zlib'
import { SignJWT } from 'jose'
import { t, type Test } from 'tap'
import { runAdminCommand } from '#src/commands/admin.js'
import { openMetrics } from '#src/metrics.js'
import type { Received } from '#src/sandbox/app.js'
import { emptied, leaks, listen, needsRedis, startRedis, startRelay, TOKEN, type Env, type Relay } from './helper.ts'
import { connectRedis } from '#src/redis.js'
import { silentLog } from '#src/log.js'
import { exchange } from './raw-http.ts'

type Options = Parameters<typeof startRelay>[1]
const compat = (env: Env = {}): Env => ({ COMPAT: 'events', ...env })
const start = (t: Test, env: Env = {}, more: Options = {}) => startRelay(t, { env: compat(env), ...more })

const DEVICE = '$device:5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11'
const PAGE = 'https://app.example.com'
/** In seconds: Mixpanel refuses events that are too old. */
const NOW = Math.floor(Date.now() / 1000)
const PIXEL = 'R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7'

interface Event { event: string, properties: Record<string, unknown>, [sibling: string]: unknown }
const event = (properties: Record<string, unknown> = {}, name = 'Sign up'): Event =>
  ({ event: name, properties: { token: 'dummy', distinct_id: 'user-42', ...properties } })
const identify = (user = `user-${randomUUID()}`, anon = `$device:${randomUUID()}`, more = {}): Event =>
  event({ distinct_id: user, $user_id: user, $anon_distinct_id: anon, ...more }, '$identify')

const base64 = (data: unknown) => Buffer.from(typeof data === 'string' ? data : JSON.stringify(data)).toString('base64')
const form = (fields: Record<string, string>) => new URLSearchParams(fields).toString()
const FORM = 'application/x-www-form-urlencoded'

/** Sends a body to /track, by default JSON with `verbose=1`. */
const track = (relay: Pick<Relay, 'inject'>, payload: unknown, { query = '?verbose=1', headers = {} as Env, remoteAddress = '127.0.0.1' } = {}) => relay.inject({
  method: 'POST', url: `/track${query}`, headers: { 'content-type': 'application/json', ...headers }, payload: typeof payload === 'string' || Buffer.isBuffer(payload) ? payload : JSON.stringify(payload), remoteAddress
})

/** The text of the data of each request that Mixpanel got. */
const sent = ({ sandbox }: Pick<Relay, 'sandbox'>) => sandbox.requests.map(({ body }: Received) => String(new URLSearchParams(body).get('data')))
/** The events that Mixpanel got. */
const received = (relay: Pick<Relay, 'sandbox'>) => sent(relay).flatMap(text => JSON.parse(text) as Event[])

t.test('without COMPAT the paths of the SDKs are 404, with a word on what to do', async t => {
  const relay = await startRelay(t)
  for (const method of ['GET', 'POST']) {
    for (const url of ['/track', '/track/', '/engage', '/groups/', '/track?data=e30', '/engage/x', '/import', '/flags/definitions', '/settings', '/record/']) {
      const answer = await relay.inject({ method, url, ...method === 'POST' && { payload: [event()] } })
      t.match(answer.json(), { status: 404, code: 'not_found', detail: /POST \/identify.*COMPAT/ }, `${method} ${url}`)
    }
  }
  t.notMatch((await relay.inject({ url: '/tracks' })).json().detail, /COMPAT/)
  t.same(relay.sandbox.requests, [])
})

t.test('with COMPAT the SDKs are served on /track, and told on the other paths that nothing is forwarded', async t => {
  const relay = await start(t)
  for (const url of ['/track', '/track/']) {
    t.match(await relay.inject({ method: 'POST', url, payload: [event()] }), { statusCode: 200, payload: '1', headers: { 'content-type': 'text/plain' } })
    t.match(await relay.inject({ url: `${url}?data=${base64(event())}` }), { statusCode: 200, payload: '1' })
  }
  t.equal(received(relay).length, 4)
  for (const url of ['/engage', '/engage/', '/groups', '/groups/']) {
    t.match(await relay.inject({ method: 'POST', url, payload: [{ $token: 'dummy' }] }), { statusCode: 200, payload: '0' })
    t.match(await relay.inject({ url }), { statusCode: 200, payload: '0' })
    const verbose = await relay.inject({ method: 'POST', url, headers: { 'content-type': FORM }, payload: 'data={}&verbose=1' })
    t.match(verbose.json(), { status: 0, error: /forward/ })
    t.match(await relay.inject({ method: 'DELETE', url }), { statusCode: 405, payload: '0', headers: { allow: 'GET, POST' } })
  }
  for (const url of ['/import', '/flags', '/flags/definitions', '/settings/', '/record/', '/track/other', '/engage/x', '/groups/x']) {
    for (const method of ['GET', 'POST']) {
      const answer = await relay.inject({ method, url, ...method === 'POST' && { payload: [event()] } })
      t.match(answer, { statusCode: 404, headers: { 'content-type': 'application/json' } }, url)
      t.match(answer.json(), { status: 0, error: /forward/ })
    }
  }
  for (const method of ['PUT', 'DELETE', 'OPTIONS', 'HEAD']) t.match(await relay.inject({ method, url: `/track?data=${base64(event())}` }), { statusCode: 405, headers: { allow: 'GET, POST' } }, method)
  t.equal(received(relay).length, 4, 'nothing else was sent')
})

t.test('COMPAT=identify forwards events that merge alone', async t => {
  const relay = await startRelay(t, { env: { COMPAT: 'identify' } })
  const answer = await track(relay, [event(), identify('user-1'), event()])
  t.match(answer.json(), { status: 1, error: /^2 of 3 events refused; the first: COMPAT=identify/ })
  t.match((await track(relay, event())).json(), { status: 0, error: /COMPAT=identify/ })
  t.same(received(relay).map(one => one.event), ['$identify'])
})

t.test('data is read in every form in which the SDKs send it', async t => {
  const relay = await start(t)
  const unusual = { a: 'ÿ?>~ \u00e9\u{1F600}&=+%', n: 'x'.repeat(3) }
  const json = JSON.stringify([event(unusual)])
  const encoded = base64(json)
  const urlSafe = encoded.replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', '')
  t.match(encoded, /[+/]/, 'the example has characters that forms change')
  const rows: [name: string, headers: Env, payload: string | Buffer][] = [
    ['JSON', { 'content-type': 'application/json' }, json],
    ['JSON with a charset', { 'content-type': 'application/json; charset=UTF-8' }, json],
    ['JSON as text', { 'content-type': 'text/plain;charset=UTF-8' }, json],
    ['JSON with a byte order mark', { 'content-type': 'application/json' }, `\ufeff ${json}`],
    ['a form with base64', { 'content-type': FORM }, form({ data: encoded })],
    ['a form with raw base64', { 'content-type': FORM }, `data=${encoded}`],
    ['a form with spaces for +', { 'content-type': FORM }, `data=${encoded.replaceAll('+', ' ')}`],
    ['a form with %20 for +', { 'content-type': FORM }, `data=${encoded.replaceAll('+', '%20')}`],
    ['a form with url-safe base64', { 'content-type': FORM }, `data=${urlSafe}`],
    ['a form with plain JSON', { 'content-type': FORM }, form({ data: json, verbose: '1', ip: '0' })],
    ['a form with JSON that is hardly encoded', { 'content-type': FORM }, `data=${json.replaceAll('%', '%25').replaceAll('&', '%26').replaceAll('+', '%2b')}`],
    ['a form with other fields', { 'content-type': FORM }, `callback=x&redirect=http://x&test=1&_=1&&x&data=${urlSafe}&data=e30`],
    ['a form as text', { 'content-type': 'text/plain;charset=UTF-8' }, form({ data: encoded })],
    ['a form in utf8', { 'content-type': `${FORM};charset=utf8` }, form({ data: encoded })],
    ['a form without a type', {}, form({ data: encoded })],
    ['gzip of a form', { 'content-type': FORM, 'content-encoding': 'gzip' }, gzipSync(form({ data: encoded }))],
    ['gzip of JSON', { 'content-type': 'application/json', 'content-encoding': 'GZIP' }, gzipSync(json)]
  ]
  for (const [name, headers, payload] of rows) {
    const answer = await relay.inject({ method: 'POST', url: '/track/?verbose=1', headers, payload })
    t.match(answer.json(), { error: null, status: 1 }, name)
    t.match(received(relay).at(-1)?.properties, { ...unusual, token: TOKEN }, name)
  }
  for (const query of [form({ data: json }), form({ data: encoded }), `data=${urlSafe}`, `ip=0&verbose=0&data=${encodeURIComponent(encoded)}`]) {
    t.match(await relay.inject({ url: `/track?${query}` }), { statusCode: 200, payload: '1' })
    t.match(received(relay).at(-1)?.properties, unusual)
  }
  t.match(await relay.inject({ method: 'POST', url: `/track?data=${urlSafe}` }), { payload: '1' }, 'a POST may have its data in the query')
  t.match((await track(relay, event(unusual))).json(), { status: 1 }, 'one object')
})

t.test('verbose and ip count from the query and from the form, and the query wins', async t => {
  const relay = await start(t)
  const post = (query: string, fields: Record<string, string>) => relay.inject({
    method: 'POST', url: `/track${query}`, headers: { 'content-type': FORM }, payload: form({ data: JSON.stringify(event()), ...fields }), remoteAddress: '192.0.2.7'
  })
  t.equal((await post('', { verbose: '1' })).body, '{"error":null,"status":1}')
  t.equal((await post('?verbose=1', {})).body, '{"error":null,"status":1}')
  t.equal((await post('?verbose=0', { verbose: '1' })).body, '1')
  t.equal((await post('', {})).body, '1')
  await post('?ip=0', { ip: '1' })
  t.notOk('ip' in received(relay).at(-1)!.properties)
  await post('', { ip: '1' })
  t.equal(received(relay).at(-1)!.properties.ip, '192.0.2.7')
  for (const query of ['?img=1', '?img=1&verbose=1']) {
    for (const data of [base64(event()), 'junk']) {
      const pixel = await relay.inject({ url: `/track${query}&data=${data}` })
      t.match(pixel, { statusCode: 200, headers: { 'content-type': 'image/gif', 'cache-control': 'no-store' } })
      t.equal(pixel.rawPayload.toString('base64'), PIXEL)
    }
  }
})

t.test('an event goes up byte for byte, but for its token', async t => {
  const relay = await start(t)
  const rows: [before: string, after: string][] = [
    ['{"event":"a","properties":{"token":"T","distinct_id":9007199254740993,"$insert_id":"i","time":NOW}}', ''],
    ['{ "properties" : { "x" : 1.50, "y":[1e400,{"token":"mine"}], "token" : "T" , "time":NOW } , "$mp_metadata":{"n":12345678901234567890} , "event":"\\u0061" }', ''],
    ['{"event":"a","properties":{"token":"T","a":"\\"}{][,\\\\","token":"U","t\\u006fken":null,"time":NOW}}', '{"event":"a","properties":{"token":"T","a":"\\"}{][,\\\\","token":"T","t\\u006fken":"T","time":NOW}}'],
    ['{"event":"a","properties":{"token":{"a":[1,"}"]},"time":NOW,"cut":"\\ud83d"}}', '{"event":"a","properties":{"token":"T","time":NOW,"cut":"\\ud83d"}}'],
    ['{"event":"a","properties":{"time":NOW}}', '{"event":"a","properties":{"token":"T","time":NOW}}'],
    ['{"event":"a","properties":{"token":"T","time":NOW,"__proto__":{"x":1},"constructor":{"prototype":1}}}', '']
  ]
  const texts = rows.map(([before, after]) => [before, after || before].map(text => text.replaceAll('NOW', String(NOW))) as [string, string])
  for (const [before, after] of texts) {
    t.match((await track(relay, before)).json(), { status: 1, error: null }, before)
    t.equal(sent(relay).at(-1), after.trim().replaceAll('"T"', JSON.stringify(TOKEN)))
  }
  const list = texts.map(([before]) => before)
  t.match((await track(relay, ` [ ${list.join(' ,\n ')} ] `)).json(), { status: 1, error: null })
  t.equal(sent(relay).at(-1), `[${texts.map(([, after]) => after).join().replaceAll('"T"', JSON.stringify(TOKEN))}]`)
})

t.test('an event without time gets the time of arrival, and an $insert_id if its bytes are unique', async t => {
  const relay = await start(t)
  const sendOne = async (properties: Record<string, unknown>, siblings = {}) => {
    t.match((await track(relay, { ...event(properties), ...siblings })).json(), { status: 1, error: null })
    return received(relay).at(-1)!.properties
  }
  t.match(Math.abs(Number((await sendOne({})).time) - Date.now() / 1000) < 5, true)
  t.same(await sendOne({ time: '2026-11-27' }), { token: TOKEN, distinct_id: 'user-42', time: '2026-11-27' }, 'a time that is none stays')
  t.notOk('$insert_id' in await sendOne({}), 'two equal events may be two events')
  t.notOk('$insert_id' in await sendOne({ time: NOW }))
  t.equal((await sendOne({ time: NOW + 0.5, $insert_id: 'own' })).$insert_id, 'own')
  t.equal((await sendOne({ time: NOW + 0.5, $insert_id: null })).$insert_id, null)
  for (const [properties, siblings] of [[{ time: NOW + 0.5 }, {}], [{ time: NOW * 1000 }, {}], [{}, { $mp_metadata: { $mp_event_id: 'e1' } }]] as const) {
    const one = (await sendOne(properties, siblings)).$insert_id
    t.match(one, /^[0-9a-f]{32}$/)
    t.equal((await sendOne({ ...properties, token: 'another' }, siblings)).$insert_id, one, 'a repeat has the same one, with another token too')
    t.not((await sendOne({ ...properties, more: 1 }, siblings)).$insert_id, one)
  }
  for (const siblings of [{ $mp_metadata: null }, { $mp_metadata: {} }]) t.notOk('$insert_id' in await sendOne({}, siblings))
  const importing = await start(t, { MIXPANEL_ENDPOINT: 'import' })
  t.match((await track(importing, [event(), event()])).json(), { status: 1, error: null })
  const [one, two] = JSON.parse(String(importing.sandbox.requests[0]?.body)) as [Event, Event]
  t.match([one.properties.$insert_id, two.properties.$insert_id], [/^[0-9a-f-]{36}$/, /^[0-9a-f-]{36}$/], '/import needs one')
  t.not(one.properties.$insert_id, two.properties.$insert_id)
})

t.test('characters that the JavaScript SDK has encoded in two halves are joined, and half a character stays half', async t => {
  const relay = await start(t)
  const halves = (text: string) => Buffer.concat(Array.from({ length: text.length }, (_, index) => {
    const unit = text.charCodeAt(index)
    return unit < 0x80 ? Buffer.from([unit]) : Buffer.from([unit >> 12 | 224, unit >> 6 & 63 | 128, unit & 63 | 128])
  }))
  const data = halves(`[{"event":"a","properties":{"a":"\u{1F600}x\u{1F468}","cut":"${'\ud83d'}","time":${NOW}}}]`).toString('base64')
  const answer = await relay.inject({ method: 'POST', url: '/track?verbose=1', headers: { 'content-type': FORM }, payload: form({ data }) })
  t.match(answer.json(), { status: 1, error: null })
  t.equal(sent(relay)[0], `{"event":"a","properties":{"token":${JSON.stringify(TOKEN)},"a":"\u{1F600}x\u{1F468}","cut":"\\ud83d","time":${NOW}}}`)
})

t.test('an element that is no event is refused alone', async t => {
  const relay = await start(t)
  const deep = (depth: number) => `{"event":"deep","properties":{"time":${NOW},"a":${'['.repeat(depth)}${']'.repeat(depth)}}}`
  const tokens = (count: number) => `{"event":"tokens","properties":{"time":${NOW}${',"token":""'.repeat(count)}}}`
  const large = (bytes: number) => `{"event":"large","properties":{"time":${NOW},"a":"${'x'.repeat(bytes - 61)}"}}`.padEnd(bytes)
  const good = [deep(99), tokens(10), large(1_000_000)]
  const bad = ['7', 'null', '""', '[]', '{}', '[{"event":"a","properties":{}}]', '{"event":7,"properties":{}}', '{"event":"","properties":{}}', '{"event":"a"}', '{"event":"a","properties":null}',
    '{"event":"a","properties":[]}', '{"event":"a" "properties":{}}', '{"event":"a","properties":{"a":NaN}}', '{"event":"a","event":"b","properties":{}}', '{"event":"a","properties":{},"properties":{}}',
    '{"event":"a","properties":{"distinct_id":"a","d\\u0069stinct_id":"b"}}', deep(100), tokens(11), large(1_000_001), `{"event":"a","properties":{"a":"${'\xff'}"}}`, '']
  for (const one of bad) {
    const answer = await track(relay, Buffer.from(`[${[good[0], one, good[1]].join()}]`, one.includes('\xff') ? 'latin1' : 'utf8'))
    t.match(answer.json(), { status: 1, error: /^1 of 3 events refused; the first: / }, one.slice(0, 80))
  }
  t.match((await track(relay, `[${good.join()}]`)).json(), { status: 1, error: null }, 'what fills each bound is taken')
  t.equal(received(relay).filter(one => one.event === 'deep').length, bad.length + 1)
  t.ok(received(relay).every(one => one.event !== 'a'))
  t.match((await track(relay, '{"event":"a"}')).json(), { status: 0, error: /object with event and properties/ })
})

t.test('data that cannot be read is 200 and 0, with the reason', async t => {
  const relay = await start(t)
  const rows: [payload: string | Buffer, headers: Env, reason: RegExp][] = [
    ['', {}, /data is required/],
    ['data=', { 'content-type': FORM }, /data must be JSON/],
    ['x=1', { 'content-type': FORM }, /data is required/],
    ['data=junk', { 'content-type': FORM }, /data must be JSON/],
    [form({ data: base64('7') }), { 'content-type': FORM }, /data must be JSON/],
    ['%zz&data', { 'content-type': FORM }, /data is required/],
    ['[]', {}, /at least one event/],
    [' [ ] ', {}, /at least one event/],
    ['[{"event":"a","properties":{}}', {}, /data must be JSON/],
    ['[{"event":"a","properties":{}}]x', {}, /data must be JSON/],
    ['not gzip', { 'content-encoding': 'gzip' }, /must be gzip/],
    [gzipSync('[{"event":"a","properties":{}}]').subarray(0, -9), { 'content-encoding': 'gzip' }, /must be gzip/],
    [deflateSync('[]'), { 'content-encoding': 'deflate' }, /content encoding/],
    ['[]', { 'content-type': 'application/json; charset=latin1' }, /Send JSON/],
    ['x'.repeat(200), { 'content-type': 'nonsense' }, /data is required|Send JSON/],
    ['&'.repeat(200) + 'data=%5B%5D', { 'content-type': FORM }, /data is required/]
  ]
  for (const [payload, headers, reason] of rows) {
    const answer = await track(relay, payload, { headers })
    t.match(answer, { statusCode: 200, headers: { 'content-type': 'application/json' } }, `${String(payload).slice(0, 40)} ${JSON.stringify(headers)}`)
    t.match(answer.json(), { status: 0, error: reason })
  }
  t.match(await relay.inject({ url: '/track' }), { statusCode: 200, payload: '0' })
  t.same(relay.sandbox.requests, [])
})

t.test('the token of each event is replaced by itself, and that of another project is logged', async t => {
  const relay = await start(t)
  const tokens = ['dummy', '', 'a'.repeat(32), 7, null, { deep: 'x' }, TOKEN]
  t.match((await track(relay, tokens.map(token => event({ token })))).json(), { status: 1, error: null })
  t.same(received(relay).map(one => one.properties.token), tokens.map(() => TOKEN))
  await track(relay, event({ token: 'b'.repeat(32) }))
  const lines = relay.logged().filter(({ msg }) => msg === 'events with the token of another project')
  t.match(lines, [{ level: 40, count: 1 }], 'once, and not its token')
  t.notMatch(relay.lines.join(), /a{32}/)
  relay.sandbox.faults.add({ name: 'echo', times: 9 })
  const echo = await track(relay, event())
  t.equal(echo.json().status, 0)
  t.same(leaks(echo.body), [])
  t.match(echo.body, /\*\*\*/, 'the words of Mixpanel are masked')
})

t.test('the answer tells what was refused, and what an SDK should send again', async t => {
  const relay = await start(t)
  const one = (given: unknown, query = '?verbose=1') => track(relay, given, { query })
  relay.sandbox.faults.add({ name: 'edge_down', times: 2 })
  const away = await one([event(), event({ distinct_id: 7, $user_id: 7 }, '$identify')])
  t.match(away, { statusCode: 503, headers: { 'retry-after': '10', 'content-type': 'application/json' } })
  t.match(away.json(), { status: 0, error: /^1 of 2 events failed; the first: Mixpanel was unreachable/ }, 'a failure that a repeat may change goes before a refusal')
  relay.sandbox.faults.add({ name: 'rate_limited', retry_after: '3' })
  t.match(await one(event(), ''), { statusCode: 503, payload: '0', headers: { 'retry-after': '3', 'content-type': 'text/plain' } })
  const limited = await start(t, { RATE_LIMIT_MAX: '10' })
  t.match(await track(limited, Array.from({ length: 11 }, () => event())), { statusCode: 413 }, 'more than any window admits: the JavaScript SDK halves its batch')
  t.match(await track(limited, Array.from({ length: 9 }, () => event())), { statusCode: 200 })
  const beyond = await track(limited, [event()], { query: '' })
  t.match(beyond, { statusCode: 429, payload: '0', headers: { 'retry-after': /^\d+$/ } })
  const fresh = await start(t, { RATE_LIMIT_MAX: '10' })
  t.equal((await track(fresh, event())).statusCode, 200)
  const many = await track(fresh, Array.from({ length: 10 }, () => event()))
  t.match(many, { statusCode: 429, headers: { 'retry-after': /^\d+$/ } }, 'events count, not requests')
  t.match(many.json(), { status: 0 })
  t.equal((await track(fresh, Array.from({ length: 8 }, () => event()))).statusCode, 200, 'refused events do not count')

  const failing = await start(t)
  for (const [fault, status, error] of [
    ['unauthorized', 503, /rejected the credentials/], ['redirect', 503, /not one that Mixpanel gives/], ['refused', 200, /event, invalid/], ['temporary_failure', 503, /unreachable/]
  ] as const) {
    failing.sandbox.faults.add({ name: fault, times: 9 })
    const answer = await track(failing, event())
    t.equal(answer.statusCode, status, fault)
    t.match(answer.json(), { status: 0, error })
    failing.sandbox.faults.clear()
  }
  const full = await start(t, { MAX_IN_FLIGHT: '3' })
  full.sandbox.faults.add({ name: 'wait', ms: 300 })
  const [first, second] = await Promise.all([track(full, [event(), event()]), sleep(50).then(() => track(full, [event(), event()]))])
  t.equal(first.statusCode, 200)
  t.match(second, { statusCode: 503, headers: { 'retry-after': '1' } }, 'no room for a whole batch, so none of it is sent')
  t.equal((await track(full, Array.from({ length: 4 }, () => event()))).statusCode, 413, 'it would never have room')
  t.equal(received(full).length, 2)
})

t.test('an error in the relay is 500 and 0', async t => {
  const relay = await start(t)
  relay.relay.track = async () => { throw new Error('a bug') }
  t.match(await track(relay, event(), { query: '' }), { statusCode: 500, payload: '0' })
  t.match(relay.logged().at(-2), { level: 50, msg: 'unhandled error' })
  relay.relay.hasRoom = () => { throw new Error('a bug') }
  t.match((await track(relay, event())).json(), { status: 0, error: /The relay failed/ })
})

t.test('the bad event of one client is not the refusal of another', async t => {
  const relay = await start(t)
  relay.sandbox.faults.add({ name: 'wait', ms: 200, times: 6 })
  const insertIds = Array.from({ length: 40 }, () => randomUUID())
  const old = event({ time: NOW - 10 * 86_400, $insert_id: 'old' })
  const others = Array.from({ length: 6 }, () => event())
  const answers = await Promise.all([...others, ...insertIds.map((id, index) => index === 20 ? old : event({ $insert_id: id }))].map(one => track(relay, one)))
  t.same(answers.flatMap((answer, index) => answer.json().status === 1 ? [] : [index]), [26])
  t.equal(answers[26]?.json().error, 'time, too old')
  t.ok(relay.sandbox.requests.length < 30, 'they share requests')
})

t.test('the log line and the metrics of a request count its events by kind and reason, and have no id', async t => {
  const metrics = await openMetrics('1')
  const relay = await start(t, {}, { metrics })
  await track(relay, [event(), event(), identify('user-secret'), identify('null'), 7, event({ alias: 'a', distinct_id: 'b' }, '$merge')], { query: '?verbose=1&who=user-secret' })
  t.match(relay.logged().at(-1), { route: '/track', status: 200, events: 6, refused: 3, msg: 'request completed' })
  t.notOk('code' in relay.logged().at(-1)!)
  await track(relay, 7)
  t.match(relay.logged().at(-1), { events: 0, refused: 0, code: 'invalid_request' })
  await track(relay, identify('null'))
  t.match(relay.logged().at(-1), { events: 1, refused: 1, code: 'invalid_identity' })
  relay.sandbox.faults.add({ name: 'edge_down', times: 2 })
  await track(relay, event())
  t.match(relay.logged().at(-1), { events: 1, refused: 0, failed: 1, code: 'mixpanel_unreachable', status: 503 })
  await track(relay, Array.from({ length: 2001 }, () => 7))
  t.match(relay.logged().at(-1), { status: 413, events: 2001, code: 'body_too_large' })
  t.notMatch(relay.lines.join(), /user-secret/)
  const text = await metrics.render({ gauges: {}, droppedLogLines: 0, secrets: [] })
  const lines = text.split('\n').filter(line => line.startsWith('identify_relay_events_total'))
  t.same(lines.sort(), [
    'identify_relay_events_total{kind="identify",outcome="accepted",reason="accepted"} 1',
    'identify_relay_events_total{kind="identify",outcome="refused",reason="invalid_identity"} 2',
    'identify_relay_events_total{kind="invalid",outcome="refused",reason="invalid_event"} 1',
    'identify_relay_events_total{kind="ordinary",outcome="accepted",reason="accepted"} 2',
    'identify_relay_events_total{kind="ordinary",outcome="failed",reason="mixpanel_unreachable"} 1',
    'identify_relay_events_total{kind="ordinary",outcome="refused",reason="not_forwarded"} 1',
    'identify_relay_events_total{kind="unread",outcome="failed",reason="body_too_large"} 2001',
    'identify_relay_events_total{kind="unread",outcome="failed",reason="invalid_request"} 0'
  ])
})

t.test('a listed page can read every answer, and a foreign one gets 403', async t => {
  const relay = await start(t, { CORS_ORIGINS: PAGE, RATE_LIMIT_MAX: '20', JWT_SECRET: 'CANARY-JWT of at least 32 bytes, this one' })
  const headers = { origin: PAGE }
  const cors = { 'access-control-allow-origin': PAGE, 'access-control-allow-credentials': 'true', vary: 'Origin' }
  t.match(await track(relay, event(), { headers }), { statusCode: 401, headers: cors })
  t.match(await relay.inject({ url: '/track', headers }), { statusCode: 401, headers: cors })
  for (const url of ['/engage', '/flags/x']) t.match(await relay.inject({ method: 'POST', url, headers, payload: [] }), { headers: cors })
  const ask = { ...headers, 'access-control-request-method': 'POST' }
  for (const url of ['/track/', '/engage', '/flags/x']) {
    const preflight = await relay.inject({ method: 'OPTIONS', url, headers: { ...ask, 'access-control-request-headers': 'x-own,content-type' } })
    t.match(preflight, { statusCode: 204, headers: { ...cors, 'access-control-allow-headers': 'x-own,content-type' } })
  }
  for (const more of [{}, { 'access-control-request-headers': 'a\nb' }, { 'access-control-request-headers': 'x,'.repeat(40) }]) {
    const preflight = await relay.inject({ method: 'OPTIONS', url: '/track', headers: { ...ask, ...more } })
    t.match(preflight, { statusCode: 204, headers: { 'access-control-allow-headers': /content-type.*authorization.*traceparent/ } })
  }
  const identity = await relay.inject({ method: 'OPTIONS', url: '/identify', headers: { ...ask, 'access-control-request-headers': 'x-own' } })
  t.notMatch(identity.headers['access-control-allow-headers'], /x-own/)
  while ((await track(relay, event(), { headers })).statusCode !== 429);
  t.match(await track(relay, event(), { headers }), { statusCode: 429, headers: { ...cors, 'retry-after': /^\d+$/ } })

  const open = await start(t, { CORS_ORIGINS: PAGE })
  for (const origin of ['https://evil.test', 'null', '']) {
    for (const url of ['/track', '/engage']) {
      const foreign = await open.inject({ method: 'POST', url, headers: { origin, 'content-type': 'text/plain' }, payload: form({ data: base64(event()) }) })
      t.match(foreign, { statusCode: 403, payload: '0' })
      t.notOk('access-control-allow-origin' in foreign.headers)
      t.match(await open.inject({ url: `${url}?data=${base64(event())}`, headers: { origin } }), { statusCode: 403, payload: '0' })
    }
    t.equal((await open.inject({ method: 'OPTIONS', url: '/track', headers: { ...ask, origin } })).statusCode, 403)
  }
  for (const name of ['edge_down', 'refused', 'rate_limited'] as const) {
    open.sandbox.faults.add({ name, times: 2 })
    t.match(await track(open, event(), { headers }), { headers: cors }, name)
    open.sandbox.faults.clear()
  }
})

t.test('a page cannot merge with a request that hides its origin', async t => {
  const relay = await start(t)
  const get = (one: unknown, headers: Env, query = '') => relay.inject({ url: `/track?data=${base64(one)}${query}`, headers })
  for (const site of ['cross-site', 'same-site']) {
    const headers = { 'sec-fetch-site': site, 'sec-fetch-mode': 'no-cors' }
    t.match(await get(event(), headers), { statusCode: 403, payload: '0' })
    t.match(await get(identify(), headers), { statusCode: 403, payload: '0' })
    t.match(await get(identify(), headers, '&img=1'), { statusCode: 403, headers: { 'content-type': 'image/gif' } }, 'a pixel that merges')
    t.match(await get([event(), identify('null')], headers, '&img=1'), { statusCode: 403 }, 'a pixel that would merge')
    t.match(await track(relay, event(), { headers }), { statusCode: 403 }, 'a POST')
    t.match(await relay.inject({ url: '/engage', headers }), { statusCode: 403 })
  }
  t.same(relay.sandbox.requests, [])
  t.match(await get(event(), { 'sec-fetch-site': 'cross-site' }, '&img=1'), { statusCode: 200, headers: { 'content-type': 'image/gif' } }, 'a pixel in a mail')
  t.match(await get(identify(), { 'sec-fetch-site': 'none', 'sec-fetch-mode': 'navigate' }), { statusCode: 403 }, 'a click on a link in a mail')
  t.match(await get(event(), { 'sec-fetch-site': 'none', 'sec-fetch-mode': 'navigate' }), { statusCode: 200 })
  t.match(await get(identify(), { 'sec-fetch-site': 'same-origin', 'sec-fetch-mode': 'cors' }), { statusCode: 200 })
  t.equal(received(relay).length, 3)
  const listed = await start(t, { CORS_ORIGINS: PAGE })
  t.match(await track(listed, identify(), { headers: { origin: PAGE, 'sec-fetch-site': 'same-site', 'sec-fetch-mode': 'cors' } }), { statusCode: 200 }, 'a page that names its origin')

  const simplified = await start(t, { MIXPANEL_ID_MERGE: 'simplified' })
  const both = event({ $user_id: 'user-42', $device_id: randomUUID() })
  t.match(await simplified.inject({ url: `/track?img=1&data=${base64(both)}`, headers: { 'sec-fetch-site': 'cross-site' } }), { statusCode: 403 })
  t.same(simplified.sandbox.requests, [])
})

t.test('ip=1 gives an event the address of its caller, and the relay never says ip=1', async t => {
  const relay = await start(t, { TRUST_PROXY: '10.0.0.0/8' })
  const rows: [query: string, properties: Record<string, unknown>, remote: string, forwarded: string | undefined, ip: unknown][] = [
    ['?ip=1', {}, '192.0.2.7', undefined, '192.0.2.7'],
    ['?ip=1', {}, '192.0.2.7', '198.51.100.1', '192.0.2.7'],
    ['?ip=1', {}, '10.0.0.1', '198.51.100.1', '198.51.100.1'],
    ['?ip=1', {}, '::ffff:192.0.2.7', undefined, '192.0.2.7'],
    ['?ip=1', {}, '2001:db8::1', undefined, '2001:db8::1'],
    ['?ip=1', {}, '10.0.0.1', 'unknown', undefined],
    ['?ip=1', { ip: '203.0.113.9' }, '192.0.2.7', undefined, '203.0.113.9'],
    ['?ip=1', { ip: null }, '192.0.2.7', undefined, null],
    ['?ip=0', {}, '192.0.2.7', undefined, undefined],
    ['', {}, '192.0.2.7', undefined, undefined]
  ]
  for (const [query, properties, remoteAddress, forwarded, ip] of rows) {
    const headers = forwarded === undefined ? {} : { 'x-forwarded-for': forwarded }
    t.equal((await track(relay, event(properties), { query, headers, remoteAddress })).body, '1')
    t.equal(received(relay).at(-1)!.properties.ip, ip, `${query} ${remoteAddress} ${forwarded}`)
  }
  t.ok(relay.sandbox.requests.every(({ url }) => url === '/track?ip=0'))
})

t.test('the bytes of a request and the number of its events are bounded, unpacked too', async t => {
  const relay = await start(t, { RATE_LIMIT_MAX: '1000000000' })
  const MAX = 10 * 1024 * 1024
  const padded = (length: number) => JSON.stringify([event()]).padEnd(length)
  t.match(await track(relay, padded(MAX)), { statusCode: 200 })
  t.match((await track(relay, padded(MAX + 1))), { statusCode: 413 })
  const pack = (body: string) => track(relay, gzipSync(body, { level: 1 }), { headers: { 'content-encoding': 'gzip' } })
  t.match(await pack(padded(MAX)), { statusCode: 200 })
  t.match(await pack(padded(MAX + 1)), { statusCode: 413 })
  const bomb = await pack('x'.repeat(200 * 1024 * 1024))
  t.match(bomb, { statusCode: 413 })
  t.match(bomb.json(), { status: 0 })
  t.match(await track(relay, Array.from({ length: 2000 }, () => event({ $insert_id: 'x' }))), { statusCode: 200 })
  t.match(await track(relay, Array.from({ length: 2001 }, () => event())), { statusCode: 413 })
  const small = await start(t, { MAX_BYTES_IN_FLIGHT: '20000' })
  const gzip = { headers: { 'content-encoding': 'gzip' } }
  t.match(await track(small, gzipSync(padded(14_000)), gzip), { statusCode: 200 })
  t.match(await track(small, gzipSync(padded(16_000)), gzip), { statusCode: 503, headers: { 'retry-after': '1' } }, 'three quarters of MAX_BYTES_IN_FLIGHT')
  t.match(await track(small, padded(16_000)), { statusCode: 503 })
  t.match(await small.inject({ url: '/readyz?verbose' }), { payload: /"bytes_in_flight":0/ })
})

t.test('with COMPAT the head of a request may have 32 KiB', async t => {
  const relay = await listen(t, { env: compat({ CORS_ORIGINS: PAGE }) })
  const get = (length: number, more = '') => `GET /track?verbose=1&data=${base64(event({ text: 'x'.repeat(length) }))} HTTP/1.1\r\nhost: x\r\norigin: ${PAGE}\r\n${more}\r\n`
  const fits = await exchange(relay.port, get(23_000), { answers: 1 })
  t.match(fits, /^HTTP\/1.1 200 /)
  const tooLong = await exchange(relay.port, get(26_000))
  t.match(tooLong, /^HTTP\/1.1 431 [^]*access-control-allow-origin: https:\/\/app.example.com[^]*\r\n\r\n\{"error":"[^"]+","status":0\}$/)
  const other = await exchange(relay.port, `GET /identify?x=${'x'.repeat(40_000)} HTTP/1.1\r\nhost: x\r\n\r\n`)
  t.match(other, /^HTTP\/1.1 431 [^]*application\/problem\+json/)
  const without = await listen(t, {})
  t.match(await exchange(without.port, get(14_000)), /^HTTP\/1.1 431 [^]*application\/problem\+json/)
})

t.test('what never reaches a handler is answered as the SDKs read it', async t => {
  const relay = await listen(t, { env: compat({ CORS_ORIGINS: PAGE }) })
  const cases: [name: string, bytes: string, answer: RegExp][] = [
    ['two hosts', 'GET /track HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n', /^HTTP\/1.1 400 [^]*text\/plain[^]*\r\n\r\n0$/],
    ['no HTTP', `GET /track?verbose=1 HTTP/1.1\r\nhost: x\r\norigin: ${PAGE}\r\nbad header\r\n\r\n`, /^HTTP\/1.1 400 [^]*allow-origin: https:[^]*"status":0\}$/],
    ['no HTTP, from a foreign page', 'GET /track HTTP/1.1\r\nhost: x\r\norigin: https://evil.test\r\nbad header\r\n\r\n', /^HTTP\/1.1 400 (?![^]*allow-origin)[^]*\r\n\r\n0$/],
    ['bytes that are nothing', 'nothing\r\n\r\n', /^HTTP\/1.1 400 [^]*problem\+json/],
    ['a length that is none', 'POST /track HTTP/1.1\r\nhost: x\r\ncontent-length: x\r\n\r\n', /^HTTP\/1.1 400 [^]*\r\n\r\n0$/],
    ['a slow body', `POST /track?verbose=1 HTTP/1.1\r\nhost: x\r\norigin: ${PAGE}\r\ncontent-length: 100\r\n\r\ndata=`, /^HTTP\/1.1 408 [^]*allow-origin: https:[^]*"status":0\}$/],
    ['a slow body of a foreign page', 'POST /track HTTP/1.1\r\nhost: x\r\norigin: https://evil.test\r\ncontent-length: 100\r\n\r\ndata=', /^HTTP\/1.1 40[38] [^]*\r\n\r\n0$/],
    ['a slow head', 'POST /track HTTP/1.1\r\nhost: x\r\n', /^HTTP\/1.1 408 [^]*problem\+json/],
    ['a slow body elsewhere', 'POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{', /^HTTP\/1.1 408 [^]*problem\+json/]
  ]
  await Promise.all(cases.map(async ([name, bytes, answer]) => t.match(await exchange(relay.port, bytes, { ms: 15_000 }), answer, name)))
})

t.test('a refused request is read before its answer, which has the form that its body asks for', async t => {
  const relay = await listen(t, { env: compat({ API_KEYS: 'CANARY-KEY-of-a-service' }) })
  const head = (length: number, more = '') => `POST /track HTTP/1.1\r\nhost: x\r\ncontent-type: ${FORM}\r\n${more}content-length: ${length}\r\n\r\n`
  const python = `data=${'x'.repeat(500_000)}&verbose=1&ip=0`
  t.match(await exchange(relay.port, head(python.length) + python, { answers: 1 }), /^HTTP\/1.1 401 [^]*"status":0\}$/)
  const php = `data=${'x'.repeat(500_000)}`
  t.match(await exchange(relay.port, head(php.length) + php, { answers: 1 }), /^HTTP\/1.1 401 [^]*\r\n\r\n0$/)
  t.match(await exchange(relay.port, head(2_000_000), { answers: 1 }), /^HTTP\/1.1 401 [^]*\r\n\r\n0$/, 'a long body is not read')
  const chunk = 'x'.repeat(65_536)
  const endless = `POST /track HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n${`10000\r\n${chunk}\r\n`.repeat(20)}`
  t.match(await exchange(relay.port, endless, { answers: 1 }), /^HTTP\/1.1 401 [^]*\r\n\r\n0$/, 'nor one without an end')
  const broken = await new Promise<boolean>(resolve => {
    const socket = connect(relay.port, '127.0.0.1', () => socket.write(head(100) + 'data='))
    setTimeout(() => socket.destroy(), 100)
    socket.on('close', () => resolve(true))
  })
  t.ok(broken, 'the relay outlives a peer that leaves meanwhile')
  while (!relay.lines.some(line => line.includes('"status":401') && line.includes('unauthenticated'))) await sleep(10)
  t.same(relay.sandbox.requests, [])
})

const UUID = '5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11'
const alias = (to: unknown, from: unknown) => event({ alias: to, distinct_id: from }, '$create_alias')
const reasonOf = async (relay: Relay, one: Event, headers: Env = {}): Promise<string | null> => (await track(relay, one, { headers })).json().error

t.test('an event that merges obeys the rules of POST /identify', async t => {
  const relay = await start(t)
  const good: Event[] = [
    identify('user-1', DEVICE), identify('user-1', UUID.toUpperCase()), event({ distinct_id: undefined, $identified_id: 'u', $anon_id: UUID }, '$identify'),
    event({ distinct_id: 'u', $identified_id: 'u', $anon_id: UUID, $anon_distinct_id: UUID }, '$identify'),
    alias('user-1', DEVICE), alias('user-1', UUID), alias('user-1', 'user-2')
  ]
  for (const one of good) t.equal(await reasonOf(relay, one), null, JSON.stringify(one))
  t.same(received(relay).map(one => ({ ...one.properties, time: 0 })), good.map(one => ({ ...JSON.parse(JSON.stringify(one)).properties, token: TOKEN, time: 0 })))
  const bad: [Event, RegExp][] = [
    ...['null', '0', '', 'anonymous', '[object Object]', ' u', DEVICE, 'x'.repeat(256)].map((id): [Event, RegExp] => [identify(id), /properties\.distinct_id /]),
    ...[7, null, { a: 1 }, ['u'], true].map((id): [Event, RegExp] => [identify(id as never), /properties\.distinct_id must be string/]),
    ...['previous-user', '', '0', `${UUID} `, '00000000-0000-4000-8000-000000000000', 'a-b-c-d-e', `$device:${DEVICE}`].map((id): [Event, RegExp] => [identify('u', id), /properties\.\$anon_distinct_id /]),
    [event({ distinct_id: 'u' }, '$identify'), /properties\.\$anon_distinct_id is required/],
    [event({ distinct_id: undefined, $anon_id: UUID }, '$identify'), /properties\.distinct_id is required/],
    [event({ $identified_id: 'u', $anon_id: '----', distinct_id: 'u' }, '$identify'), /properties\.\$anon_id must be a UUID/],
    [event({ $identified_id: 'a', distinct_id: 'b', $anon_id: UUID }, '$identify'), /properties\.distinct_id must be equal to properties\.\$identified_id/],
    [event({ distinct_id: 'a', $user_id: 'b', $anon_id: UUID }, '$identify'), /properties\.\$user_id must be equal to properties\.distinct_id/],
    [event({ distinct_id: 'a', $anon_id: UUID, $anon_distinct_id: DEVICE }, '$identify'), /properties\.\$anon_distinct_id must be equal to properties\.\$anon_id/],
    [identify(UUID, DEVICE), /must not be equal to/],
    [alias('null', DEVICE), /properties\.alias /], [alias(undefined, DEVICE), /properties\.alias is required/], [alias(7, 'user-2'), /properties\.alias must be string/],
    [alias('u', '$device:x'), /properties\.distinct_id /], [alias('u', UUID.replace('-4', '-1')), /properties\.distinct_id /], [alias('u', 'null'), /properties\.distinct_id /],
    [alias('u', 'U'), /properties\.alias must not be equal to distinct_id/], [alias(DEVICE, DEVICE), /properties\.alias /], [alias(undefined, 'user-2'), /properties\.alias is required/],
    [event({ $distinct_ids: ['a', 'b'] }, '$merge'), /\$merge/]
  ]
  for (const [one, reason] of bad) t.match(String(await reasonOf(relay, one)), reason, JSON.stringify(one))
  t.ok(received(relay).length <= good.length + 1)
  t.match(await reasonOf(relay, event({ distinct_id: 2 ** 53, $anon_id: UUID }, '$identify')), /must be string/, 'a number is rounded into no other user')

  const older = await start(t, { ANON_ID_FORMAT: 'sdk' })
  t.equal(await reasonOf(older, identify('u', 'a1-b2-c3-d4-e5')), null)
})

t.test('with Simplified ID Merge every event with both ids obeys the rules, and $identify is inert', async t => {
  const relay = await start(t, { MIXPANEL_ID_MERGE: 'simplified' }, { sandbox: { mode: 'simplified' } })
  const both = (user: unknown, device: unknown, more = {}, name?: string) => event({ $user_id: user, $device_id: device, ...more }, name)
  const good = [
    both('user-1', UUID), both('user-1', DEVICE), both('user-1', 'any id'), both(undefined, UUID), both(null, UUID), both('null', undefined), both('user-1', null), event({ $user_id: 'user-1', distinct_id: `$device:${randomUUID()}` }),
    both('user-1', UUID, {}, '$identify'), identify('user-1', 'previous-user')
  ]
  for (const one of good) t.equal(await reasonOf(relay, one), null, JSON.stringify(one))
  t.match(relay.sandbox.ledger.rows().map(({ outcome }) => outcome), ['merged', 'repeat', 'merged', 'stored', 'stored', 'stored', 'stored', 'stored', 'ignored_simplified', 'ignored_simplified'])
  const bad: [Event, RegExp][] = [
    [both('null', UUID), /properties\.\$user_id /], [both('', UUID), /properties\.\$user_id /], [both(7, UUID), /properties\.\$user_id must be string/], [both('u', 'null'), /properties\.\$device_id /],
    [both('u', 7), /properties\.\$device_id must be string/], [both('u', 'U'), /must not be equal/], [both('null', UUID, {}, '$identify'), /properties\.\$user_id /],
    [event({ $user_id: 'null', distinct_id: DEVICE }), /properties\.\$user_id /], [both('u', undefined, { distinct_id: '$device:$device:x' }), /properties\.distinct_id /]
  ]
  for (const [one, reason] of bad) t.match(String(await reasonOf(relay, one)), reason, JSON.stringify(one))
  t.equal(received(relay).length, good.length)

  const importing = await start(t, { MIXPANEL_ID_MERGE: 'simplified', MIXPANEL_ENDPOINT: 'import' }, { sandbox: { mode: 'simplified' } })
  t.match((await track(importing, [identify(), both('user-1', UUID), alias('a', 'b')])).json(), { status: 1, error: /^2 of 3 events refused; the first: \$identify has no effect/ })
  t.equal(importing.sandbox.ledger.rows().length, 1)
})

t.test("a user's token merges as its own claim alone, and only a service merges two users", async t => {
  const secret = 'CANARY-JWT of at least 32 bytes, this one'
  const relay = await start(t, { JWT_SECRET: secret, API_KEYS: 'CANARY-KEY-of-a-service' })
  const token = await new SignJWT({}).setSubject('user-1').setProtectedHeader({ alg: 'HS256' }).setExpirationTime('1m').sign(Buffer.from(secret))
  const user = { authorization: `Bearer ${token}` }
  const service = { authorization: 'Bearer CANARY-KEY-of-a-service' }
  t.equal(await reasonOf(relay, identify('user-1', DEVICE), user), null)
  t.equal(await reasonOf(relay, alias('user-1', UUID), user), null)
  t.equal(await reasonOf(relay, event({ distinct_id: 'another' }), user), null, 'an ordinary event merges nothing')
  t.match(await reasonOf(relay, identify('user-2', DEVICE), user), /properties\.distinct_id is not the user of the token/)
  t.match(await reasonOf(relay, event({ distinct_id: undefined, $identified_id: 'user-2', $anon_id: UUID }, '$identify'), user), /properties\.\$identified_id is not the user/)
  t.match(await reasonOf(relay, alias('user-2', DEVICE), user), /properties\.alias is not the user/)
  t.match(await reasonOf(relay, alias('user-1', 'user-2'), user), /properties\.distinct_id is a user/)
  t.equal(await reasonOf(relay, alias('user-1', 'user-2'), service), null)
  t.equal(await reasonOf(relay, identify('user-3', DEVICE), service), null)
  for (const headers of [{}, { authorization: `Basic ${base64('dummy:')}` }, { authorization: 'Bearer wrong' }] as Env[]) {
    t.match(await track(relay, event(), { headers, query: '' }), { statusCode: 401, payload: '0', headers: { 'www-authenticate': 'Bearer' } })
  }
  const anonymous = await start(t, { API_KEYS: 'CANARY-KEY-of-a-service', ALLOW_ANONYMOUS: 'true' })
  t.equal(await reasonOf(anonymous, identify()), null)
  t.match(await reasonOf(anonymous, alias('user-1', 'user-2')), /only a service/)
  const simplified = await start(t, { JWT_SECRET: secret, MIXPANEL_ID_MERGE: 'simplified' })
  t.match(await reasonOf(simplified, event({ $user_id: 'user-2', $device_id: UUID }), user), /properties\.\$user_id is not the user/)
})

t.test('the merge guard counts the events of SDKs too, and none that does not merge', async t => {
  const relay = await start(t, { MAX_ANON_PER_USER: '2' })
  const answers = await track(relay, [identify('user-1'), identify('user-1'), identify('user-1'), event(), event(), event()])
  t.match(answers.json(), { status: 1, error: /^1 of 6 events refused; the first: The user already has/ })
})

t.test('claims on one anonymous id keep their order, equal pairs share an array, and other events overtake both', async t => {
  const relay = await start(t, { MIXPANEL_ID_MERGE: 'simplified' }, { sandbox: { mode: 'simplified' } })
  const of = (user: string) => event({ $user_id: user, $device_id: UUID, $insert_id: randomUUID() })
  relay.sandbox.faults.add({ name: 'wait', ms: 1500 })
  const pending = [track(relay, Array.from({ length: 50 }, () => of('first')))]
  // A long request is read in slices, and others may overtake it until it is read.
  while (relay.sandbox.requests.length === 0) await sleep(5)
  for (const events of [of('second'), [of('third'), of('third')], of('first')]) {
    pending.push(track(relay, events))
    await sleep(5)
  }
  t.match((await track(relay, Array.from({ length: 300 }, () => event()))).json(), { status: 1, error: null })
  t.equal(relay.sandbox.requests.length, 7, 'fifty events of one device are one request, and 300 others six more')
  for (const answer of await Promise.all(pending)) t.equal(answer.json().error, null)
  const users = received(relay).map(one => one.properties.$user_id).filter(user => user !== undefined)
  t.same(users, [...Array.from({ length: 50 }, () => 'first'), 'second', 'third', 'third', 'first'])
  t.equal(relay.sandbox.requests.length, 10)

  const failing = await start(t, { MAX_BATCH: '1' })
  failing.sandbox.faults.add({ name: 'rate_limited' })
  const answer = await track(failing, [identify('first', DEVICE), identify('second', DEVICE)])
  t.equal(answer.statusCode, 503)
  t.equal(failing.sandbox.requests.length, 1, 'after a retryable failure the later claims of a batch are not sent')
})

t.test('an answer comes within 8 s, whatever DEADLINE_MS says', async t => {
  const env = { DEADLINE_MS: '60000', MIXPANEL_TIMEOUT_MS: '60000' }
  const [relay, stored] = [await start(t, env), await start(t, { ...env, OUTBOX: `file:${t.testdir({})}` })]
  for (const { sandbox } of [relay, stored]) sandbox.faults.add({ name: 'hang', times: 100 })
  const since = performance.now()
  // A bug in the outbox must not keep an answer back.
  const stuck = await start(t)
  stuck.relay.track = () => new Promise(() => {})
  const [without, withOutbox, late] = await Promise.all([relay, stored, stuck].map(one => track(one, [event(), identify()])))
  t.ok(performance.now() - since < 8200)
  t.match(without, { statusCode: 503, headers: { 'retry-after': '10' } })
  t.match(withOutbox?.json(), { status: 1, error: null }, 'with an outbox it is queued by then')
  t.match(late, { statusCode: 503 })
  t.match(late?.json(), { status: 0, error: /did not answer in time/ })
  stored.sandbox.faults.clear()
})

t.test('with an outbox an outage is 200 and 1, and every event arrives as it came', async t => {
  const outboxes: [name: string, env: Env, redis?: Awaited<ReturnType<typeof connectRedis>>][] = [['file', { OUTBOX: `file:${t.testdir({})}` }]]
  if (!needsRedis.skip) {
    const { url } = await startRedis(t)
    const redis = await connectRedis(url, silentLog, { isRequired: true, uses: [] })
    t.teardown(() => redis.disconnect())
    outboxes.push(['redis', { OUTBOX: 'redis', REDIS_URL: url }, redis])
  }
  for (const [name, env, redis] of outboxes) {
    const relay = await start(t, { ...env, DEADLINE_MS: '1000' }, redis && { redis })
    relay.sandbox.faults.add({ name: 'edge_down', times: 1000 })
    const events = [
      event({ n: 1, time: NOW, token: 'x' }), identify('user-1', DEVICE), event({ n: 2, token: undefined }), alias('user-1', UUID), event({ text: '\u{1F600}'.repeat(5000) }),
      identify('user-2', DEVICE), identify('null'), event({ distinct_id: undefined })
    ]
    t.match((await track(relay, events)).json(), { status: 1, error: /^1 of 8 events refused/ }, name)
    t.match((await track(relay, '{"event":"twice","properties":{"token":"a","token":"b","time":1764000000}}'.replace('1764000000', String(NOW)))).json(), { status: 1, error: null })
    const { waiting } = relay.outbox.counts()
    t.equal(waiting, 8)
    const listed = await relay.outbox.waiting(10)
    const merging = listed.filter(({ event: one }) => one?.anonKey !== undefined)
    t.same(merging.map(({ event: one }) => [one?.userId, one?.anonKey]), [['user-1', UUID], ['user-1', UUID], ['user-2', UUID]], 'what is read again merges as before')
    t.same(listed.filter(one => !merging.includes(one)).map(({ event: one }) => one?.userId).sort(), ['', '', 'user-42', 'user-42', 'user-42'])
    const output: string[] = []
    for await (const line of runAdminCommand(relay.outbox, relay.config, ['list'])) output.push(line)
    const ids = output.map(line => JSON.parse(line)).map(({ identified_id: user, anon_id: anon }) => `${user} ${anon}`).sort()
    t.same(ids, [' undefined', ' undefined', `user-1 ${DEVICE}`, `user-1 ${UUID}`, `user-2 ${DEVICE}`, ...Array.from({ length: 3 }, () => 'user-42 undefined')], 'an operator sees the ids')
    const before = relay.sandbox.requests.length
    relay.sandbox.faults.clear()
    await emptied(relay)
    const arrived = sent({ sandbox: { requests: relay.sandbox.requests.slice(before) } as never }).flatMap(text => [JSON.parse(text)].flat() as Event[])
    const expected = [...events.filter(one => one.properties.distinct_id !== 'null'), { event: 'twice', properties: {} }]
    t.equal(new Set(arrived.map(one => JSON.stringify(one))).size, expected.length)
    const plain = ({ event: name, properties: { token, time, ...rest } }: Event) => JSON.stringify([name, Object.entries(rest).filter(([, value]) => value !== undefined).sort()])
    t.same(arrived.map(plain).sort(), expected.map(plain).sort())
    t.ok(arrived.every(({ properties: { time } }) => Math.abs(Number(time) - NOW) < 60))
    t.ok(arrived.every(one => one.properties.token === TOKEN))
    const claims = arrived.filter(one => one.properties.$anon_distinct_id === DEVICE).map(one => one.properties.distinct_id)
    t.equal(claims[0], 'user-1', 'the first claim is first')
  }
})

t.test('a queued $identify without effect becomes a dead letter before /import refuses all others for it', async t => {
  const OUTBOX = `file:${t.testdir({})}`
  const simplified = { MIXPANEL_ID_MERGE: 'simplified', OUTBOX, DEADLINE_MS: '1000' }
  const first = await start(t, simplified, { sandbox: { mode: 'simplified' } })
  await first.outbox.pause(true)
  const old = event({ time: NOW - 10 * 86_400, $insert_id: 'old' })
  t.match((await track(first, [identify('user-1', 'previous'), event({ $insert_id: 'a' }), event({ $insert_id: 'b' }), old])).json(), { status: 1, error: null })
  await first.app.close()
  await first.outbox.close()
  // The teardown closes it too.
  first.outbox.close = async () => {}
  const next = await start(t, { ...simplified, MIXPANEL_ENDPOINT: 'import' }, { sandbox: { mode: 'simplified' } })
  await next.outbox.pause(false)
  await emptied(next)
  t.match(await next.outbox.dead(10), [{ reason: 'no effect with Simplified ID Merge' }])
  t.same(next.sandbox.ledger.rows().map(({ properties }) => properties.$insert_id).sort(), ['a', 'b', 'old'], 'events of any age')
})

t.test("an operator can erase a user's events, and the log has no id of an event that Mixpanel refuses", async t => {
  const relay = await start(t, { OUTBOX: `file:${t.testdir({})}` })
  await relay.outbox.pause(true)
  await track(relay, [event({ distinct_id: 'erased' }), event({ $user_id: 'erased', distinct_id: 'x' }), event({ distinct_id: 'kept-user', $device_id: 'kept-device', $insert_id: 'kept' })])
  const output: string[] = []
  for await (const line of runAdminCommand(relay.outbox, relay.config, ['drop', '--user', 'erased'])) output.push(line)
  t.same(output, ['2 queued and 0 dead letters dropped.\n'])
  relay.sandbox.faults.add({ name: 'echo', times: 9 })
  await relay.outbox.pause(false)
  await emptied(relay)
  const line = relay.logged().find(({ msg }) => msg === 'identities dead-lettered')
  t.match(line, { identities: 1, insert_ids: ['kept'] })
  t.notMatch(JSON.stringify(line), /kept-user|kept-device/)
})
