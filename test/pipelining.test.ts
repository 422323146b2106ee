import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { identity, listen } from './helper.ts'
import { exchange, get, halfOpenPeer, post, statuses } from './raw-http.ts'

t.test('of more than sixteen unanswered requests the first sixteen are answered, then the connection closes', async t => {
  const { port, sandbox } = await listen(t)
  sandbox.faults.add({ name: 'wait', ms: 300, times: 99 })
  const { socket, ended } = halfOpenPeer(t, port)
  const ids = Array.from({ length: 40 }, (_, index) => identity({ identified_id: `pipelined-${index}` }))
  socket.write(ids.map(one => post(JSON.stringify(one))).join(''))
  const text = await ended
  t.same(statuses(text), Array.from({ length: 16 }, () => 200), 'sixteen requests are answered')
  t.equal(text.split('connection: close').length - 1, 1, 'only the last answer has connection: close')
  t.same(sandbox.ledger.rows().map(row => row.properties.$identified_id).sort(), ids.slice(0, 16).map(one => one.identified_id).sort(),
    'the first sixteen are sent, and no others')
  const few = await exchange(port, get('/livez').repeat(16), { answers: 16 })
  t.equal(statuses(few).length, 16)
  t.notMatch(few, /connection: close/i, 'sixteen pipelined requests do not close the connection')
})

t.test('refused requests count against the limit of their address, but not against that of a proxy', async t => {
  const flood = post(JSON.stringify(identity())).repeat(40)
  for (const [env, status] of [[{}, 429], [{ TRUST_PROXY: '127.0.0.1' }, 200]] as const) {
    const { port } = await listen(t, { env: { RATE_LIMIT_MAX: '30', ...env } })
    t.equal(statuses(await exchange(port, flood)).length, 16)
    t.same(statuses(await exchange(port, post(JSON.stringify(identity())), { answers: 1 })), [status], JSON.stringify(env))
  }
})

t.test('no request is begun after an answer that closes the connection', async t => {
  const { app, port, sandbox } = await listen(t)
  const good = post(JSON.stringify(identity()))
  const closing: [what: string, bytes: string, status: number][] = [
    ['two hosts', get('/livez').replace('host: x', 'host: x\r\nhost: y'), 400],
    ['a transfer encoding', `${post('', 'transfer-encoding: gzip, chunked\r\n').replace('content-length: 0\r\n', '')}0\r\n\r\n`, 400],
    ['too large', post('x'.repeat(140_000)), 413],
    ['an unknown type', post('x'.repeat(70_000)).replace('application/json', 'text/html'), 415]
  ]
  for (const [what, bytes, status] of closing) {
    const text = await exchange(port, bytes + good, { ms: 400 })
    t.same(statuses(text), [status], what)
  }
  t.equal(sandbox.requests.length, 0)
  t.same(statuses(await exchange(port, get('/nope') + good, { ms: 400 })), [404, 200], 'after a 404 the next request is answered')
  app.beginShutdown()
  t.same(statuses(await exchange(port, post('{') + good, { ms: 400 })), [400], 'during a shutdown every answer closes its connection')
})

t.test('garbage behind a request is answered after that request', async t => {
  const { port, sandbox } = await listen(t)
  sandbox.faults.add({ name: 'wait', ms: 200 })
  const text = await exchange(port, `${post(JSON.stringify(identity()))}garbage\r\n\r\n`)
  t.same(statuses(text), [200, 400])
})

t.test('requests that were read and refused are bounded over all connections', async t => {
  const { port, sandbox, parts } = await listen(t, { env: { DEADLINE_MS: '1500', MIXPANEL_TIMEOUT_MS: '1500' } })
  sandbox.faults.add({ name: 'hang', times: 9999 })
  const flood = post(JSON.stringify(identity())).repeat(16) + 'GET / HTTP/1.1\r\nhost:x\r\n\r\n'.repeat(1500)
  const peers = Array.from({ length: 8 }, () => halfOpenPeer(t, port))
  for (const { socket } of peers) socket.write(flood)
  await sleep(800)
  const { connections } = await parts()
  t.ok(connections >= 1 && connections <= 2, `1 or 2 of 8 connections stay open, and ${connections} did`)
  t.match(await exchange(port, get('/livez'), { answers: 1 }), /^HTTP\/1.1 200 OK/, 'the relay still serves')
})
