import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { listen } from '../helper.ts'
import { get, halfOpenPeer } from '../raw-http.ts'

// npm test has both with a clock of its own; here they take their real time.

t.test('an answer that is not read for ten seconds closes its connection', async t => {
  const { port, parts } = await listen(t, { env: { DOCS: 'true' } })
  const { socket } = halfOpenPeer(t, port)
  socket.pause()
  socket.write(get('/docs/swagger-ui-bundle.js').repeat(16))
  await sleep(500)
  t.ok((await parts()).connections >= 1, 'the connection is open')
  const started = performance.now()
  while ((await parts()).connections > 0) await sleep(100)
  const seconds = (performance.now() - started) / 1000
  t.ok(seconds > 7 && seconds < 14, `the connection is closed after about ten seconds, and was after ${seconds}`)
})

t.test('a request that is not complete after ten seconds gets 408', async t => {
  const { port } = await listen(t)
  const started = performance.now()
  await Promise.all(['', 'POST /identify HTTP/1.1\r\nhost: x\r\n', 'POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{'].map(async bytes => {
    const { socket, ended } = halfOpenPeer(t, port)
    socket.write(bytes)
    const drip = setInterval(() => bytes !== '' && socket.write('x'), 500)
    t.match(await ended, /^HTTP\/1.1 408 .*application\/problem\+json/s)
    clearInterval(drip)
    const ms = performance.now() - started
    t.ok(ms > 9000 && ms < 14_000, `the connection is closed after about ten seconds, and was after ${ms} ms`)
  }))
})
