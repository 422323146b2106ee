import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { t } from 'tap'
import { identity, leaks, startRelay, startSandbox, TOKEN } from './helper.ts'
import { readConfig } from '../src/config.ts'
import { identifyEvent } from '../src/identity/event.ts'
import { baseUrl, createMixpanel } from '../src/mixpanel/client.ts'
import { interpretBody, interpretError } from '../src/mixpanel/answer.ts'
import type { Received } from '../src/sandbox/app.ts'

const UUID = '5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11'
const nested = (depth: number): unknown => depth === 0 ? 1 : { a: nested(depth - 1) }
const properties = (count: number) => Object.fromEntries(Array.from({ length: count }, (_, index) => [`p${index}`, index]))

t.test('a valid identity becomes one $identify event, byte for byte', async t => {
  const { post, sandbox } = await startRelay(t)
  for (const identified of ['user-42', 'a+b&c%20d@x.com', 'é', '😀', 'a=b', 'x'.repeat(255), '😀'.repeat(255), 'a b', '"\\', '%']) {
    for (const anon of [randomUUID(), randomUUID().toUpperCase(), `$device:${randomUUID()}`]) {
      const answer = await post({ identified_id: identified, anon_id: anon })
      t.equal(answer.statusCode, 200)
      t.equal(answer.body, '{"status":"accepted"}')
      const { method, url, headers, body } = sandbox.requests.at(-1) as Received
      t.match({ method, url, headers }, {
        method: 'POST', url: '/track?ip=0', headers: { 'content-type': 'application/x-www-form-urlencoded' }
      })
      const form = [...new URLSearchParams(body)]
      t.same(form.map(([name]) => name), ['data'])
      t.match(JSON.parse(form[0]?.[1] ?? ''), {
        event: '$identify',
        properties: {
          token: TOKEN,
          distinct_id: identified,
          $identified_id: identified,
          $anon_id: anon,
          time: Number,
          $insert_id: /^[A-Za-z0-9-]{32}$/
        }
      })
      t.ok(Math.abs(JSON.parse(form[0]?.[1] ?? '').properties.time - Date.now() / 1000) < 60, 'time is in seconds')
      t.notOk('authorization' in headers)
    }
  }
  t.equal(sandbox.requests.length, 30, 'one request each')
})

t.test('additional properties travel; a repeat has the same $insert_id, other ids another one', async t => {
  const { post, sandbox } = await startRelay(t)
  const one = identity({ distinct_id: 'user-42', identified_id: 'user-42', properties: { plan: 'pro', deep: { a: [1, null] } } })
  await post(one)
  await post(one)
  await post(identity())
  const [first, second, third] = sandbox.ledger.rows()
  t.match(first, { outcome: 'merged', properties: { plan: 'pro', deep: { a: [1, null] } } })
  t.equal(second?.outcome, 'repeat')
  t.equal(first?.properties.$insert_id, second?.properties.$insert_id)
  t.not(first?.properties.$insert_id, third?.properties.$insert_id)
})

t.test('every broken field is named, and nothing is sent', async t => {
  const { post, sandbox } = await startRelay(t)
  const bad: [given: unknown, pointers: string[]][] = [
    [{ identified_id: undefined }, ['/identified_id']],
    [{ anon_id: undefined }, ['/anon_id']],
    [{ identified_id: '' }, ['/identified_id']],
    [{ identified_id: 'x'.repeat(256) }, ['/identified_id']],
    ...[42, null, true, ['u'], { a: 1 }].flatMap(value => [
      [{ identified_id: value }, ['/identified_id']], [{ anon_id: value }, ['/anon_id']]
    ] as [unknown, string[]][]),
    ...['null', 'NULL', 'Anonymous', 'anon', 'nil', 'none', 'n/a', 'NA', 'undefined', 'Unknown', '<NIL>', '0', '-1', 'TRUE',
      'false', '[]', '{}', '[object Object]', '00000000-0000-0000-0000-000000000000', ' user', 'user ', '\u00a0user', '\tuser',
      'us\u0000er', 'us\ner', 'us\u007fer', 'us\u0085er', `$device:${UUID}`, '$device:x', ' '
    ].map(value => [{ identified_id: value }, ['/identified_id']] as [unknown, string[]]),
    [{ identified_id: UUID, anon_id: UUID }, ['/identified_id']],
    ...['', '12345', UUID.replaceAll('-', ''), `{${UUID}}`, `${UUID} `, UUID.replace('-4', '-1'), UUID.replace('-9', '-c'),
      `$Device:${UUID}`, `$device:$device:${UUID}`, '00000000-0000-0000-0000-000000000000',
      '$device:00000000-0000-0000-0000-000000000000', `${UUID}\n`, '13bbf7943e584-0885c2531-5c793977-3e8000-13bbf7943e64cf'
    ].map(value => [{ anon_id: value }, ['/anon_id']] as [unknown, string[]]),
    [{ distinct_id: 'another' }, ['/distinct_id']],
    [{ distinct_id: 7 }, ['/distinct_id']],
    [{ token: 'x' }, ['/token']],
    [{ 'a/b~c': 1 }, ['/a~1b~0c']],
    [{ properties: [] }, ['/properties']],
    [{ properties: 'x' }, ['/properties']],
    [{ properties: null }, ['/properties']],
    [{ properties: properties(201) }, ['/properties']],
    [{ properties: { ['x'.repeat(256)]: 1 } }, [`/properties/${'x'.repeat(256)}`]],
    ...['token', 'time', 'distinct_id', '$insert_id', '$anon_id', '$anon_distinct_id', '$ignore', 'bucket', 'mp_lib', 'ip'
    ].map(name => [{ properties: { [name]: 1 } }, [`/properties/${name}`]] as [unknown, string[]]),
    [{ properties: nested(4) }, ['/properties/a']],
    [{ properties: { a: { ['x'.repeat(256)]: 1 } } }, ['/properties/a']],
    [{ properties: { a: [[[]]] } }, ['/properties/a']],
    [{ properties: { a: Array(255).fill(0) } }, ['/properties/a']],
    [{ identified_id: 'null', anon_id: 'x', distinct_id: 'y', more: 1, properties: { token: 1, ok: 1, $ignore: true } },
      ['/more', '/anon_id', '/properties/token', '/properties/$ignore', '/identified_id', '/distinct_id']]
  ]
  for (const [given, pointers] of bad) {
    const answer = await post(identity(given as Record<string, unknown>))
    const problem = answer.json()
    t.match(problem, { status: 400, code: 'invalid_request', retryable: false, title: 'Bad Request' }, JSON.stringify(given).slice(0, 80))
    t.same(problem.errors.map((error: { pointer: string }) => error.pointer), pointers, JSON.stringify(given).slice(0, 80))
    for (const { detail } of problem.errors) t.match(detail, /^(must|is|has) /)
    t.equal(answer.headers['content-type'], 'application/problem+json')
  }
  const json = { headers: { 'content-type': 'application/json' } }
  const raw: [body: string | Buffer, pointer: string][] = [
    ['', ''], ['{', ''], ['[]', ''], ['"x"', ''], ['null', ''], ['1', ''],
    [`{"__proto__":{"a":1},"identified_id":"u","anon_id":"${UUID}"}`, '/__proto__'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"__proto__":{"a":1}}}`, '/properties/__proto__'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"a":{"__proto__":1}}}`, '/properties/a'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"constructor":{"prototype":1}}}`, '/properties/constructor'],
    [Buffer.from(`{"identified_id":"jos\u00e9","anon_id":"${UUID}"}`, 'latin1'), ''],
    [`{"identified_id":"\\ud800","anon_id":"${UUID}"}`, '/identified_id'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"a":1e999}}`, '/properties/a'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"a":"\\ud800"}}`, '/properties/a'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"a":{"\\ud800":1}}}`, '/properties/a'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"\\ud800":1}}`, '/properties/\ud800']
  ]
  for (const [body, pointer] of raw) {
    const answer = await post(body, json)
    t.match(answer.json(), { status: 400, code: 'invalid_request' }, String(body))
    t.same(answer.json().errors.map((error: { pointer: string }) => error.pointer), [pointer], String(body))
  }
  t.match((await post(identity({ properties: nested(3) }))).statusCode, 200)
  t.match((await post(identity({ properties: properties(200) }))).statusCode, 200)
  t.match((await post(identity({ properties: { ['x'.repeat(255)]: 1 } }))).statusCode, 200)
  t.match((await post(`\ufeff{"identified_id":"bom","anon_id":"${UUID}"}`, json)).statusCode, 200)
  t.equal(sandbox.requests.length, 4, 'only the good ones were sent')
  const many = await post(Object.fromEntries(Array.from({ length: 500 }, (_, index) => [`x${index}`, 0])))
  t.equal(many.json().errors.length, 100, 'a hundred are enough')
})

t.test('what Mixpanel answers decides the status', async t => {
  const env = { MIXPANEL_TIMEOUT_MS: '400', DEADLINE_MS: '1500' }
  const retryLater = { 'retry-after': /^\d+$/ }
  const rows: [fault: string, status: number, code: string, requests: number, headers?: Record<string, unknown>][] = [
    ['rate_limited', 503, 'mixpanel_rate_limited', 1, { 'retry-after': '2' }],
    ['rate_limited_plain', 503, 'mixpanel_rate_limited', 1, retryLater],
    ['edge_down', 502, 'mixpanel_unreachable', 2],
    ['bad_gateway', 502, 'mixpanel_unreachable', 2],
    ['gateway_timeout', 502, 'mixpanel_unreachable', 2],
    ['internal', 502, 'mixpanel_unreachable', 2],
    ['request_timeout', 502, 'mixpanel_unreachable', 2],
    ['reset', 502, 'mixpanel_unreachable', 2],
    ['short_body', 502, 'mixpanel_unreachable', 2],
    ['huge_failure', 502, 'mixpanel_unreachable', 2],
    ['temporary_failure', 502, 'mixpanel_unreachable', 3],
    ['null_body', 502, 'mixpanel_misanswered', 2],
    ['empty', 502, 'mixpanel_misanswered', 2],
    ['html', 502, 'mixpanel_misanswered', 2],
    ['gzip', 502, 'mixpanel_misanswered', 2],
    ['huge', 502, 'mixpanel_misanswered', 2],
    ['garbage', 502, 'mixpanel_misanswered', 2],
    ['bad_chunk', 502, 'mixpanel_misanswered', 2],
    ['many_headers', 502, 'mixpanel_misanswered', 2],
    ['no_content', 502, 'mixpanel_misanswered', 1],
    ['redirect', 502, 'mixpanel_misanswered', 1],
    ['redirect_keeping_method', 502, 'mixpanel_misanswered', 1],
    ['too_large', 502, 'mixpanel_misanswered', 1],
    ['uri_too_long', 502, 'mixpanel_misanswered', 1],
    ['unauthorized', 502, 'mixpanel_rejected_credentials', 1],
    ['forbidden', 502, 'mixpanel_rejected_credentials', 1],
    ['hang', 504, 'mixpanel_timed_out', 2],
    ['drip', 504, 'mixpanel_timed_out', 2],
    ['bad_request', 422, 'refused_by_mixpanel', 2],
    ['huge_refusal', 422, 'refused_by_mixpanel', 2],
    ['refused', 422, 'refused_by_mixpanel', 2],
    ['mute_zero', 422, 'refused_by_mixpanel', 2]
  ]
  const permanent = ['refused_by_mixpanel', 'mixpanel_rejected_credentials']
  for (const [fault, status, code, requests, headers = {}] of rows) {
    // Each its own relay: too many failures in a row, and the next one would not be asked.
    const { post, sandbox, logged } = await startRelay(t, env)
    sandbox.faults.add({ name: fault as 'hang', times: 1000 })
    const answer = await post(identity())
    t.equal(answer.statusCode, status, fault)
    t.match(answer.json(), { code, status, retryable: !permanent.includes(code), detail: /\w/, request_id: /\w/ }, fault)
    t.match(answer.headers, { 'cache-control': 'no-store', 'x-request-id': /./, ...headers }, fault)
    t.equal('retry-after' in answer.headers, status === 503, fault)
    // A `0` known to be passing is asked for its reason, then nothing is gained by asking again.
    t.equal(sandbox.requests.length, requests, `${fault}: requests`)
    const bodies = new Set(sandbox.requests.map(({ body }) => body))
    t.equal(bodies.size, 1, `${fault}: the very same bytes`)
    t.match(logged().at(-1), { msg: 'request completed', status, code, insert_id: String }, fault)
  }
})

t.test('the reason for a refusal comes back, without the token', async t => {
  const { post, sandbox } = await startRelay(t)
  sandbox.faults.add({ name: 'refused', times: 2 })
  t.equal((await post(identity())).json().detail, 'event, invalid')
  t.equal(sandbox.requests[1]?.url, '/track?ip=0&verbose=1')
  t.equal(sandbox.requests[0]?.body, sandbox.requests[1]?.body)
  sandbox.faults.add({ name: 'refused' })
  t.equal((await post(identity())).json().status, 'accepted', 'a 0 that turns into a 1 was a passing one')
  sandbox.faults.add({ name: 'refused' }, { name: 'edge_down', times: 2 })
  t.match((await post(identity())).json(), { code: 'refused_by_mixpanel', detail: /no reason/ })
  sandbox.faults.add({ name: 'echo' })
  const { detail } = (await post(identity())).json()
  t.match(detail, /\*\*\*/, 'what Mixpanel quotes is masked')
  t.ok(detail.length <= 500)
  sandbox.faults.add({ name: 'long_echo' })
  const cut = (await post(identity())).json().detail
  t.notMatch(cut, /CANARY/, 'not even a part of it is left where the reason is cut')
})

t.test('one failure is healed by one repeat', async t => {
  const { post, sandbox } = await startRelay(t, { MIXPANEL_TIMEOUT_MS: '400' })
  for (const name of ['edge_down', 'reset', 'reset_after', 'hang', 'null_body', 'temporary_failure', 'close_idle'] as const) {
    sandbox.faults.add({ name })
    t.equal((await post(identity())).statusCode, 200, name)
  }
  const duplicates = sandbox.ledger.rows().length - sandbox.ledger.deduplicated().length
  t.equal(duplicates, 1, 'the answer lost on the way made a row that Mixpanel can tell')
  t.equal(sandbox.ledger.rows().filter(row => row.outcome === 'repeat').length, 1)
})

t.test('nobody listens, or nobody is there', async t => {
  const { post } = await startRelay(t, { MIXPANEL_URL: 'http://127.0.0.1:9' })
  t.match((await post(identity())).json(), { status: 502, code: 'mixpanel_unreachable' })
  const { post: lost } = await startRelay(t, { MIXPANEL_URL: 'http://nowhere.invalid' })
  t.match((await lost(identity())).json(), { status: 502, code: 'mixpanel_unreachable' })
})

t.test('Retry-After of Mixpanel is passed on, within reason', async t => {
  const { post, sandbox } = await startRelay(t)
  const inTenSeconds = new Date(Date.now() + 10_000).toUTCString()
  for (const [given, least, most] of [['7', 7, 7], ['0', 1, 1], ['86400', 60, 60], ['soon', 2, 2], [inTenSeconds, 8, 11]] as const) {
    sandbox.faults.add({ name: 'rate_limited', retry_after: given })
    const seconds = Number((await post(identity())).headers['retry-after'])
    t.ok(seconds >= least && seconds <= most, `${given}: ${seconds}`)
  }
})

t.test('the deadline holds, and a shorter one than the timeout ends the only attempt', async t => {
  const { post, sandbox } = await startRelay(t, { DEADLINE_MS: '800' })
  sandbox.faults.add({ name: 'hang', times: 9 })
  t.match((await post(identity())).json(), { code: 'mixpanel_timed_out', retryable: true })
  t.equal(sandbox.requests.length, 1)
  sandbox.faults.clear()
  sandbox.faults.add({ name: 'wait', ms: 300 })
  t.equal((await post(identity())).statusCode, 200, 'and a late answer is an answer')
})

t.test('with MAX_IN_FLIGHT identities waiting the next one is refused at once', async t => {
  const { post, sandbox, inject } = await startRelay(t, { MAX_IN_FLIGHT: '2' })
  sandbox.faults.add({ name: 'wait', ms: 300, times: 2 })
  const waiting = [post(identity()), post(identity())]
  await new Promise(resolve => setTimeout(resolve, 100))
  t.match((await inject({ url: '/readyz?verbose' })).json(), { status: 'ready', parts: { in_flight: 2 } })
  const refused = await post(identity())
  t.match(refused.json(), { status: 503, code: 'overloaded', retryable: true })
  t.match(refused.headers, { 'retry-after': '1' })
  for (const answer of await Promise.all(waiting)) t.equal(answer.statusCode, 200)
  t.equal(sandbox.ledger.rows().length, 2)
})

t.test('strict=1 asks Mixpanel to validate, dry_run=1 sends nothing', async t => {
  const { post, sandbox } = await startRelay(t)
  t.equal((await post(identity(), { query: '?strict=1' })).body, '{"status":"accepted"}')
  t.match(sandbox.requests[0]?.body, /&strict=1$/)
  t.equal((await post(identity(), { query: '?strict=0' })).statusCode, 200)
  t.notMatch(sandbox.requests[1]?.body, /strict/)
  const dry = await post(identity({ identified_id: 'dry', properties: { plan: 'pro' } }), { query: '?dry_run=1' })
  t.match(dry.json(), {
    event: '$identify',
    properties: { token: '***', distinct_id: 'dry', $identified_id: 'dry', $anon_id: String, $insert_id: String, time: Number, plan: 'pro' }
  })
  t.equal(sandbox.requests.length, 2)
  for (const query of ['?strict=2', '?strict=', '?dryrun=1', '?strict=1&strict=0']) {
    const { status, errors } = (await post(identity(), { query })).json()
    t.match({ status, errors }, { status: 400, errors: [{ pointer: '', detail: /query parameter (strict|dryrun)/ }] }, query)
  }
})

t.test('MIXPANEL_STRICT: every request is strict, and Mixpanel names the reason', async t => {
  const { post, sandbox } = await startRelay(t, { MIXPANEL_STRICT: '1' }, { clock: () => 1_000_000_000 })
  t.match((await post(identity())).json(), { code: 'refused_by_mixpanel', detail: /properties.time.*must not be in the future/ })
  t.match(sandbox.requests[0]?.body, /&strict=1$/)
  t.equal(sandbox.requests.length, 1)
})

t.test('MIXPANEL_ENDPOINT=import: an array with Basic auth', async t => {
  const { post, sandbox } = await startRelay(t, { MIXPANEL_ENDPOINT: 'import' })
  t.equal((await post(identity({ identified_id: 'a+b&c' }))).statusCode, 200)
  const [request] = sandbox.requests
  t.match(request, {
    url: '/import?strict=1',
    headers: { 'content-type': 'application/json', authorization: `Basic ${Buffer.from(`${TOKEN}:`).toString('base64')}` }
  })
  t.match(JSON.parse(request?.body ?? ''), [{ event: '$identify', properties: { $identified_id: 'a+b&c' } }])

  const account = { MIXPANEL_SERVICE_ACCOUNT: 'robot:CANARY-SECRET', MIXPANEL_PROJECT_ID: '7' }
  const robot = await startRelay(t, { MIXPANEL_ENDPOINT: 'import', ...account },
    { serviceAccounts: ['robot:CANARY-SECRET'], projectId: '7' })
  t.equal((await robot.post(identity())).statusCode, 200)
  t.equal(robot.sandbox.requests[0]?.url, '/import?strict=1&project_id=7')
  const wrong = await startRelay(t, { MIXPANEL_ENDPOINT: 'import', ...account })
  t.match((await wrong.post(identity())).json(), { code: 'mixpanel_rejected_credentials' })
  const simplified = await startRelay(t, { MIXPANEL_ENDPOINT: 'import' }, { mode: 'simplified' })
  t.match((await simplified.post(identity())).json(), { code: 'refused_by_mixpanel', detail: /simplified identity management/ })
  const late = await startRelay(t, { MIXPANEL_ENDPOINT: 'import' }, { clock: () => 1 })
  t.match((await late.post(identity())).json(), { code: 'refused_by_mixpanel', detail: /must not be in the future/ })
})

t.test('a gateway with a path, and the three regions', async t => {
  for (const [region, host] of [['us', 'api'], ['eu', 'api-eu'], ['in', 'api-in']]) {
    t.equal(baseUrl(readConfig({ MIXPANEL_TOKEN: 'x', MIXPANEL_REGION: region }, () => '')), `https://${host}.mixpanel.com`)
  }
  const urls: (string | undefined)[] = []
  const server = createServer(({ url }, response) => {
    urls.push(url)
    response.end('1')
  }).listen(0, '127.0.0.1')
  t.teardown(() => server.close())
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  const gateway = createMixpanel(readConfig({ MIXPANEL_TOKEN: 'x', MIXPANEL_URL: `http://127.0.0.1:${port}/mixpanel/` }, () => ''))
  t.teardown(gateway.close)
  t.same(await gateway.send(gateway.encode([identifyEvent(identity(), 0)]), 1000), { code: 'accepted' })
  t.same(urls, ['/mixpanel/track?ip=0'])
})

t.test('records that Mixpanel names, or does not', async t => {
  const answer = (...records: unknown[]) => interpretBody(400, JSON.stringify({ code: 400, error: 'some failed', failed_records: records }))
  const reason = 'one; two'
  t.match(answer({ index: 3, message: 'one' }, { index: 3, message: 'two' }), { reason, records: new Map([[3, reason]]) })
  t.match(answer({ message: 'one' }, 'two'), { reason, records: undefined })
  t.match(interpretBody(200, '{"code":200,"num_records_imported":0,"status":"OK"}'), { code: 'mixpanel_misanswered' })
})

t.test('a request that could not be sent in time is not sent late', async t => {
  const sandbox = await startSandbox(t)
  const mixpanel = createMixpanel(readConfig({ MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: sandbox.url }, () => ''))
  t.teardown(mixpanel.close)
  sandbox.faults.add({ name: 'hang', times: 64 })
  const request = mixpanel.encode([identifyEvent(identity(), 0)])
  const busy = Array.from({ length: 64 }, () => mixpanel.send(request, 400))
  t.match(await mixpanel.send(request, 100), { code: 'mixpanel_timed_out' })
  t.equal(new Set((await Promise.all(busy)).map(verdict => verdict.code)).size, 1)
  t.match(await mixpanel.send(mixpanel.encode([identifyEvent(identity(), 0)], { verbose: true }), 1000), { code: 'refused_by_mixpanel' })
  t.equal(sandbox.requests.length, 65)
})

t.test('errors that no local server can provoke', async t => {
  t.match(interpretError({ name: 'Error', code: 'UND_ERR_CONNECT_TIMEOUT', message: '' }), { code: 'mixpanel_timed_out' })
  t.match(interpretError({ name: 'HTTPParserError', message: '' }), { code: 'mixpanel_misanswered', cause: 'HTTPParserError' })
})

t.test('the search for the token finds it', async t => {
  t.same(leaks(`{"msg":"${TOKEN}"}`), [TOKEN])
  t.same(leaks(`data=${encodeURIComponent(JSON.stringify({ token: TOKEN }))}`), [encodeURIComponent(TOKEN)])
})

t.test('no secret in Mixpanel\'s words, however they are written', async t => {
  const answer = { error: '' }
  const server = createServer((request, response) => response.end(`{"status":0,"error":${answer.error}}`)).listen(0, '127.0.0.1')
  await once(server, 'listening')
  const secret = 'a/CANARY-SECRET:1'
  const mixpanel = createMixpanel(readConfig({
    MIXPANEL_TOKEN: TOKEN, MIXPANEL_SERVICE_ACCOUNT: `relay:${secret}`, MIXPANEL_PROJECT_ID: '1', MIXPANEL_URL: `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  }, () => ''))
  t.teardown(async () => {
    await mixpanel.close()
    server.close()
  })
  const request = mixpanel.encode([identifyEvent({ identified_id: 'u', anon_id: UUID }, 0)])
  for (const one of [TOKEN, secret, `relay:${secret}`]) {
    const base64 = Buffer.from(one).toString('base64')
    const slashed = JSON.stringify(one).replaceAll('/', '\\/')
    const escaped = `"\\u${one.charCodeAt(0).toString(16).padStart(4, '0')}${one.slice(1)}"`
    for (const error of [JSON.stringify(one), slashed, escaped, JSON.stringify(encodeURIComponent(one)), JSON.stringify(base64)]) {
      answer.error = error
      t.match(await mixpanel.send(request, 1000), { code: 'refused_by_mixpanel', reason: /^(relay:)?\*\*\*$/ }, error)
    }
  }
  answer.error = JSON.stringify(`x: ${Buffer.from(`${TOKEN}:`).toString('base64')}`)
  t.match(await mixpanel.send(request, 1000), { reason: 'x: ***' })
})
