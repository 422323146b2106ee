import { createServer, type AddressInfo } from 'node:net'
import { once } from 'node:events'
import { t } from 'tap'
import { readConfig } from '#src/config.js'
import { identifyEvent } from '#src/identity/event.js'
import { PROBLEMS } from '#src/http/problem.js'
import { isRetryable, NEVER_SENT, type Failure } from '#src/identity/verdict.js'
import { interpretBody, isPartial, settle, type Answer } from '#src/mixpanel/answer.js'
import { createMixpanel } from '#src/mixpanel/client.js'
import { identity, startRelay } from './helper.ts'
import { checkSequence } from './verdict-model.ts'

t.test('no verdict says more than is known, in 200 random sequences of attempts', async t => {
  const faults = await Promise.all(Array.from({ length: 200 }, (_, seed) => checkSequence(seed)))
  t.same(faults.flat(), [])
})

t.test('an outcome that is unknown becomes known only by a success', async t => {
  const lost: Answer = { code: 'mixpanel_timed_out', taken: 'unknown', cause: 'no answer in 5000 ms', isTransient: true }
  const zero: Answer = { code: 'refused_by_mixpanel', taken: 'no', reason: 'no' }
  const limit: Answer = { code: 'mixpanel_rate_limited', taken: 'no', cause: 'status 429', retryAfter: 2 }
  t.same(settle({ code: 'accepted', taken: 'yes' }, lost), { code: 'accepted', taken: 'yes' })
  t.match(settle(limit, lost), { code: 'mixpanel_timed_out', taken: 'unknown' })
  t.match(settle(zero, lost), { code: 'mixpanel_timed_out', taken: 'unknown' })
  t.match(settle(limit, zero), { code: 'mixpanel_unreachable', taken: 'unknown', cause: 'status 429 after a refused array' })
  t.match(settle({ code: 'mixpanel_unavailable', taken: 'no', retryAfter: 1 }, zero), { code: 'mixpanel_unreachable', cause: 'mixpanel_unavailable after a refused array' })
  t.match(settle(NEVER_SENT, zero), { code: 'mixpanel_timed_out', taken: 'unknown', cause: 'never sent after a refused array' })
  t.same(settle(zero, zero), { code: 'refused_by_mixpanel', taken: 'no', reason: 'no' }, 'a lone refusal settles the refusal of its array')
})

t.test('a first attempt that was taken and then reset: the answer to the second does not say that it was not taken', async t => {
  for (const [name, retryable] of [['rate_limited', true], ['refused', true], ['unauthorized', true]] as const) {
    const { post, sandbox } = await startRelay(t)
    sandbox.faults.add({ name: 'reset_after' }, { name, times: 3 })
    const answer = await post(identity())
    t.match(answer.json(), { status: 502, code: 'mixpanel_unreachable', retryable }, name)
    t.equal(sandbox.ledger.rows().length, 1, 'Mixpanel has it')
  }
})

t.test('the request for the reason was taken and its answer lost: the outcome is unknown', async t => {
  const { post, sandbox } = await startRelay(t)
  sandbox.faults.add({ name: 'mute_zero' }, { name: 'reset_after' }, { name: 'rate_limited' })
  t.match((await post(identity())).json(), { status: 502, code: 'mixpanel_unreachable' })
  t.equal(sandbox.ledger.rows().length, 1)
})

t.test('a success for some events of an array is no success for all', async t => {
  t.equal(isPartial(interpretBody(200, '{"code":200,"num_records_imported":1}'), 4), true)
  t.equal(isPartial(interpretBody(200, '{"code":200,"num_records_imported":4}'), 4), false)
  t.equal(isPartial(interpretBody(200, '1'), 4), false)
  t.match(interpretBody(200, '{"code":200,"error":["bad"]}'), { code: 'refused_by_mixpanel' })
  const { inject, sandbox } = await startRelay(t)
  sandbox.faults.add({ name: 'imports_none' })
  const answer = await inject({ method: 'POST', url: '/identify/batch', payload: { identities: Array.from({ length: 4 }, () => identity()) } })
  t.equal(answer.statusCode, 200)
  t.equal(new Set(sandbox.ledger.rows().map(({ properties }) => properties.$insert_id)).size, 4, 'each event was sent again')
})

t.test('the log has the time at Mixpanel, the attempts and the size of the array', async t => {
  const { post, sandbox, logged } = await startRelay(t)
  sandbox.faults.add({ name: 'edge_down' }, { name: 'wait', ms: 100 })
  await post(identity())
  const line = logged().find(({ msg }) => msg === 'request completed') as Record<string, number>
  t.match(line, { attempts: 2, events: 1 })
  t.ok(line.mixpanel_ms! >= 140, 'a pause of 50 ms or more, and 100 ms at Mixpanel')
  t.ok(line.ms! >= line.mixpanel_ms!)
})

t.test('a clock before this release: 503, one log line, nothing sent', async t => {
  const { post, sandbox, logged } = await startRelay(t)
  t.capture(Date, 'now', () => 1000)
  for (let count = 0; count < 3; count++) t.match((await post(identity())).json(), { status: 503, code: 'overloaded', detail: /clock/ })
  t.equal(sandbox.requests.length, 0)
  t.equal(logged().filter(({ msg }) => msg === 'clock before the date of this release').length, 1)
})

t.test('a clock that differs from the one of Mixpanel is logged once an hour', async t => {
  const { post, logged } = await startRelay(t)
  const now = Date.now
  t.capture(Date, 'now', () => now() + 120_000)
  for (let count = 0; count < 3; count++) t.equal((await post(identity())).statusCode, 200)
  t.match(logged().filter(({ msg }) => msg === 'clock differs from Mixpanel'), [{ level: 40, seconds: /^1(?:19|20|21)$/ }])
})

t.test('what a gateway sends before, after or around the final answer changes neither the verdict nor the number of sends', async t => {
  const one = 'HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n1'
  const rows: [bytes: string, code: string][] = [
    [one, 'accepted'],
    ['HTTP/1.1 102 Processing\r\n\r\n' + one, 'accepted'],
    ['HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n' + one, 'accepted'],
    ['HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;ext=1\r\n1\r\n0\r\nx-trailer: 1\r\n\r\n', 'accepted'],
    ['HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n1', 'accepted'],
    ['HTTP/1.0 200 OK\r\n\r\n1', 'accepted'],
    [one.replace('200 OK', '200'), 'accepted'],
    [one + 'HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n', 'accepted'],
    ['HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n', 'mixpanel_rate_limited'],
    ['HTTP/1.1 503 Service Unavailable\r\ncontent-length: 10\r\n\r\n1', 'mixpanel_unreachable'],
    ['HTTP/1.1 400 Bad Request\r\ncontent-length: 10\r\n\r\n1', 'refused_by_mixpanel']
  ]
  for (const [bytes, code] of rows) {
    let requests = 0
    const server = createServer(socket => {
      socket.on('data', chunk => {
        requests += String(chunk).split('POST /').length - 1
        if (String(chunk).includes('data=')) socket.end(bytes)
      }).on('error', () => {})
    }).listen(0, '127.0.0.1')
    await once(server, 'listening')
    const { port } = server.address() as AddressInfo
    const client = createMixpanel(readConfig({ MIXPANEL_TOKEN: 'x', MIXPANEL_URL: `http://127.0.0.1:${port}` }, () => ''))
    const answer = await client.send(client.encode([identifyEvent(identity(), Date.now())]), 1000)
    t.equal(answer.code, code, JSON.stringify(bytes))
    t.equal(requests, 1)
    await client.close()
    server.close()
  }
})

t.test('a verdict is retryable if its problem is', async t => {
  for (const [code, { retryable }] of Object.entries(PROBLEMS)) {
    if (/^mixpanel_|^refused|^overloaded/.test(code)) t.equal(isRetryable({ code: code as Failure, taken: 'no' }), retryable, code)
  }
})
