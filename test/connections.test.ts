import { connect, type Socket } from 'node:net'
import { mock } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { createConnections } from '#src/http/connections.js'
import { identity, listen } from './helper.ts'
import { exchange, get, halfOpenPeer, post, statuses } from './raw-http.ts'

t.test('a peer that never closes its side is disconnected after a 400', async t => {
  const { port, parts } = await listen(t)
  const peers = Array.from({ length: 50 }, () => halfOpenPeer(t, port))
  for (const { socket } of peers) socket.write('this is not HTTP\r\n\r\n')
  await Promise.all(peers.map(({ ended }) => ended))
  const started = performance.now()
  while ((await parts()).connections > 0) await sleep(20)
  t.ok(performance.now() - started < 3000, 'all connections are closed within 3 s')
  for (const { text } of peers) t.match(text(), /^HTTP\/1.1 400 /)
})

t.test('an answer that is not read for ten seconds closes its connection', async t => {
  // The relay looks for unread answers once a second; the test moves that clock, and no other.
  mock.timers.enable({ apis: ['setInterval'] })
  t.teardown(() => mock.timers.reset())
  const { port, parts } = await listen(t, { env: { DOCS: 'true' } })
  const { socket } = halfOpenPeer(t, port)
  socket.pause()
  socket.write(get('/docs/swagger-ui-bundle.js').repeat(16))
  await sleep(500)
  mock.timers.tick(10_000)
  await sleep(100)
  t.equal((await parts()).connections, 1, 'after nine seconds without progress the connection is open')
  mock.timers.tick(1000)
  await sleep(100)
  t.equal((await parts()).connections, 0, 'after ten seconds without progress it is closed')
})

t.test('at MAX_CONNECTIONS the least useful connection is closed: silent, then idle, then incomplete', async t => {
  const { port, parts, sandbox } = await listen(t, { env: { MAX_CONNECTIONS: '10' } })
  sandbox.faults.add({ name: 'wait', ms: 2500, times: 99 })
  const ask = async () => {
    const peer = halfOpenPeer(t, port)
    peer.socket.write(post(JSON.stringify(identity())))
    await sleep(50)
    return peer
  }
  const busy = [await ask(), await ask(), await ask(), await ask()]
  const slow = halfOpenPeer(t, port)
  slow.socket.write(post('x'.repeat(500)).slice(0, -100))
  const silent = Array.from({ length: 5 }, () => halfOpenPeer(t, port))
  await sleep(600)
  const idle = halfOpenPeer(t, port)
  idle.socket.write(get('/livez'))
  await silent[0]?.ended
  t.equal((await parts()).connections, 10)
  for (const { ended } of silent.slice(1)) {
    busy.push(await ask())
    await ended
  }
  t.notOk(idle.socket.readableEnded, 'the idle connection is closed after the silent ones')
  busy.push(await ask())
  await idle.ended
  t.match(idle.text(), /200 OK/)
  t.notOk(slow.socket.readableEnded, 'the incomplete request is closed last')
  busy.push(await ask())
  await slow.ended
  t.equal((await parts()).connections, 10)
  t.same(statuses(await exchange(port, get('/livez'), { ms: 300 })), [], 'a new connection is refused while all others have requests in flight')
  for (const { answered, text } of busy) {
    await answered()
    t.same(statuses(text()), [200], 'a connection with a request in flight gets its answer')
  }
})

t.test('an address that costs much is not read for a while, but its idle connections are', async t => {
  const { port } = await listen(t)
  const idle = halfOpenPeer(t, port, '127.0.9.1')
  idle.socket.write(get('/livez'))
  await sleep(100)
  const flood = Array.from({ length: 20 }, () => halfOpenPeer(t, port, '127.0.9.1'))
  for (const { socket } of flood) socket.write(get('/livez').repeat(1000))
  await sleep(10)
  idle.socket.write(get('/livez'))
  for (const { ended, text } of flood) {
    await ended
    t.ok([0, 16].includes(statuses(text()).length), 'a flooding connection gets sixteen answers, or none')
  }
  await sleep(100)
  t.same(statuses(idle.text()), [200, 200], 'the idle connection of the same address is read')
})

t.test('a flood of silent connections does not lock out other clients', async t => {
  const { port, parts } = await listen(t, { env: { MAX_CONNECTIONS: '100' } })
  const flood = setInterval(() => { for (let count = 0; count < 8; count++) halfOpenPeer(t, port) }, 10)
  await sleep(300)
  for (let count = 0; count < 10; count++) t.match(await exchange(port, get('/livez', 'connection: close\r\n'), { ms: 5000 }), /200 OK/, 'another client is served')
  clearInterval(flood)
  await sleep(100)
  const { connections } = await parts()
  t.ok(connections > 90 && connections <= 100, `at most MAX_CONNECTIONS are open, and ${connections} were`)
})

t.test('an idle connection is kept for 620 s, longer than by common load balancers', async t => {
  const { port } = await listen(t)
  t.match(await exchange(port, get('/livez'), { answers: 1 }), /\r\nKeep-Alive: timeout=620\r\n/)
})

t.test('an address may hold a quarter of the connections; loopback and proxies may hold all', async t => {
  const errors: string[] = []
  const connections = createConnections({ config: { MAX_CONNECTIONS: 8, TRUST_PROXY: ['192.0.2.0/24', '2001:db8:ff::/48'] }, charge () {}, onError: ({ message }) => { errors.push(message) } })
  const server = connections.serverFactory(() => {})
  server.emit('error', new Error('accept EMFILE'))
  t.same(errors, ['accept EMFILE'], 'an error of the server is reported and does not end the process')
  const sockets: Socket[] = []
  const open = (remoteAddress: string) => {
    const socket = connect({ port: 1, host: '127.0.0.1' }).on('error', () => {})
    Object.defineProperty(socket, 'remoteAddress', { value: remoteAddress })
    sockets.push(socket)
    server.emit('connection', socket)
    return socket
  }
  t.teardown(() => sockets.forEach(socket => socket.destroy()))
  const same = [1, 2, 3].map(() => open('203.0.113.7'))
  t.same(same.map(({ destroyed }) => destroyed), [true, false, false], 'the oldest connection of the address is closed')
  const block = ['2001:db8:1:1::1', '2001:db8:1:1::2', '2001:db8:1:1:ffff::3'].map(open)
  t.same(block.map(({ destroyed }) => destroyed), [true, false, false], 'IPv6 addresses count by /64')
  for (const address of ['127.0.0.1', '::ffff:127.0.0.1', '192.0.2.9', '2001:db8:ff::1']) {
    t.same([1, 2, 3].map(() => open(address).destroyed), [false, false, false], `${address} may hold all connections`)
  }
  t.equal(connections.count(), 8)
  server.emit('close')
})

t.test('a slow client is closed with 408 while others are served', async t => {
  const { app, port } = await listen(t)
  t.same([app.server.requestTimeout, app.server.headersTimeout], [10_000, 10_000], 'a request has ten seconds')
  // Node reads both at each look, twice a second.
  app.server.requestTimeout = app.server.headersTimeout = 1500
  const slow = ['', 'POST /identify HTTP/1.1\r\nhost: x\r\n', 'POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{']
  const started = Date.now()
  const answers = Promise.all(Array.from({ length: 60 }, (_, index) => new Promise<string>(resolve => {
    let text = ''
    const socket = connect(port, '127.0.0.1', () => socket.write(slow[index % 3] as string))
    const drip = setInterval(() => index % 3 !== 0 && socket.write('x'), 200)
    socket.on('data', chunk => { text += String(chunk) })
    socket.on('error', () => {})
    socket.on('close', () => { clearInterval(drip); resolve(text) })
  })))
  let served = 0
  const timer = setInterval(async () => {
    if (/200 OK/.test(await exchange(port, get('/livez', 'connection: close\r\n')))) served++
  }, 100)
  for (const answer of await answers) t.match(answer, /^HTTP\/1.1 408 .*application\/problem\+json/s)
  clearInterval(timer)
  t.ok(Date.now() - started >= 1000, 'no request is closed before its time')
  t.ok(served > 5, `other clients are served meanwhile, and ${served} requests were`)
})
