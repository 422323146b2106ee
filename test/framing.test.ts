import { once } from 'node:events'
import { connect } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import fc from 'fast-check'
import { t } from 'tap'
import { identity, listen, startRelay, type Env } from './helper.ts'
import { exchange, get, statuses } from './raw-http.ts'

// Requests that two servers could read in two ways, or that no server should read at all.
t.test('an ambiguous or malformed request is refused, and nothing in it reaches Mixpanel', async t => {
  const relay = await listen(t)
  const { port } = relay
  const body = JSON.stringify(identity())
  const request = (headers: string, content: string, line = 'POST /identify HTTP/1.1') =>
    `${line}\r\n${headers}content-type: application/json\r\n\r\n${content}`
  const length = `content-length: ${body.length}\r\n`
  const chunked = `${body.length.toString(16)}\r\n${body}\r\n0\r\n\r\n`
  const rows: [what: string, bytes: string, status: number][] = [
    ['a plain one', request(`host: x\r\n${length}`, body), 200],
    ['chunked', request('host: x\r\ntransfer-encoding: chunked\r\n', chunked), 200],
    ['no host', request(length, body), 400],
    ['two hosts', request(`host: x\r\nhost: y\r\n${length}`, body), 400],
    ['two equal hosts', request(`host: x\r\nHost: x\r\n${length}`, body), 400],
    ['length and chunked', request(`host: x\r\n${length}transfer-encoding: chunked\r\n`, chunked), 400],
    ['chunked and length', request(`host: x\r\ntransfer-encoding: chunked\r\n${length}`, chunked), 400],
    ['xchunked', request('host: x\r\ntransfer-encoding: xchunked\r\n', chunked), 400],
    ['chunked, identity', request('host: x\r\ntransfer-encoding: chunked, identity\r\n', chunked), 400],
    ['gzip, chunked', request('host: x\r\ntransfer-encoding: gzip, chunked\r\n', chunked), 400],
    ['chunked twice', request('host: x\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n', chunked), 400],
    ['Chunked', request('host: x\r\ntransfer-encoding: Chunked\r\n', chunked), 200],
    ['chunked from HTTP/1.0', request('host: x\r\ntransfer-encoding: chunked\r\n', chunked, 'POST /identify HTTP/1.0'), 400],
    ['gzip from HTTP/1.0', request('host: x\r\ntransfer-encoding: gzip\r\n', body, 'POST /identify HTTP/1.0'), 400],
    ['two lengths', request(`host: x\r\n${length}content-length: 5\r\n`, body), 400],
    ['two equal lengths', request(`host: x\r\n${length}${length}`, body), 400],
    ['a length with a sign', request(`host: x\r\ncontent-length: +${body.length}\r\n`, body), 400],
    ['a hexadecimal length', request('host: x\r\ncontent-length: 0x10\r\n', body), 400],
    ['a negative length', request('host: x\r\ncontent-length: -1\r\n', body), 400],
    ['a folded header', request(`host: x\r\nx-a: 1\r\n 2\r\n${length}`, body), 400],
    ['a space before the colon', request(`host: x\r\ncontent-length : ${body.length}\r\n`, body), 400],
    ['a NUL in a header', request(`host: x\r\nx-a: \0\r\n${length}`, body), 400],
    ['a bare line feed', `POST /identify HTTP/1.1\nhost: x\n${length}\n${body}`, 400],
    ['a bad chunk size', request('host: x\r\ntransfer-encoding: chunked\r\n', `zz\r\n${body}\r\n0\r\n\r\n`), 400],
    ['a chunk size too large', request('host: x\r\ntransfer-encoding: chunked\r\n', `fffffffffffffffff\r\n${body}`), 400],
    ['no version', 'GET /livez\r\n\r\n', 400],
    ['no version, and a host', request(`host: x\r\n${length}`, body, 'POST /identify'), 400],
    ['HTTP/0.9', request(`host: x\r\n${length}`, body, 'POST /identify HTTP/0.9'), 400],
    ['HTTP/2.0', request(`host: x\r\n${length}`, body, 'POST /identify HTTP/2.0'), 400],
    ['another protocol', '\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03', 400],
    ['a long header', request(`host: x\r\nx-a: ${'x'.repeat(20_000)}\r\n${length}`, body), 431],
    ['a long path', request(`host: x\r\n${length}`, body, `POST /identify?${'x'.repeat(20_000)} HTTP/1.1`), 431],
    ['an unknown expectation', request(`host: x\r\nexpect: foo\r\n${length}`, body), 200],
    ['a body that is not gzip', request(`host: x\r\ncontent-encoding: gzip\r\n${length}`, body), 415]
  ]
  let sent = 0
  for (const [what, bytes, status] of rows) {
    const answer = await exchange(port, bytes, { answers: 1 })
    t.match(answer, new RegExp(`^HTTP/1.1 ${status} `), what)
    t.match(answer, /\r\nx-request-id: [^\r]+\r\n/i, `${what}: the answer has a request id`)
    if (status === 200) sent++
    else t.match(answer, /content-type: application\/problem\+json\r\n.*"code":"(invalid_request|unsupported_media_type)"/s, `${what}: the answer is a problem`)
  }
  // Node silently drops headers beyond a count, and an Origin must not hide behind them.
  for (const [count, status] of [[120, 403], [127, 431], [500, 431], [1500, 431]] as const) {
    const headers = 'b:\r\n'.repeat(count)
    const answer = await exchange(port, request(`host: x\r\n${length}${headers}origin: http://evil.example\r\n`, body), { ms: 300 })
    t.match(answer, new RegExp(`^HTTP/1.1 ${status} .*"status":${status},`, 's'), `an origin behind ${count} headers`)
  }
  const many = Object.fromEntries(Array.from({ length: 130 }, (_, index) => [`x-${index}`, '1']))
  t.match((await relay.inject({ method: 'POST', url: '/identify', headers: many, payload: body })).json(), { status: 431, title: 'Request Header Fields Too Large' })
  const smuggled = request(`host: x\r\n${length}`, body)
  const pipelined = await exchange(port, request('host: x\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n', `0\r\n\r\n${smuggled}`), { ms: 300 })
  t.match(pipelined, /^HTTP\/1.1 400/)
  t.notMatch(pipelined, /200 OK/)
  t.equal(relay.sandbox.requests.length, sent, 'nothing but the valid requests reached Mixpanel')
  t.match(await exchange(port, get('/livez'), { answers: 1 }), /200 OK/, 'the relay still serves')
})

t.test('no request follows an ambiguous one on its connection, whatever refuses it', async t => {
  const KEY = 'CANARY-KEY-0123456789'
  const { port, sandbox } = await listen(t, { env: { API_KEYS: KEY, JWT_SECRET: 's'.repeat(32), CORS_ORIGINS: 'https://app.example.com' } })
  const body = JSON.stringify(identity())
  const length = `content-length: ${body.length}\r\n`
  const next = `POST /identify HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ${KEY}\r\ncontent-type: application/json\r\n${length}\r\n${body}`
  const post = 'POST /identify HTTP/1.1\r\n'
  const rows: [what: string, bytes: string, status: number][] = [
    ['two hosts, without credentials', `${post}host: x\r\nhost: y\r\n\r\n`, 401],
    ['no host, from a foreign page', `${post}origin: https://evil.example\r\n\r\n`, 403],
    ['gzip, chunked and a forged token', `${post}host: x\r\nauthorization: Bearer a.b.c\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n`, 401],
    ['chunked from HTTP/1.0', 'POST /identify HTTP/1.0\r\nhost: x\r\nconnection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n', 401],
    ['many headers, without credentials', `${post}host: x\r\n${'b:\r\n'.repeat(200)}\r\n`, 401],
    ['a URL that is none, without a host', 'POST /%dentify HTTP/1.1\r\n\r\n', 400],
    ['an upgrade', 'GET /livez HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n', 200]
  ]
  for (const [what, bytes, status] of rows) {
    const socket = connect(port, '127.0.0.1')
    let answers = ''
    socket.on('data', chunk => { answers += String(chunk) }).on('error', () => {})
    socket.write(bytes)
    setTimeout(() => socket.write(next), 50)
    await Promise.race([once(socket, 'close'), sleep(1000)])
    socket.destroy()
    // Newer versions of Node refuse so many headers themselves.
    t.same(statuses(answers).map(found => found === 431 ? 401 : found), [status], what)
    t.match(answers, /connection: close/i, what)
  }
  t.equal(sandbox.requests.length, 0)
  t.match(await exchange(port, next, { answers: 1 }), /^HTTP\/1\.1 200/, 'alone the request is served')
})

t.test('paths, methods, media types, charsets and sizes have their statuses', async t => {
  const { inject, post, sandbox } = await startRelay(t)
  const rows: [method: string, url: string, status: number, code: string, allow?: string][] = [
    ['GET', '/nope', 404, 'not_found'],
    ['POST', '/identify/', 400, 'invalid_request'],
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

t.test('no path causes a 500', async t => {
  const { inject, port } = await listen(t)
  for (const path of ['/*x', '/:a(', '/:a(b', '/::', '/*', '/:', '/a*', '/identify*', '/identify:', '/(', '/[', '/{}', '/__proto__', '/constructor', '//', '/../x', '/identify?*', '/;x']) {
    for (const method of ['GET', 'POST', 'PUT', 'OPTIONS']) {
      const { statusCode } = await inject({ method, url: path })
      t.ok([400, 404, 405].includes(statusCode), `${method} ${path} is 400, 404 or 405, and was ${statusCode}`)
    }
  }
  const sign = fc.constantFrom(...'/:*()[]{}?#%&=+$^|.~-_a0\\;,@!\'"<> é'.split(''))
  await fc.assert(fc.asyncProperty(fc.array(sign), fc.constantFrom('GET', 'POST', 'DELETE'), async (signs, method) => {
    const answer = await exchange(port, `${method} /${signs.join('')} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n`, { ms: 1000 })
    return /^HTTP\/1.1 (200|400|404|405) /.test(answer)
  }), { numRuns: 300 })
  t.pass('300 random paths are 200, 400, 404 or 405')
})
