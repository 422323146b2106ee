import { connect } from 'node:net'
import type { AddressInfo } from 'node:net'
import fc from 'fast-check'
import { createLog } from '../src/log.ts'
import { t } from 'tap'
import { readConfig } from '../src/config.ts'
import { buildApp } from '../src/http/app.ts'
import { exchange, identity, startRelay, type Env } from './helper.ts'

const listen = async ({ app }: Awaited<ReturnType<typeof startRelay>>) => {
  await app.listen({ host: '127.0.0.1', port: 0 })
  return (app.server.address() as AddressInfo).port
}

t.test('origins: the listed ones may call, every other is turned away before it does harm', async t => {
  const { inject, post, sandbox } = await startRelay(t, { CORS_ORIGINS: 'https://app.example.com, capacitor://localhost' })
  for (const origin of ['https://app.example.com', 'capacitor://localhost']) {
    const answer = await post(identity(), { headers: { origin } })
    t.match(answer, { statusCode: 200, headers: { 'access-control-allow-origin': origin, vary: 'Origin' } })
    t.match(answer.headers['access-control-expose-headers'], /x-request-id/)
    t.notOk('access-control-allow-credentials' in answer.headers)
    const broken = await post({}, { headers: { origin } })
    t.match(broken, { statusCode: 400, headers: { 'access-control-allow-origin': origin } }, 'a page can read what was wrong')
    const preflight = await inject({
      method: 'OPTIONS', url: '/identify', headers: { origin, 'access-control-request-method': 'POST' }
    })
    t.match(preflight, { statusCode: 204, headers: { 'access-control-allow-origin': origin, 'access-control-max-age': '600' } })
    t.match(preflight.headers['access-control-allow-headers'], /content-type/)
  }
  t.equal(sandbox.requests.length, 2)
  const foreign = ['https://evil.test', 'null', 'https://app.example.com.evil.test', 'http://app.example.com',
    'https://app.example.com:8443', 'https://APP.example.com', 'https://app.example.com/', '']
  for (const origin of foreign) {
    for (const type of ['application/json', 'text/plain']) {
      const answer = await post(JSON.stringify(identity()), { headers: { origin, 'content-type': type } })
      t.match(answer.json(), { status: 403, code: 'forbidden', retryable: false }, origin)
      t.notOk('access-control-allow-origin' in answer.headers)
    }
    const preflight = await inject({
      method: 'OPTIONS', url: '/identify', headers: { origin, 'access-control-request-method': 'POST' }
    })
    t.equal(preflight.statusCode, 403)
  }
  t.equal((await inject({ url: '/livez', headers: { origin: 'https://evil.test' } })).statusCode, 200, 'reading is no harm')
  t.equal(sandbox.requests.length, 2, 'nothing more was sent')

  const closed = await startRelay(t)
  t.equal((await closed.post(identity(), { headers: { origin: 'https://app.example.com' } })).statusCode, 403)
  t.equal((await closed.post(identity())).statusCode, 200, 'a service sends no Origin')
})

t.test('a beacon is JSON as text/plain', async t => {
  const { post, sandbox } = await startRelay(t, { CORS_ORIGINS: 'https://app.example.com' })
  const headers = { 'content-type': 'text/plain;charset=UTF-8', origin: 'https://app.example.com' }
  t.equal((await post(JSON.stringify(identity()), { headers })).statusCode, 200)
  t.match((await post('hello', { headers })).json(), { code: 'invalid_request', errors: [{ pointer: '' }] })
  t.equal(sandbox.requests.length, 1)
})

t.test('methods, paths, sizes and types', async t => {
  const { inject, post, sandbox } = await startRelay(t)
  const rows: [method: string, url: string, status: number, code: string, allow?: string][] = [
    ['GET', '/nope', 404, 'not_found'],
    ['POST', '/identify/', 404, 'not_found'],
    ['GET', '/', 404, 'not_found'],
    ['OPTIONS', '/nope', 404, 'not_found'],
    ['GET', '/identify', 405, 'method_not_allowed', 'POST'],
    ['PUT', '/identify?x=1', 405, 'method_not_allowed', 'POST'],
    ['DELETE', '/identify', 405, 'method_not_allowed', 'POST'],
    ['OPTIONS', '/identify', 405, 'method_not_allowed', 'POST'],
    ['POST', '/livez', 405, 'method_not_allowed', 'GET, HEAD'],
    ['GET', '/livez?verbose=1&verbose=2', 400, 'invalid_request'],
    ['GET', '/%zz', 400, 'invalid_request']
  ]
  for (const [method, url, status, code, allow] of rows) {
    const answer = await inject({ method, url })
    t.match(answer.json(), { status, code, request_id: /./ }, `${method} ${url}`)
    t.equal(answer.headers.allow, allow)
    t.equal(answer.headers['x-request-id'], answer.json().request_id)
  }
  const types: [headers: Env, status: number][] = [
    [{ 'content-type': 'application/x-www-form-urlencoded' }, 415],
    [{ 'content-type': 'multipart/form-data; boundary=x' }, 415],
    [{ 'content-type': 'application/vnd.api+json' }, 415],
    [{ 'content-type': 'application/json', 'content-encoding': 'gzip' }, 415],
    [{ 'content-type': 'application/json', 'content-encoding': 'br' }, 415],
    [{ 'content-type': 'application/json', 'content-encoding': 'identity' }, 200],
    [{ 'content-type': 'application/json', 'content-encoding': '' }, 200],
    [{ 'content-type': 'application/json; charset=utf-16' }, 415],
    [{ 'content-type': 'application/json;charset="ISO-8859-1"' }, 415],
    [{ 'content-type': 'text/plain; x=y; charset=latin1' }, 415],
    [{ 'content-type': 'application/json; charset=UTF8' }, 200],
    [{ 'content-type': 'application/json; charset="UTF-8"' }, 200],
    [{ 'content-type': 'application/json; charset=utf-8' }, 200],
    [{ 'content-type': 'text/plain' }, 200]
  ]
  for (const [headers, status] of types) {
    t.equal((await post(JSON.stringify(identity()), { headers })).statusCode, status, JSON.stringify(headers))
  }
  t.match((await inject({ method: 'POST', url: '/identify' })).json(), { code: 'invalid_request', errors: [{ pointer: '' }] })
  const large = await post(identity({ properties: { a: 'x'.repeat(70_000) } }))
  t.match(large.json(), { status: 400, errors: [{ pointer: '', detail: 'must be at most 64 KiB of JSON' }] })
  const larger = await post(identity({ properties: { a: 'x'.repeat(140_000) } }))
  t.match(larger.json(), { status: 413, code: 'body_too_large' })
  t.equal(sandbox.requests.length, 6)
})

t.test('no path is an error of ours', async t => {
  const relay = await startRelay(t)
  const { inject } = relay
  const port = await listen(relay)
  for (const path of ['/*x', '/:a(', '/:a(b', '/::', '/*', '/:', '/a*', '/identify*', '/identify:', '/(', '/[', '/{}', '/__proto__', '/constructor', '//', '/../x', '/identify?*', '/;x']) {
    for (const method of ['GET', 'POST', 'PUT', 'OPTIONS']) {
      const { statusCode } = await inject({ method, url: path })
      t.ok([400, 404, 405].includes(statusCode), `${method} ${path}: ${statusCode}`)
    }
  }
  const sign = fc.constantFrom(...'/:*()[]{}?#%&=+$^|.~-_a0\\;,@!\'"<> é'.split(''))
  await fc.assert(fc.asyncProperty(fc.array(sign), fc.constantFrom('GET', 'POST', 'DELETE'), async (signs, method) => {
    const answer = await exchange(port, `${method} /${signs.join('')} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n`, 1000)
    return /^HTTP\/1.1 (200|400|404|405) /.test(answer)
  }), { numRuns: 1000 })
  t.pass('a thousand others')
})

t.test('a request keeps its own id when it is fit for a log', async t => {
  const { post, logged } = await startRelay(t)
  for (const id of ['abc-123', 'x'.repeat(128), 'Root=1-67891233-abcdef012345678912345678']) {
    const answer = await post(identity(), { headers: { 'x-request-id': id } })
    t.equal(answer.headers['x-request-id'], id)
    t.equal(logged().at(-1)?.request_id, id)
  }
  for (const id of ['', 'x'.repeat(129), 'a b', '<script>', 'a"b', 'é']) {
    const answer = await post({}, { headers: { 'x-request-id': id } })
    t.match(answer.headers['x-request-id'], /^[0-9a-f]{16}-\d+$/)
    t.equal(answer.json().request_id, answer.headers['x-request-id'])
  }
})

t.test('one log line a request: no ids, no query, no health checks', async t => {
  const { post, inject, logged, lines } = await startRelay(t)
  await post(identity({ identified_id: 'alice@example.com' }), { query: '?strict=1&secret=CANARY' })
  await post(identity({ identified_id: 'alice@example.com' }), { query: '?strict=0' })
  await inject({ url: '/livez' })
  await inject({ url: '/readyz?verbose' })
  await inject({ url: '/nope?secret=CANARY' })
  t.match(logged().filter(line => line.level === 30), [
    { msg: 'request completed', method: 'POST', route: '/identify', status: 400, code: 'invalid_request', ms: Number, caller: 'anonymous' },
    { msg: 'request completed', method: 'POST', route: '/identify', status: 200, request_id: String, insert_id: String },
    { msg: 'request completed', method: 'GET', route: null, status: 404, code: 'not_found' }
  ])
  t.notMatch(lines.join(''), /alice|CANARY|secret/)
})

t.test('limits: per address, told in headers, not escaped by forged headers', async t => {
  const { inject, sandbox } = await startRelay(t, { RATE_LIMIT_MAX: '3', RATE_LIMIT_WINDOW_MS: '60000' })
  const from = (remoteAddress: string, headers: Env = {}, url = '/identify') =>
    inject({ method: 'POST', url, payload: identity(), headers, remoteAddress })
  for (const left of ['2', '1', '0']) {
    const answer = await from('192.0.2.1', { 'x-forwarded-for': `203.0.113.${left}`, 'x-real-ip': '1.1.1.1', forwarded: 'for=9.9.9.9' })
    t.equal(answer.statusCode, 200, `${left} left`)
  }
  const refused = await from('192.0.2.1', { 'x-forwarded-for': '203.0.113.77' })
  t.match(refused.json(), { status: 429, code: 'too_many_requests', retryable: true })
  t.match(refused.headers, { 'retry-after': /^\d+$/, 'ratelimit-limit': '3', 'ratelimit-remaining': '0', 'ratelimit-reset': /^\d+$/ })
  for (const url of ['/nope', '/identify/batch', '/docs', '/openapi.json']) {
    t.equal((await from('192.0.2.1', {}, url)).statusCode, 429, `${url} has the same budget`)
  }
  t.equal((await from('192.0.2.1', { origin: 'https://evil.test' })).statusCode, 429, 'a foreign page as well')
  t.equal((await from('192.0.2.2')).statusCode, 200, 'another caller is not concerned')
  for (const host of ['::1', '::2', '::3']) t.equal((await from(`2001:db8:1:1${host}`)).statusCode, 200)
  t.equal((await from('2001:db8:1:1::4')).statusCode, 429, 'an IPv6 caller has a /64')
  t.equal((await from('2001:db8:1:2::1')).statusCode, 200)
  t.equal((await inject({ url: '/livez', remoteAddress: '192.0.2.1' })).statusCode, 200, 'health checks are not counted')
  t.equal(sandbox.requests.length, 8)

  const behind = await startRelay(t, { RATE_LIMIT_MAX: '1', TRUST_PROXY: '10.0.0.0/8, 192.0.2.9' })
  const via = async (remoteAddress: string, client: string) => (await behind.inject({
    method: 'POST', url: '/identify', payload: identity(), headers: { 'x-forwarded-for': client }, remoteAddress
  })).statusCode
  t.equal(await via('10.1.2.3', '203.0.113.1'), 200)
  t.equal(await via('10.1.2.3', '203.0.113.2'), 200, 'a trusted proxy speaks for its clients')
  t.equal(await via('192.0.2.9', '6.6.6.6, 203.0.113.2'), 429, 'who forges more to the left is still himself')
  t.equal(await via('10.1.2.3', '203.0.113.9:4000'), 200)
  t.equal(await via('10.1.2.3', '203.0.113.9:4001'), 429, 'a port makes no other caller')
  t.equal(await via('10.1.2.3', '[2001:db8::1]:443'), 200)
  t.equal(await via('10.1.2.3', '[2001:db8::1]'), 429)
  t.equal(await via('192.0.2.8', '203.0.113.3'), 200)
  t.equal(await via('192.0.2.8', '203.0.113.4'), 429, 'nobody else is believed')
})

t.test('health, readiness and the end', async t => {
  const relay = await startRelay(t)
  const { app, inject, post, sandbox } = relay
  const port = await listen(relay)
  for (const url of ['/livez', '/healthz']) t.same((await inject({ url })).json(), { status: 'alive' })
  t.same((await inject({ url: '/readyz' })).json(), { status: 'ready' })
  t.match((await inject({ url: '/livez?verbose' })).json().parts, { in_flight: 0, last_verdict: null })
  sandbox.faults.add({ name: 'unauthorized' })
  await post(identity())
  t.match((await inject({ url: '/readyz?verbose' })), { statusCode: 200 }, 'never depends on Mixpanel')
  t.match((await inject({ url: '/readyz?verbose' })).json(), { parts: { last_verdict: { code: 'mixpanel_rejected_credentials', at: String } } })
  app.beginShutdown()
  t.match(await inject({ url: '/readyz' }), { statusCode: 503, body: '{"status":"draining"}', headers: { connection: 'close' } })
  t.equal((await inject({ url: '/livez' })).statusCode, 200)
  t.match(await post(identity()), { statusCode: 200, headers: { connection: 'close' } }, 'still served')

  // One identity waits for Mixpanel while the relay closes, a second one comes on a connection that is in use.
  sandbox.faults.add({ name: 'wait', ms: 400 })
  const request = (body: string) =>
    `POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n${body}`
  const received = new Promise<string>(resolve => {
    let text = ''
    const socket = connect(port, '127.0.0.1', () => socket.write(request(JSON.stringify(identity()))))
    socket.on('data', chunk => { text += String(chunk) })
    socket.on('close', () => resolve(text))
  })
  const late = new Promise<string>(resolve => {
    let text = ''
    const socket = connect(port, '127.0.0.1', () => {
      // Half a request before the close, the other half after it.
      const whole = request(JSON.stringify(identity()))
      socket.write(whole.slice(0, 20))
      setTimeout(() => socket.write(whole.slice(20)), 250)
    })
    socket.on('data', chunk => { text += String(chunk) })
    socket.on('close', () => resolve(text))
  })
  await new Promise(resolve => setTimeout(resolve, 150))
  await app.close()
  t.match(await received, /^HTTP\/1.1 200 OK.*"accepted"/s, 'who was in flight is answered')
  t.match(await late, /^HTTP\/1.1 503 .*retry-after: 1.*"draining"/s, 'who came too late is told')
})

t.test('bugs say nothing about the inside', async t => {
  const { app, inject, logged } = await startRelay(t)
  app.get('/bug', async () => { throw new Error('the inside') })
  const answer = await inject({ url: '/bug' })
  t.match(answer.json(), { status: 500, code: 'internal', retryable: false })
  t.notMatch(answer.body, /the inside/)
  t.match(logged().find(line => line.msg === 'unhandled error'), { level: 50, err: { message: 'the inside' }, request_id: answer.json().request_id })
})

t.test('the document and the page to try it', async t => {
  const { inject } = await startRelay(t)
  const page = await inject({ url: '/docs' })
  t.match(page, { statusCode: 200, headers: { 'content-type': /^text\/html/, 'content-security-policy': /default-src 'self'/ } })
  for (const [, path] of page.body.matchAll(/(?:src|href)="([^"]+)"/g)) {
    const asset = await inject({ url: path as string })
    t.equal(asset.statusCode, 200, String(path))
    t.ok(asset.rawPayload.length > 50)
  }
})

// Requests that two servers could read in two ways, or that no server should read at all.
t.test('raw bytes: nothing is smuggled', async t => {
  const relay = await startRelay(t)
  const port = await listen(relay)
  const body = JSON.stringify(identity())
  const post = (headers: string, content: string, line = 'POST /identify HTTP/1.1') =>
    `${line}\r\n${headers}content-type: application/json\r\n\r\n${content}`
  const length = `content-length: ${body.length}\r\n`
  const chunked = `${body.length.toString(16)}\r\n${body}\r\n0\r\n\r\n`
  const rows: [what: string, bytes: string, status: number][] = [
    ['a plain one', post(`host: x\r\n${length}`, body), 200],
    ['chunked', post('host: x\r\ntransfer-encoding: chunked\r\n', chunked), 200],
    ['no host', post(length, body), 400],
    ['two hosts', post(`host: x\r\nhost: y\r\n${length}`, body), 400],
    ['two equal hosts', post(`host: x\r\nHost: x\r\n${length}`, body), 400],
    ['length and chunked', post(`host: x\r\n${length}transfer-encoding: chunked\r\n`, chunked), 400],
    ['chunked and length', post(`host: x\r\ntransfer-encoding: chunked\r\n${length}`, chunked), 400],
    ['xchunked', post('host: x\r\ntransfer-encoding: xchunked\r\n', chunked), 400],
    ['chunked, identity', post('host: x\r\ntransfer-encoding: chunked, identity\r\n', chunked), 400],
    ['gzip, chunked', post('host: x\r\ntransfer-encoding: gzip, chunked\r\n', chunked), 400],
    ['chunked twice', post('host: x\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n', chunked), 400],
    ['Chunked', post('host: x\r\ntransfer-encoding: Chunked\r\n', chunked), 200],
    ['chunked from HTTP/1.0', post('host: x\r\ntransfer-encoding: chunked\r\n', chunked, 'POST /identify HTTP/1.0'), 400],
    ['gzip from HTTP/1.0', post('host: x\r\ntransfer-encoding: gzip\r\n', body, 'POST /identify HTTP/1.0'), 400],
    ['two lengths', post(`host: x\r\n${length}content-length: 5\r\n`, body), 400],
    ['two equal lengths', post(`host: x\r\n${length}${length}`, body), 400],
    ['a length with a sign', post(`host: x\r\ncontent-length: +${body.length}\r\n`, body), 400],
    ['a hexadecimal length', post('host: x\r\ncontent-length: 0x10\r\n', body), 400],
    ['a negative length', post('host: x\r\ncontent-length: -1\r\n', body), 400],
    ['a folded header', post(`host: x\r\nx-a: 1\r\n 2\r\n${length}`, body), 400],
    ['a space before the colon', post(`host: x\r\ncontent-length : ${body.length}\r\n`, body), 400],
    ['a NUL in a header', post(`host: x\r\nx-a: \0\r\n${length}`, body), 400],
    ['a bare line feed', `POST /identify HTTP/1.1\nhost: x\n${length}\n${body}`, 400],
    ['a bad chunk size', post('host: x\r\ntransfer-encoding: chunked\r\n', `zz\r\n${body}\r\n0\r\n\r\n`), 400],
    ['a chunk size too large', post('host: x\r\ntransfer-encoding: chunked\r\n', `fffffffffffffffff\r\n${body}`), 400],
    ['no version', 'GET /livez\r\n\r\n', 400],
    ['another protocol', '\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03', 400],
    ['a long header', post(`host: x\r\nx-a: ${'x'.repeat(20_000)}\r\n${length}`, body), 431],
    ['a long path', post(`host: x\r\n${length}`, body, `POST /identify?${'x'.repeat(20_000)} HTTP/1.1`), 431],
    ['an expectation we do not know', post(`host: x\r\nexpect: foo\r\n${length}`, body), 200],
    ['gzip that is none', post(`host: x\r\ncontent-encoding: gzip\r\n${length}`, body), 415]
  ]
  let sent = 0
  for (const [what, bytes, status] of rows) {
    const answer = await exchange(port, bytes, 300)
    t.match(answer, new RegExp(`^HTTP/1.1 ${status} `), what)
    t.match(answer, /\r\nx-request-id: [^\r]+\r\n/i, what)
    if (status === 200) sent++
    else t.match(answer, /content-type: application\/problem\+json\r\n.*"code":"(invalid_request|unsupported_media_type)"/s, what)
  }
  // Node drops headers beyond a count in silence, and an Origin must not hide behind them.
  for (const [count, status] of [[120, 403], [127, 431], [500, 431], [1500, 431]] as const) {
    const crowd = 'b:\r\n'.repeat(count)
    const answer = await exchange(port, post(`host: x\r\n${length}${crowd}origin: http://evil.example\r\n`, body), 300)
    t.match(answer, new RegExp(`^HTTP/1.1 ${status} .*"status":${status},`, 's'), `an origin behind ${count} headers`)
  }
  const many = Object.fromEntries(Array.from({ length: 130 }, (_, index) => [`x-${index}`, '1']))
  t.match((await relay.inject({ method: 'POST', url: '/identify', headers: many, payload: body })).json(), { status: 431, title: 'Request Header Fields Too Large' })
  const smuggled = post(`host: x\r\n${length}`, body)
  const pipelined = await exchange(port, post('host: x\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n', `0\r\n\r\n${smuggled}`), 300)
  t.match(pipelined, /^HTTP\/1.1 400/)
  t.notMatch(pipelined, /200 OK/)
  t.equal(relay.sandbox.requests.length, sent, 'no second request came through')
  t.match(await exchange(port, 'GET /livez HTTP/1.1\r\nhost: x\r\n\r\n', 300), /200 OK/, 'and the relay still serves')
})

t.test('slow clients are closed with 408 while others are served', async t => {
  const relay = await startRelay(t)
  const port = await listen(relay)
  const slow = ['', 'POST /identify HTTP/1.1\r\nhost: x\r\n', 'POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{']
  const started = Date.now()
  const answers = Promise.all(Array.from({ length: 60 }, (_, index) => new Promise<string>(resolve => {
    let text = ''
    const socket = connect(port, '127.0.0.1', () => socket.write(slow[index % 3] as string))
    const drip = setInterval(() => index % 3 !== 0 && socket.write('x'), 500)
    socket.on('data', chunk => { text += String(chunk) })
    socket.on('error', () => {})
    socket.on('close', () => { clearInterval(drip); resolve(text) })
  })))
  let served = 0
  const timer = setInterval(async () => {
    if (/200 OK/.test(await exchange(port, 'GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n'))) served++
  }, 250)
  for (const answer of await answers) t.match(answer, /^HTTP\/1.1 408 .*application\/problem\+json/s)
  clearInterval(timer)
  t.ok(Date.now() - started >= 9000, 'none before its ten seconds')
  t.ok(served > 20, 'and the others never noticed')
})

t.test('a client who resets its connection is not answered', async t => {
  const relay = await startRelay(t)
  const port = await listen(relay)
  await new Promise<void>(resolve => {
    const socket = connect(port, '127.0.0.1', () => {
      socket.write('POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{')
      setTimeout(() => { socket.resetAndDestroy(); resolve() }, 50)
    })
  })
  await new Promise(resolve => setTimeout(resolve, 100))
  t.equal((await relay.inject({ url: '/livez' })).statusCode, 200)
  t.same(relay.logged().filter(line => line.route === '/identify').length, 1, 'but logged')
})

t.test('a page that could not be read is read again', async t => {
  const config = readConfig({ MIXPANEL_TOKEN: 'x' }, () => '')
  let count = 0
  const app = await buildApp(config, {
    relay: { stop: async () => {}, state: () => ({}) } as never,
    ...createLog('silent', { write () {} }),
    async document () {
      if (count++ === 0) throw new Error('EMFILE')
      return { openapi: '3.1.0' }
    }
  })
  t.teardown(() => app.close())
  const statuses = []
  for (let round = 0; round < 3; round++) statuses.push((await app.inject({ url: '/openapi.json' })).statusCode)
  t.same(statuses, [500, 200, 200])
  t.equal(count, 2, 'and then once')
})
