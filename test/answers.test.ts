import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { emptied, identity, leaks, startRelay, startRelayWithOutbox, startSandbox, TOKEN } from './helper.ts'
import { readConfig } from '#src/config.js'
import { identifyEvent } from '#src/identity/event.js'
import { baseUrl, createMixpanel } from '#src/mixpanel/client.js'
import { interpretBody, isPartial, interpretError } from '#src/mixpanel/answer.js'

const UUID = '5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11'

t.test('each answer of Mixpanel has its status, its code and its number of requests', async t => {
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
  // Each has a relay of its own, because the breaker of one would open after five failures.
  async function check ([fault, status, code, requests, headers = {}]: typeof rows[0]) {
    const { post, sandbox, logged } = await startRelay(t, { env })
    sandbox.faults.add({ name: fault as 'hang', times: 1000 })
    const answer = await post(identity())
    t.equal(answer.statusCode, status, fault)
    t.match(answer.json(), { code, status, retryable: !permanent.includes(code), detail: /\w/, request_id: /\w/ }, fault)
    t.match(answer.headers, { 'cache-control': 'no-store', 'x-request-id': /./, ...headers }, fault)
    t.equal('retry-after' in answer.headers, status === 503, `${fault}: a 503 has Retry-After, others have not`)
    // After a `0` the relay asks once for the reason, and not again.
    t.equal(sandbox.requests.length, requests, `${fault}: Mixpanel gets ${requests} requests`)
    const bodies = new Set(sandbox.requests.map(({ body }) => body))
    t.equal(bodies.size, 1, `${fault}: each request has the same bytes`)
    t.match(logged().at(-1), { msg: 'request completed', status, code, insert_id: String }, fault)
  }
  for (let first = 0; first < rows.length; first += 8) await Promise.all(rows.slice(first, first + 8).map(check))
})

t.test('a refusal carries Mixpanel\'s reason, with the token masked', async t => {
  const { post, sandbox } = await startRelay(t)
  sandbox.faults.add({ name: 'refused', times: 2 })
  t.equal((await post(identity())).json().detail, 'event, invalid')
  t.equal(sandbox.requests[1]?.url, '/track?ip=0&verbose=1')
  t.equal(sandbox.requests[0]?.body, sandbox.requests[1]?.body)
  sandbox.faults.add({ name: 'refused' })
  t.equal((await post(identity())).json().status, 'accepted', 'a 1 after the 0 is the answer')
  sandbox.faults.add({ name: 'refused' }, { name: 'edge_down', times: 2 })
  t.match((await post(identity())).json(), { status: 502, code: 'mixpanel_unreachable' }, 'the second request may have been taken')
  sandbox.faults.add({ name: 'refused' }, { name: 'rate_limited' })
  t.match((await post(identity())).json(), { code: 'refused_by_mixpanel', detail: /without a reason/ })
  sandbox.faults.add({ name: 'echo' })
  const { detail } = (await post(identity())).json()
  t.match(detail, /\*\*\*/, 'the token in a reason is masked')
  t.ok(detail.length <= 500)
  sandbox.faults.add({ name: 'long_echo' })
  const cut = (await post(identity())).json().detail
  t.notMatch(cut, /CANARY/, 'no part of the token is left where the reason is cut')
})

t.test('one transient failure is repaired by one retry with the same bytes', async t => {
  const { post, sandbox } = await startRelay(t, { env: { MIXPANEL_TIMEOUT_MS: '400' } })
  for (const name of ['edge_down', 'reset', 'reset_after', 'hang', 'null_body', 'temporary_failure', 'close_idle'] as const) {
    sandbox.faults.add({ name })
    t.equal((await post(identity())).statusCode, 200, name)
  }
  const duplicates = sandbox.ledger.rows().length - sandbox.ledger.deduplicated().length
  t.equal(duplicates, 1, 'the lost answer caused one duplicate, which Mixpanel can deduplicate')
  t.equal(sandbox.ledger.rows().filter(row => row.outcome === 'repeat').length, 1)
})

t.test('a refused connection and an unknown host name are 502 mixpanel_unreachable', async t => {
  const { post } = await startRelay(t, { env: { MIXPANEL_URL: 'http://127.0.0.1:9' } })
  t.match((await post(identity())).json(), { status: 502, code: 'mixpanel_unreachable' })
  const { post: postToUnknownHost } = await startRelay(t, { env: { MIXPANEL_URL: 'https://nowhere.invalid' } })
  t.match((await postToUnknownHost(identity())).json(), { status: 502, code: 'mixpanel_unreachable' })
})

t.test('Mixpanel\'s Retry-After is passed on, within 1 to 60 seconds', async t => {
  const inTenSeconds = new Date(Date.now() + 10_000).toUTCString()
  for (const [given, least, most] of [['7', 7, 7], ['0', 1, 1], ['86400', 60, 60], ['soon', 2, 2], [inTenSeconds, 8, 11]] as const) {
    const { post, sandbox } = await startRelay(t)
    sandbox.faults.add({ name: 'rate_limited', retry_after: given })
    const seconds = Number((await post(identity())).headers['retry-after'])
    t.ok(seconds >= least && seconds <= most, `Retry-After ${given} is passed on as ${least} to ${most}, and was ${seconds}`)
  }
})

t.test('Mixpanel\'s Retry-After holds for the callers that follow, with what is left of it', async t => {
  const { post, sandbox, relay, logged } = await startRelay(t, { env: { MAX_BATCH: '1' } })
  sandbox.faults.add({ name: 'rate_limited', retry_after: '2' })
  t.match(await post(identity()), { statusCode: 503, headers: { 'retry-after': '2' } })
  await sleep(1100)
  const held = await post(identity())
  t.match(held.json(), { status: 503, code: 'mixpanel_rate_limited', retryable: true })
  t.equal(held.headers['retry-after'], '1')
  t.match(logged().find(line => line.cause === 'an earlier status 429'), { code: 'mixpanel_rate_limited', status: 503 })
  t.equal(sandbox.requests.length, 1, 'nothing is sent meanwhile')
  await sleep(1000)
  t.equal((await post(identity())).statusCode, 200)
  sandbox.faults.add({ name: 'rate_limited' })
  t.equal((await post(identity())).statusCode, 503)
  t.equal((await post(identity())).statusCode, 200, 'without a Retry-After the next one is sent')
  t.equal(relay.failingSince(), undefined)
  sandbox.faults.add({ name: 'rate_limited', times: 2 })
  for (let count = 0; count < 2; count++) t.equal((await post(identity())).statusCode, 503)
  t.type(relay.failingSince(), Date)
})

t.test('no request is repeated while Mixpanel asks not to be sent anything', async t => {
  const { post, sandbox } = await startRelay(t, { env: { MAX_BATCH: '1' } })
  sandbox.faults.add({ name: 'edge_down' }, { name: 'rate_limited', retry_after: '5' })
  const answers = await Promise.all([post(identity()), post(identity())])
  t.same(answers.map(({ statusCode }) => statusCode).sort(), [502, 503])
  t.equal(sandbox.requests.length, 2)
})

t.test('with an outbox, identities are stored while Mixpanel asks not to be sent anything', async t => {
  const relay = await startRelayWithOutbox(t)
  relay.sandbox.faults.add({ name: 'rate_limited', retry_after: '3' })
  t.same([(await relay.post(identity())).statusCode, (await relay.post(identity())).statusCode], [202, 202])
  t.equal(relay.sandbox.requests.length, 1)
  await emptied(relay)
  t.ok(relay.sandbox.requests.length <= 3)
})

t.test('credentials that Mixpanel rejects are one warning with a count', async t => {
  const { post, sandbox, logged } = await startRelay(t)
  sandbox.faults.add({ name: 'unauthorized', times: 2 }, { name: 'forbidden' })
  for (let count = 0; count < 3; count++) t.equal((await post(identity())).statusCode, 502)
  t.match(logged().filter(line => line.msg === 'credentials rejected by Mixpanel'), [{ level: 40, cause: 'status 401', count: 1 }])
})

t.test('DEADLINE_MS ends an attempt before MIXPANEL_TIMEOUT_MS does', async t => {
  const { post, sandbox } = await startRelay(t, { env: { DEADLINE_MS: '400' } })
  sandbox.faults.add({ name: 'hang', times: 9 })
  t.match((await post(identity())).json(), { code: 'mixpanel_timed_out', retryable: true })
  t.equal(sandbox.requests.length, 1, 'there is no time for a retry')
  sandbox.faults.clear()
  sandbox.faults.add({ name: 'wait', ms: 200 })
  t.equal((await post(identity())).statusCode, 200, 'a slow answer within the deadline counts')
})

t.test('MIXPANEL_STRICT=1 makes every request strict, and a refusal names its reason', async t => {
  const { post, sandbox } = await startRelay(t, { env: { MIXPANEL_STRICT: '1' }, sandbox: { clock: () => 1_000_000_000 } })
  t.match((await post(identity())).json(), { code: 'refused_by_mixpanel', detail: /properties.time.*must not be in the future/ })
  t.match(sandbox.requests[0]?.body, /&strict=1$/)
  t.equal(sandbox.requests.length, 1)
})

t.test('MIXPANEL_ENDPOINT=import sends an array with Basic auth', async t => {
  const { post, sandbox } = await startRelay(t, { env: { MIXPANEL_ENDPOINT: 'import' } })
  t.equal((await post(identity({ identified_id: 'a+b&c' }))).statusCode, 200)
  const [request] = sandbox.requests
  t.match(request, {
    url: '/import?strict=1',
    headers: { 'content-type': 'application/json', authorization: `Basic ${Buffer.from(`${TOKEN}:`).toString('base64')}` }
  })
  t.match(JSON.parse(request?.body ?? ''), [{ event: '$identify', properties: { $identified_id: 'a+b&c' } }])

  const account = { MIXPANEL_SERVICE_ACCOUNT: 'robot:CANARY-SECRET', MIXPANEL_PROJECT_ID: '7' }
  const robot = await startRelay(t, {
    env: { MIXPANEL_ENDPOINT: 'import', ...account }, sandbox: { serviceAccounts: ['robot:CANARY-SECRET'], projectId: '7' }
  })
  t.equal((await robot.post(identity())).statusCode, 200)
  t.equal(robot.sandbox.requests[0]?.url, '/import?strict=1&project_id=7')
  const wrong = await startRelay(t, { env: { MIXPANEL_ENDPOINT: 'import', ...account } })
  t.match((await wrong.post(identity())).json(), { code: 'mixpanel_rejected_credentials' })
  const simplified = await startRelay(t, { env: { MIXPANEL_ENDPOINT: 'import' }, sandbox: { mode: 'simplified' } })
  t.match((await simplified.post(identity())).json(), { code: 'refused_by_mixpanel', detail: /simplified identity management/ })
  const late = await startRelay(t, { env: { MIXPANEL_ENDPOINT: 'import' }, sandbox: { clock: () => 1 } })
  t.match((await late.post(identity())).json(), { code: 'refused_by_mixpanel', detail: /must not be in the future/ })
})

t.test('MIXPANEL_REGION and MIXPANEL_URL choose the base URL, with its path', async t => {
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
  t.same(await gateway.send(gateway.encode([identifyEvent(identity(), 0)]), 1000), { code: 'accepted', taken: 'yes' })
  t.same(urls, ['/mixpanel/track?ip=0'])
})

t.test('failed_records are read by index, and without an index as a reason for all', async t => {
  const answer = (...records: unknown[]) => interpretBody(400, JSON.stringify({ code: 400, error: 'some failed', failed_records: records }))
  const reason = 'one; two'
  t.match(answer({ index: 3, message: 'one' }, { index: 3, message: 'two' }), { reason, records: new Map([[3, reason]]) })
  t.match(answer({ message: 'one' }, 'two'), { reason, records: undefined })
  t.equal(isPartial(interpretBody(200, '{"code":200,"num_records_imported":0,"status":"OK"}'), 1), true)
})

t.test('a request that finds no free connection in time is not sent late', async t => {
  const sandbox = await startSandbox(t)
  const mixpanel = createMixpanel(readConfig({ MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: sandbox.url }, () => ''))
  t.teardown(mixpanel.close)
  sandbox.faults.add({ name: 'hang', times: 64 })
  const request = mixpanel.encode([identifyEvent(identity(), 0)])
  const busy = Array.from({ length: 64 }, () => mixpanel.send(request, 400))
  t.match(await mixpanel.send(request, 100), { code: 'mixpanel_timed_out' })
  t.equal(new Set((await Promise.all(busy)).map(verdict => verdict.code)).size, 1)
  t.match(await mixpanel.send(mixpanel.encode([identifyEvent(identity(), 0)], { verbose: true }), 1000), { code: 'refused_by_mixpanel' })
  t.equal(sandbox.requests.length, 65, 'the request that timed out while it waited was not sent')
})

t.test('a connect timeout and a parser error have their verdicts', async t => {
  t.match(interpretError({ name: 'Error', code: 'UND_ERR_CONNECT_TIMEOUT', message: '' }), { code: 'mixpanel_timed_out' })
  t.match(interpretError({ name: 'HTTPParserError', message: '' }), { code: 'mixpanel_misanswered', cause: 'HTTPParserError' })
})

t.test('the leak check finds the token in every form in which it travels', async t => {
  t.same(leaks(`{"msg":"${TOKEN}"}`), [TOKEN])
  t.same(leaks(`data=${encodeURIComponent(JSON.stringify({ token: TOKEN }))}`), [encodeURIComponent(TOKEN)])
})

t.test('a reason from Mixpanel shows no secret, in any encoding', async t => {
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
