import { once } from 'node:events'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { createByteBudget } from '#src/http/body.js'
import { linger } from '#src/http/lingering-close.js'
import { identity, listen, startRelay, type Env } from './helper.ts'
import { exchange, halfOpenPeer } from './raw-http.ts'

const head = (path: string, length: number) =>
  `POST ${path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${length}\r\n\r\n`

/** An upload that stops one byte before its end; `text` returns what the relay has answered. */
function upload (t: Test, port: number, path: string, length: number) {
  let text = ''
  const socket = connect(port, '127.0.0.1', () => socket.write(head(path, length) + ' '.repeat(length - 1)))
  socket.on('data', chunk => { text += String(chunk) }).on('error', () => {})
  t.teardown(() => { socket.destroy() })
  return { socket, text: () => text }
}

const kib = (count: number) => identity({ properties: { text: 'x'.repeat(count * 1024) } })

t.test('MAX_BYTES_IN_FLIGHT bounds all bodies together, and batches may use three quarters of it', async t => {
  const { port, inject, post, parts } = await listen(t, { env: { MAX_BYTES_IN_FLIGHT: '1000000' } })
  const bytes = async () => (await parts()).bytes_in_flight
  const batches = Array.from({ length: 9 }, () => upload(t, port, '/identify/batch', 100_000))
  while ((await bytes()) < 7 * 99_999) await sleep(10)
  await sleep(50)
  t.equal(batches.filter(({ text }) => /^HTTP\/1.1 503 .*"code":"overloaded"/s.test(text())).length, 2, 'seven of nine batches fit into three quarters')
  t.match(batches.map(({ text }) => text()).find(Boolean), /retry-after: 1\r\n/)
  t.equal(await bytes(), 7 * 99_999)
  const singles = Array.from({ length: 6 }, () => upload(t, port, '/identify', 60_000))
  while ((await bytes()) < 7 * 99_999 + 5 * 59_999) await sleep(10)
  await sleep(50)
  t.equal(singles.filter(({ text }) => /^HTTP\/1.1 503 /.test(text())).length, 1, 'five of six identities fit into the rest')
  t.equal(await bytes(), 7 * 99_999 + 5 * 59_999)
  t.match((await post(kib(50))).json(), { status: 503, code: 'overloaded', retryable: true })
  t.equal((await inject({ url: '/livez' })).statusCode, 200)
  for (const { socket } of [...batches, ...singles]) socket.destroy()
  await sleep(100)
  t.equal(await bytes(), 0)
  t.equal((await post(kib(50))).statusCode, 200)
  t.equal(await bytes(), 0, 'the bytes are released with the answer')
})

t.test('a body counts against MAX_BYTES_IN_FLIGHT until its answer is sent', async t => {
  const { post, sandbox, parts, inject } = await listen(t, { env: { MAX_BYTES_IN_FLIGHT: '200000' } })
  const bytes = async () => (await parts()).bytes_in_flight
  sandbox.faults.add({ name: 'wait', ms: 400, times: 9 })
  const waiting = [post(kib(50)), post(kib(50)), inject({ method: 'POST', url: '/identify/batch', payload: { identities: [kib(50)] } })]
  await sleep(100)
  t.ok(await bytes() > 150 * 1024)
  t.match((await post(kib(50))).json(), { code: 'overloaded' })
  t.equal((await post(identity())).statusCode, 200, 'a body that still fits is read')
  t.same((await Promise.all(waiting)).map(answer => answer.statusCode), [200, 200, 200])
  t.equal(await bytes(), 0)
})

t.test('the byte budget does not count what does not fit', async t => {
  const budget = createByteBudget(100)
  const [batch, single] = [budget.share(0.75)(), budget.share(1)()]
  t.same([batch.grow(75), batch.grow(1), single.grow(25), single.grow(1)], [true, false, true, false])
  t.equal(budget.used(), 100)
  batch.release()
  batch.release()
  t.same([budget.used(), single.grow(75), single.grow(1)], [25, true, false])
})

t.test('an identity has at most 64 KiB of JSON, on both routes', async t => {
  const { post, inject, sandbox } = await listen(t)
  const exactly = (bytes: number) => {
    const one = identity({ properties: { text: '' } })
    one.identified_id = 'user-1'
    return { ...one, properties: { text: 'x'.repeat(bytes - JSON.stringify(one).length) } }
  }
  const numbers = JSON.stringify(identity()).replace('}', `,"properties":{${Array.from({ length: 60 }, (_, index) => `"a${index}":[${'1e20,'.repeat(200)}0]`).join()}}}`)
  const rows: [payload: string, status: number][] = [
    [JSON.stringify(exactly(65_536)), 200], [JSON.stringify(exactly(65_537)), 400], [numbers, 400]
  ]
  t.ok(numbers.length < 65_536)
  for (const [payload, status] of rows) {
    const alone = await post(payload, { headers: { 'content-type': 'application/json' } })
    t.equal(alone.statusCode, status)
    const batch = await inject({ method: 'POST', url: '/identify/batch', payload: `{"identities":[${payload},${JSON.stringify(identity())}]}`, headers: { 'content-type': 'application/json' } })
    t.same(batch.json().results.map((result: { problem?: { status: number } }) => result.problem?.status ?? 200), [status, 200])
    if (status === 400) {
      const error = [{ pointer: '', detail: 'must be at most 64 KiB of JSON' }]
      t.same(alone.json().errors, error)
      t.same(batch.json().results[0].problem.errors, error)
    }
  }
  for (const { body } of sandbox.requests) t.ok(body.length < 1_048_576)
})

t.test('no request to Mixpanel exceeds 1 MiB, and none fails for the size of another identity', async t => {
  for (const text of ['x'.repeat(60_000), '"'.repeat(30_000), 'é'.repeat(30_000), '\u{1F354}'.repeat(15_000)]) {
    const { post, sandbox, inject } = await startRelay(t, { env: { MAX_BATCH: '2000' } })
    const large = Array.from({ length: 44 }, () => post(identity({ properties: { text } })))
    const batch = inject({ method: 'POST', url: '/identify/batch', payload: { identities: Array.from({ length: 200 }, () => identity()) } })
    t.same(new Set((await Promise.all([batch, ...large])).map(answer => answer.statusCode)), new Set([200]))
    t.ok(Math.max(...sandbox.requests.map(({ body }) => body.length)) <= 1_048_576)
    t.equal(sandbox.ledger.rows().length, 244)
  }
})

t.test('a body in tiny chunks is read whole, and more than a thousand chunks get 400', async t => {
  const { port, sandbox, parts } = await listen(t)
  const one = JSON.stringify(identity({ identified_id: 'in-pieces', properties: { text: 'é'.repeat(350) } }))
  const pieces = Array.from(Buffer.from(one), byte => Buffer.from([0x31, 0x0D, 0x0A, byte, 0x0D, 0x0A]))
  const chunked = Buffer.concat([Buffer.from('POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n'), ...pieces, Buffer.from('0\r\n\r\n')])
  t.match(await exchange(port, chunked, { answers: 1 }), /^HTTP\/1.1 200 /, 'a body in chunks of one byte is read')
  t.match(sandbox.ledger.rows()[0]?.properties, { $identified_id: 'in-pieces' })
  const long = `${'1\r\nx\r\n'.repeat(2000)}0\r\n\r\n`
  t.match(await exchange(port, 'POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n' + long, { ms: 2000 }), /^HTTP\/1.1 400 .*a thousand tiny chunks/s)
  const large = `${'3e8\r\n' + 'x'.repeat(1000) + '\r\n'}`.repeat(140) + '0\r\n\r\n'
  t.match(await exchange(port, 'POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n' + large, { ms: 2000 }), /^HTTP\/1.1 413 /)
  t.equal((await parts()).bytes_in_flight, 0)
})

t.test('an ordinary client reads the answer to a body that is refused unread', async t => {
  const { app, port } = await listen(t)
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
  for (let round = 0; round < 5; round++) {
    const answers = await Promise.all([
      send(large), send(streamed()), send(large, '/identify/batch'), send(large, '/nope'), send(large, '/identify', { origin: 'https://evil.test' }),
      send(large, '/identify', { 'content-type': 'text/html' })
    ])
    t.same(answers, [413, 413, 413, 404, 403, 415], 'each client reads the status of its refusal')
  }
  t.ok(app.server.listening, 'the relay still listens')
})

t.test('a connection that is closing is read for at most 1 MiB', async t => {
  const server = createServer({ allowHalfOpen: true }).listen(0, '127.0.0.1')
  t.teardown(() => server.close())
  await once(server, 'listening')
  const peer = connect({ port: (server.address() as AddressInfo).port, host: '127.0.0.1', allowHalfOpen: true }).on('error', () => {})
  const [socket] = await once(server, 'connection') as [Socket]
  linger(socket, () => {})
  peer.write(Buffer.alloc(8_000_000))
  await once(socket, 'close')
  t.ok(socket.bytesRead > 1_048_576 && socket.bytesRead < 2 * 1_048_576, `${socket.bytesRead} bytes were read`)
})

t.test('after a refused body the relay reads at most 1 MiB more, for at most a second', async t => {
  const { port, parts } = await listen(t)
  const { socket, ended } = halfOpenPeer(t, port)
  socket.write('POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 900000000\r\n\r\n')
  const started = performance.now()
  let written = 0
  const chunk = Buffer.alloc(65_536)
  const pump = () => {
    while (!socket.destroyed && socket.write(chunk, error => { if (!error) written += chunk.length }));
  }
  socket.on('drain', pump)
  pump()
  t.match(await ended, /^HTTP\/1.1 413 /)
  while ((await parts()).connections > 0) await sleep(20)
  const ms = performance.now() - started
  t.ok(ms > 500 && ms < 3000, `the connection is read for about a second, and was for ${ms} ms`)
  // Some megabytes are in the buffers of the kernel.
  t.ok(written < 12_000_000, `the relay reads about a megabyte, and the peer could write ${written} bytes`)
  t.same((await parts()).bytes_in_flight, 0)
})
