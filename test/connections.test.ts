import { connect, type AddressInfo, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { createConnections } from '../src/http/connections.ts'
import { exchange, identity, startRelay, type Env } from './helper.ts'

async function listening (t: Test, env: Env = {}) {
  const relay = await startRelay(t, env)
  await relay.app.listen({ host: '127.0.0.1', port: 0 })
  const { port } = relay.app.server.address() as AddressInfo
  const parts = async () => (await relay.inject({ url: '/readyz?verbose' })).json().parts as { connections: number, bytes_in_flight: number }
  return { ...relay, port, parts }
}

/** A connection whose peer keeps its own side open, whatever the relay does; `ended` resolves with what came. */
function stubborn (t: Test, port: number, localAddress = '127.0.0.1') {
  const socket = connect({ port, host: '127.0.0.1', localAddress, allowHalfOpen: true })
  let text = ''
  socket.on('data', chunk => { text += String(chunk) }).on('error', () => {})
  t.teardown(() => { socket.destroy() })
  const ended = new Promise<string>(resolve => { for (const event of ['end', 'close']) socket.on(event, () => resolve(text)) })
  return { socket, text: () => text, ended }
}

const get = (path: string) => `GET ${path} HTTP/1.1\r\nhost: x\r\n\r\n`
const post = (body: string, headers = '', path = '/identify') =>
  `POST ${path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n${headers}content-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`
const statuses = (text: string) => [...text.matchAll(/HTTP\/1.1 (\d+) /g)].map(([, status]) => Number(status))

t.test('a peer that keeps its side open after a 400 loses the connection all the same', async t => {
  const { port, parts } = await listening(t)
  const peers = Array.from({ length: 50 }, () => stubborn(t, port))
  for (const { socket } of peers) socket.write('this is not HTTP\r\n\r\n')
  await Promise.all(peers.map(({ ended }) => ended))
  const started = performance.now()
  while ((await parts()).connections > 0) await sleep(20)
  t.ok(performance.now() - started < 3000)
  for (const { text } of peers) t.match(text(), /^HTTP\/1.1 400 /)
})

t.test('more than sixteen unanswered requests: sixteen are begun and answered, the connection closes', async t => {
  const { port, sandbox } = await listening(t)
  sandbox.faults.add({ name: 'wait', ms: 300, times: 99 })
  const { socket, ended } = stubborn(t, port)
  const ids = Array.from({ length: 40 }, (_, index) => identity({ identified_id: `pipelined-${index}` }))
  socket.write(ids.map(one => post(JSON.stringify(one))).join(''))
  const text = await ended
  t.same(statuses(text), Array.from({ length: 16 }, () => 200))
  t.equal(text.split('connection: close').length - 1, 1, 'the last one says so')
  t.same(sandbox.ledger.rows().map(row => row.properties.$identified_id).sort(), ids.slice(0, 16).map(one => one.identified_id).sort())
  const few = await exchange(port, get('/livez').repeat(16), 500)
  t.equal(statuses(few).length, 16)
  t.notMatch(few, /connection: close/i, 'sixteen may be under way')
})

t.test('nothing is begun after an answer that closes the connection', async t => {
  const { port, sandbox } = await listening(t)
  const good = post(JSON.stringify(identity()))
  const closing: [what: string, bytes: string, status: number][] = [
    ['two hosts', get('/livez').replace('host: x', 'host: x\r\nhost: y'), 400],
    ['a transfer encoding', `${post('', 'transfer-encoding: gzip, chunked\r\n').replace('content-length: 0\r\n', '')}0\r\n\r\n`, 400],
    ['too large', post('x'.repeat(140_000)), 413],
    ['an unknown type', post('x'.repeat(70_000)).replace('application/json', 'text/html'), 415]
  ]
  for (const [what, bytes, status] of closing) {
    const text = await exchange(port, bytes + good, 400)
    t.same(statuses(text), [status], what)
  }
  t.equal(sandbox.requests.length, 0)
  t.same(statuses(await exchange(port, get('/nope') + good, 400)), [404, 200], 'an ordinary mistake closes nothing')
})

t.test('bytes that are no request, behind one that is: that one is answered first', async t => {
  const { port, sandbox } = await listening(t)
  sandbox.faults.add({ name: 'wait', ms: 200 })
  const text = await exchange(port, `${post(JSON.stringify(identity()))}garbage\r\n\r\n`, 1000)
  t.same(statuses(text), [200, 400])
})

t.test('what was read and will not be begun is bounded over all connections', async t => {
  const { port, sandbox, parts } = await listening(t, { DEADLINE_MS: '3000', MIXPANEL_TIMEOUT_MS: '3000' })
  sandbox.faults.add({ name: 'hang', times: 9999 })
  const flood = post(JSON.stringify(identity())).repeat(16) + 'GET / HTTP/1.1\r\nhost:x\r\n\r\n'.repeat(1500)
  const peers = Array.from({ length: 8 }, () => stubborn(t, port))
  for (const { socket } of peers) socket.write(flood)
  await sleep(800)
  const { connections } = await parts()
  t.ok(connections >= 1 && connections <= 2, `${connections} of 8 wait for their sixteen answers, the others are closed`)
  t.equal((await exchange(port, get('/livez'), 300)).slice(0, 15), 'HTTP/1.1 200 OK')
})

t.test('an answer that is not read for ten seconds is given up', async t => {
  const { port, parts } = await listening(t, { DOCS: 'true' })
  const { socket } = stubborn(t, port)
  socket.pause()
  socket.write(get('/docs/swagger-ui-bundle.js').repeat(16))
  await sleep(500)
  t.ok((await parts()).connections >= 1)
  const started = performance.now()
  while ((await parts()).connections > 0) await sleep(100)
  const seconds = (performance.now() - started) / 1000
  t.ok(seconds > 7 && seconds < 14, `given up after ${seconds} s`)
})

t.test('MAX_CONNECTIONS: the connection that can best be spared makes room', async t => {
  const { port, parts, sandbox } = await listening(t, { MAX_CONNECTIONS: '10' })
  sandbox.faults.add({ name: 'wait', ms: 3000, times: 99 })
  const ask = async () => {
    const peer = stubborn(t, port)
    peer.socket.write(post(JSON.stringify(identity())))
    await sleep(50)
    return peer
  }
  const busy = [await ask(), await ask(), await ask(), await ask()]
  const slow = stubborn(t, port)
  slow.socket.write(post('x'.repeat(500)).slice(0, -100))
  const silent = Array.from({ length: 5 }, () => stubborn(t, port))
  await sleep(600)
  const idle = stubborn(t, port)
  idle.socket.write(get('/livez'))
  await silent[0]?.ended
  t.equal((await parts()).connections, 10)
  for (const { ended } of silent.slice(1)) {
    busy.push(await ask())
    await ended
  }
  t.notOk(idle.socket.readableEnded)
  busy.push(await ask())
  await idle.ended
  t.match(idle.text(), /200 OK/)
  t.notOk(slow.socket.readableEnded)
  busy.push(await ask())
  await slow.ended
  t.equal((await parts()).connections, 10)
  t.same(statuses(await exchange(port, get('/livez'), 300)), [], 'those at work are not disturbed')
  for (const { ended, text } of busy) await Promise.race([ended, sleep(3000)]).then(() => t.same(statuses(text()), [200]))
})

t.test('addresses that cost much are not read for a while; an idle connection is', async t => {
  const { port } = await listening(t)
  const idle = stubborn(t, port, '127.0.9.1')
  idle.socket.write(get('/livez'))
  await sleep(100)
  const flood = Array.from({ length: 20 }, () => stubborn(t, port, '127.0.9.1'))
  for (const { socket } of flood) socket.write(get('/livez').repeat(1000))
  await sleep(10)
  idle.socket.write(get('/livez'))
  for (const { ended, text } of flood) {
    await ended
    t.ok([0, 16].includes(statuses(text()).length), 'sixteen answers, or none where too much was refused')
  }
  await sleep(100)
  t.same(statuses(idle.text()), [200, 200])
})

t.test('a flood of silent connections keeps nobody out', async t => {
  const { port, parts } = await listening(t, { MAX_CONNECTIONS: '100' })
  const flood = setInterval(() => { for (let count = 0; count < 20; count++) stubborn(t, port) }, 10)
  await sleep(300)
  for (let count = 0; count < 10; count++) t.match(await exchange(port, get('/livez').replace('host: x', 'host: x\r\nconnection: close'), 1000), /200 OK/)
  clearInterval(flood)
  await sleep(100)
  const { connections } = await parts()
  t.ok(connections > 90 && connections <= 100, `${connections} are open`)
})

t.test('an address may hold a quarter of the connections, loopback and proxies all', async t => {
  const errors: string[] = []
  const connections = createConnections({ config: { MAX_CONNECTIONS: 8, TRUST_PROXY: ['192.0.2.0/24', '2001:db8:ff::/48'] }, charge () {}, onError: ({ message }) => { errors.push(message) } })
  const server = connections.serverFactory(() => {})
  server.emit('error', new Error('accept EMFILE'))
  t.same(errors, ['accept EMFILE'], 'and does not end the process')
  const sockets: Socket[] = []
  const open = (remoteAddress: string) => {
    const socket = connect({ port: 1, host: '127.0.0.1' }).on('error', () => {})
    Object.defineProperty(socket, 'remoteAddress', { value: remoteAddress })
    sockets.push(socket)
    server.emit('connection', socket)
    return socket
  }
  t.teardown(() => sockets.forEach(socket => socket.destroy()))
  const mine = [1, 2, 3].map(() => open('203.0.113.7'))
  t.same(mine.map(({ destroyed }) => destroyed), [true, false, false], 'its own oldest makes room')
  const block = ['2001:db8:1:1::1', '2001:db8:1:1::2', '2001:db8:1:1:ffff::3'].map(open)
  t.same(block.map(({ destroyed }) => destroyed), [true, false, false], 'IPv6 counts by /64')
  for (const address of ['127.0.0.1', '::ffff:127.0.0.1', '192.0.2.9', '2001:db8:ff::1']) {
    t.same([1, 2, 3].map(() => open(address).destroyed), [false, false, false], address)
  }
  t.equal(connections.count(), 8)
  server.emit('close')
})

t.test('ordinary clients read the answer to a body that is refused unread', async t => {
  const { app, port } = await listening(t)
  const url = `http://127.0.0.1:${port}`
  const send = async (body: RequestInit['body'], path = '/identify', headers: Env = { 'content-type': 'application/json' }) => {
    const answer = await fetch(url + path, { method: 'POST', headers, body, duplex: 'half' } as RequestInit)
    await answer.text()
    return answer.status
  }
  const streamed = () => new ReadableStream({
    start (controller) {
      for (let piece = 0; piece < 50; piece++) controller.enqueue(Buffer.alloc(10_000, 'x'))
      controller.close()
    }
  })
  const large = Buffer.alloc(5_000_000, 'x')
  for (let round = 0; round < 20; round++) {
    const answers = await Promise.all([
      send(large), send(streamed()), send(large, '/identify/batch'), send(large, '/nope'), send(large, '/identify', { origin: 'https://evil.test' }),
      send(large, '/identify', { 'content-type': 'text/html' })
    ])
    t.same(answers, [413, 413, 413, 404, 403, 415])
  }
  t.ok(app.server.listening)
})

t.test('a lingering connection reads no more than a megabyte, and no longer than a second', async t => {
  const { port, parts } = await listening(t)
  const { socket, ended } = stubborn(t, port)
  socket.write('POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 900000000\r\n\r\n')
  const started = performance.now()
  let taken = 0
  const chunk = Buffer.alloc(65_536)
  const pump = () => {
    while (!socket.destroyed && socket.write(chunk, error => { if (!error) taken += chunk.length }));
  }
  socket.on('drain', pump)
  pump()
  t.match(await ended, /^HTTP\/1.1 413 /)
  while ((await parts()).connections > 0) await sleep(20)
  const ms = performance.now() - started
  t.ok(ms > 500 && ms < 3000, `${ms} ms`)
  // What the kernel's buffers took is not the relay's.
  t.ok(taken < 12_000_000, `${taken} bytes`)
  t.same((await parts()).bytes_in_flight, 0)
})
