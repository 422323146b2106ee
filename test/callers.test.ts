import { createHmac, randomUUID } from 'node:crypto'
import { createServer, type RequestListener } from 'node:http'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { base64url, CompactSign, exportJWK, generateKeyPair, SignJWT, type CryptoKey, type JWTPayload } from 'jose'
import { t, type Test } from 'tap'
import { createApiKeys } from '#src/http/callers/api-keys.js'
import { createJwks } from '#src/http/callers/jwks.js'
import { readConfig } from '#src/config.js'
import { identity, leaks, listen, needsRedis, silent, startRedis, startRelay, startRelayWithOutbox, type Env, type Relay } from './helper.ts'
import { connectRedis } from '#src/redis.js'
import { exchange, post as rawPost } from './raw-http.ts'

t.jobs = 3
const KEY = 'CANARY-KEY-0123456789'
const SECOND_KEY = 'CANARY-KEY-9876543210'
const SECRET = `CANARY-JWT-${'s'.repeat(32)}`
const secret = new TextEncoder().encode(SECRET)
const inAnHour = () => Math.floor(Date.now() / 1000) + 3600

const bearer = (credential: string) => ({ authorization: `Bearer ${credential}` })
const sign = (claims: JWTPayload, { alg = 'HS256', key = secret as Uint8Array | CryptoKey, header = {} } = {}) =>
  new SignJWT(claims).setProtectedHeader({ alg, ...header }).sign(key)
const tokenOf = (user: string, claims: JWTPayload = {}) => sign({ sub: user, exp: inAnHour(), ...claims })

const batchOf = (count = 1) => ({ method: 'POST', url: '/identify/batch', payload: { identities: Array.from({ length: count }, () => identity()) } })

t.test('a key identifies anyone, by either header, and its name is in the log', async t => {
  const { inject, post, sandbox, logged } = await startRelay(t, { env: { API_KEYS: `web:${KEY},${SECOND_KEY}` } })
  for (const headers of [bearer(KEY), { authorization: `bearer  ${KEY}` }, { 'x-api-key': KEY }, bearer(SECOND_KEY), { ...bearer(KEY), 'x-api-key': 'wrong' }] as Env[]) {
    t.equal((await post(identity(), { headers })).statusCode, 200)
  }
  t.equal((await inject({ ...batchOf(2), headers: bearer(KEY) })).statusCode, 200)
  const callers = logged().filter(line => line.msg === 'request completed').map(line => line.caller)
  t.same(callers.slice(0, 3), ['key:web', 'key:web', 'key:web'])
  t.match(callers[3], /^key:[0-9a-f]{8}$/, 'a key without a name is logged by a digest')
  t.equal(sandbox.ledger.rows().length, 7)
})

t.test('a request without the right key is 401 before its body is read, and nothing is sent', async t => {
  const { inject, post, sandbox, logged } = await startRelay(t, { env: { API_KEYS: `web:${KEY}`, CORS_ORIGINS: 'https://app.example.com' } })
  const wrong: Env[] = [
    {}, bearer('wrong'), bearer(''), { authorization: 'Bearer' }, bearer(`${KEY}x`), bearer(KEY.slice(0, -1)), bearer(KEY.toLowerCase()), bearer(`web:${KEY}`),
    bearer('x'.repeat(10_000)), { 'x-api-key': '' }, { 'x-api-key': `${KEY}, ${KEY}` }, { ...bearer('wrong'), 'x-api-key': KEY },
    { authorization: `Basic ${Buffer.from(`${KEY}:`).toString('base64')}` }, { authorization: KEY }, { cookie: `authorization=${KEY}` }
  ]
  for (const headers of wrong) {
    for (const url of ['/identify', '/identify/batch', '/identify/', '/identify?dry_run=1']) {
      const answer = await inject({ method: 'POST', url, payload: 'not JSON', headers: { 'content-type': 'application/json', ...headers } })
      t.match(answer, { statusCode: 401, headers: { 'www-authenticate': 'Bearer', 'cache-control': 'no-store' } }, JSON.stringify(headers))
      t.match(answer.json(), { code: 'unauthenticated', retryable: false })
    }
  }
  t.match((await post(identity(), { headers: bearer('wrong') })).json().detail, /wrong or has expired/)
  t.match((await post(identity())).json().detail, /Send an API key or a token/)
  t.ok(logged().filter(line => line.status === 401).every(line => line.caller === 'anonymous'))
  t.match(logged().find(line => line.cause), { cause: 'unknown key' })
  t.equal((await post(identity(), { headers: { ...bearer(KEY), origin: 'https://evil.test' } })).statusCode, 403, 'a key does not permit a foreign page')
  for (const url of ['/livez', '/openapi.json', '/docs']) t.equal((await inject({ url })).statusCode, 200, `${url} needs no credentials`)
  t.equal((await inject({ url: '/nope' })).statusCode, 404)
  t.equal((await inject({ method: 'OPTIONS', url: '/identify', headers: { origin: 'https://app.example.com', 'access-control-request-method': 'POST' } })).statusCode, 204, 'a preflight carries no credentials')
  t.equal(sandbox.requests.length, 0)
})

t.test('the body of a caller without credentials is not parsed', async t => {
  const { port } = await listen(t, { env: { API_KEYS: KEY } })
  const answer = await exchange(port, 'POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 60000\r\n\r\n{', { answers: 1 })
  t.match(answer, /^HTTP\/1.1 401 /, 'the answer comes before the body')
  t.match(await exchange(port, rawPost(JSON.stringify(identity()), `authorization: Bearer ${KEY}\r\n`), { answers: 1 }), /^HTTP\/1.1 200 /)
})

t.test('a user may identify only as the claim of the token', async t => {
  const { inject, post, sandbox, logged } = await startRelay(t, { env: { JWT_SECRET: SECRET } })
  const token = await tokenOf('user-1')
  for (let repeat = 0; repeat < 2; repeat++) t.equal((await post(identity({ identified_id: 'user-1' }), { headers: bearer(token) })).statusCode, 200)
  for (const user of ['user-2', 'USER-1', 'user-1\u0301']) {
    for (const query of ['', '?dry_run=1', '?strict=1']) {
      t.match((await post(identity({ identified_id: user }), { query, headers: bearer(token) })).json(), { status: 403, code: 'forbidden', detail: /identified_id/ })
    }
  }
  t.match((await inject({ ...batchOf(), headers: bearer(token) })).json(), { status: 403, code: 'forbidden', detail: /API key/ })
  t.equal((await post(identity(), { headers: { 'x-api-key': token } })).statusCode, 401, 'a token is no API key')
  t.equal((await post({ anon_id: 'x' }, { headers: bearer(token) })).statusCode, 400)
  t.ok(logged().filter(line => line.status === 200).every(line => line.caller === 'user'))
  t.notMatch(JSON.stringify(logged().filter(line => Number(line.level) > 20)), /user-[12]/, 'no id is logged')
  t.equal(sandbox.requests.length, 2)
})

t.test('tokens that prove nothing are 401', async t => {
  const { publicKey, privateKey } = await generateKeyPair('RS256', { extractable: true })
  const jwk = { ...await exportJWK(publicKey), kid: 'a', alg: 'RS256', use: 'sig' }
  const idp = await startIdp(t, [jwk])
  const env = { JWT_ISSUER: 'https://idp.example', JWT_AUDIENCE: 'relay' }
  const bySecret = await startRelay(t, { env: { ...env, JWT_SECRET: SECRET } })
  const byKeys = await startRelay(t, { env: { ...env, JWT_JWKS_URL: idp.url, JWT_CLAIM: 'user_id' } })
  const claims = { sub: 'user-1', user_id: 'user-1', iss: 'https://idp.example', aud: 'relay', exp: inAnHour() }
  const rs = (change: JWTPayload = {}, header = {}) => sign({ ...claims, ...change }, { alg: 'RS256', key: privateKey, header: { kid: 'a', ...header } })
  const hs = (change: JWTPayload = {}, options = {}) => sign({ ...claims, ...change }, options)
  const status = async ({ post }: Relay, token: string) => (await post(identity({ identified_id: 'user-1' }), { headers: bearer(token) })).statusCode
  const past = inAnHour() - 7200

  t.equal(await status(bySecret, await hs()), 200)
  t.equal(await status(byKeys, await rs()), 200)
  t.equal(await status(bySecret, await hs({ aud: ['other', 'relay'] })), 200, 'an audience may be a list (RFC 7519)')
  t.equal(await status(bySecret, await hs({ nbf: Math.floor(Date.now() / 1000) + 3 })), 200, 'the issuer\'s clock may be a few seconds ahead')

  const none = `${base64url.encode('{"alg":"none"}')}.${base64url.encode(JSON.stringify(claims))}.`
  const publicText = new TextEncoder().encode(JSON.stringify(jwk))
  const good = await hs()
  const other = new TextEncoder().encode('o'.repeat(40))
  const head = [{ alg: 'HS256', crit: ['x'], x: 1 }, claims].map(part => base64url.encode(JSON.stringify(part))).join('.')
  const unknownCrit = `${head}.${createHmac('sha256', secret).update(head).digest('base64url')}`
  const bad: [name: string, relay: Relay, token: string][] = [
    ['alg none', bySecret, none], ['alg none', byKeys, none],
    ['HS256 with the public key', byKeys, await hs({}, { key: publicText, header: { kid: 'a' } })],
    ['HS256 where keys are public', byKeys, await hs({}, { header: { kid: 'a' } })],
    ['RS256 where the key is secret', bySecret, await rs()],
    ['HS512', bySecret, await hs({}, { alg: 'HS512' })],
    ['another secret', bySecret, await hs({}, { key: other })],
    ['a changed signature', bySecret, `${good.slice(0, -2)}${good.endsWith('AA') ? 'BB' : 'AA'}`],
    ['changed claims', bySecret, [good.split('.')[0], base64url.encode(JSON.stringify({ ...claims, sub: 'user-2' })), good.split('.')[2]].join('.')],
    ['wrong aud', bySecret, await hs({ aud: 'other' })], ['no aud', bySecret, await hs({ aud: undefined as unknown as string })],
    ['a list of other auds', bySecret, await hs({ aud: ['other', 'another'] })], ['an empty list', bySecret, await hs({ aud: [] })],
    ['wrong iss', bySecret, await hs({ iss: 'https://evil.example' })], ['no iss', byKeys, await rs({ iss: undefined as unknown as string })],
    ['expired', bySecret, await hs({ exp: past })], ['expired just now', bySecret, await hs({ exp: Math.floor(Date.now() / 1000) - 1 })],
    ['expired', byKeys, await rs({ exp: past })],
    ['no exp', bySecret, await hs({ exp: undefined as unknown as number })], ['exp as text', bySecret, await hs({ exp: 'never' as unknown as number })],
    ['nbf in the future', bySecret, await hs({ nbf: inAnHour() })],
    ['no claim', bySecret, await hs({ sub: undefined as unknown as string })], ['a numeric claim', bySecret, await hs({ sub: 1 as unknown as string })],
    ['an empty claim', bySecret, await hs({ sub: '' })], ['a list as claim', bySecret, await hs({ sub: ['user-1'] as unknown as string })],
    ['a claim that no id can have', bySecret, await hs({ sub: 'x'.repeat(256) })],
    ['an unknown kid', byKeys, await rs({}, { kid: 'b' })], ['a kid that is a path', byKeys, await rs({}, { kid: '../../etc/passwd' })],
    ['crit', bySecret, unknownCrit],
    ['no claims', bySecret, await new CompactSign(new TextEncoder().encode('"user-1"')).setProtectedHeader({ alg: 'HS256' }).sign(secret)],
    ['10 KB', bySecret, await hs({ padding: 'x'.repeat(10_000) })],
    ['five parts', bySecret, 'a.b.c.d.e'], ['two dots', bySecret, '..'], ['no JSON', bySecret, 'a.b.c'], ['an API key where none is set', bySecret, KEY]
  ]
  for (const [name, relay, token] of bad) t.equal(await status(relay, token), 401, name)

  const ownKeys = await generateKeyPair('RS256', { extractable: true })
  const asked = idp.count()
  for (const header of ['jku', 'x5u']) {
    const pointing = await sign(claims, { alg: 'RS256', key: ownKeys.privateKey, header: { [header]: `${idp.url}/evil`, kid: 'a' } })
    t.equal(await status(byKeys, pointing), 401, `${header} is ignored`)
  }
  const embedded = await sign(claims, { alg: 'RS256', key: ownKeys.privateKey, header: { jwk: await exportJWK(ownKeys.publicKey), kid: 'a' } })
  t.equal(await status(byKeys, embedded), 401, 'a key in the token is ignored')
  t.equal(idp.count(), asked)
  t.equal(bySecret.sandbox.requests.length + byKeys.sandbox.requests.length, 4, 'only the good tokens sent an identity')
  t.match(bySecret.logged().find(line => line.cause === 'ERR_JWT_EXPIRED'), { status: 401 })
})

t.test('a verified token is remembered until it expires, and no longer', async t => {
  const { post, tokens } = await startRelay(t, { env: { JWT_SECRET: SECRET } })
  const expires = Math.floor(Date.now() / 1000) + 5
  const soon = await tokenOf('user-1', { exp: expires })
  const status = async () => (await post(identity({ identified_id: 'user-1' }), { headers: bearer(soon) })).statusCode
  t.equal(tokens?.find(soon), undefined)
  t.equal(await status(), 200)
  t.match(tokens?.find(soon), { userId: 'user-1' })
  await sleep(expires * 1000 - Date.now() + 50)
  t.equal(tokens?.find(soon), undefined)
  t.equal(await status(), 401)
  const many = await Promise.all(Array.from({ length: 10_001 }, (_, user) => tokenOf(`user-${user}`)))
  for (const token of many) await tokens?.verify(token)
  const known = many.filter(token => tokens?.find(token) !== undefined).length
  t.ok(known > 9800 && known <= 10_000, `at most 10,000 tokens are remembered, and ${known} are`)
})

t.test('with ALLOW_ANONYMOUS a call without credentials is anonymous, and one with wrong ones is still 401', async t => {
  const { inject, post } = await startRelay(t, { env: { API_KEYS: KEY, JWT_SECRET: SECRET, ALLOW_ANONYMOUS: 'true' } })
  t.equal((await post(identity())).statusCode, 200)
  t.equal((await post(identity(), { headers: { authorization: 'Basic eA==' } })).statusCode, 200, 'another scheme is none of ours')
  t.equal((await post(identity(), { headers: bearer('wrong') })).statusCode, 401)
  t.equal((await post(identity(), { headers: bearer(await tokenOf('user-1', { exp: 1 })) })).statusCode, 401)
  t.equal((await inject(batchOf())).statusCode, 401, 'a batch needs a key')
  t.equal((await inject({ ...batchOf(), headers: bearer(KEY) })).statusCode, 200)
  t.equal((await inject({ ...batchOf(), headers: bearer(await tokenOf('user-1')) })).statusCode, 403)
  const open = await startRelay(t, { env: { HOST: '0.0.0.0', ALLOW_ANONYMOUS: 'true' } })
  t.equal((await open.post(identity())).statusCode, 200)
  t.match((await open.inject(batchOf())).json(), { status: 401, code: 'unauthenticated' })
  t.equal((await open.post(identity(), { headers: bearer('x') })).statusCode, 200, 'without API_KEYS and JWT_* a credential means nothing')
})

t.test('each caller has its own limit, and wrong credentials count against the address', async t => {
  const { post } = await startRelay(t, { env: { API_KEYS: `${KEY},${SECOND_KEY}`, JWT_SECRET: SECRET, RATE_LIMIT_MAX: '3' } })
  const statuses = async (headers: Env, count: number) => {
    const list = []
    for (let index = 0; index < count; index++) list.push((await post(identity({ identified_id: 'user-1' }), { headers })).statusCode)
    return list
  }
  t.same(await statuses(bearer('wrong-key-0123456789'), 5), [401, 401, 401, 429, 429])
  t.same(await statuses({}, 1), [429], 'requests without credentials count as well')
  t.same(await statuses(bearer(KEY), 4), [200, 200, 200, 429], 'a good key from that address has its own budget')
  t.same(await statuses(bearer(SECOND_KEY), 1), [200])
  t.same(await statuses(bearer(await tokenOf('user-1')), 2), [200, 200])
  t.same(await statuses(bearer(await tokenOf('user-1', { jti: 'another' })), 2), [200, 429], 'the tokens of one user share a budget')
  t.same(await statuses(bearer(await tokenOf('user-2')), 1), [403], 'and another user has another')
})

t.test('with Redis all relays count a key together', needsRedis, async t => {
  const { url } = await startRedis(t)
  const redis = async () => {
    const connection = await connectRedis(url, silent)
    t.teardown(() => { connection.disconnect() })
    return connection
  }
  const env = { API_KEYS: `web:${KEY}`, RATE_LIMIT_MAX: '4' }
  const [one, other] = [await startRelay(t, { env, redis: await redis() }), await startRelay(t, { env, redis: await redis() })]
  const list = []
  for (const { post } of [one, other, one, other, one, other]) list.push((await post(identity(), { headers: bearer(KEY) })).statusCode)
  t.same(list, [200, 200, 200, 200, 429, 429])
  const keys = await (await redis()).keys('*')
  t.same(leaks(keys.join()), [], 'no key is at rest in Redis')
})

t.test('anonymous callers and users may fill half of the outbox, keys all of it', async t => {
  const relay = await startRelayWithOutbox(t, { env: { API_KEYS: KEY, JWT_SECRET: SECRET, ALLOW_ANONYMOUS: 'true', OUTBOX_MAX_BYTES: '1200', MIXPANEL_URL: 'http://127.0.0.1:9' } })
  const fill = async (headers: Env) => {
    for (let count = 0; ; count++) {
      const { statusCode } = await relay.post(identity({ identified_id: 'user-1' }), { headers: { prefer: 'respond-async', ...headers } })
      if (statusCode !== 202) return count
    }
  }
  const byStrangers = await fill({})
  t.ok(byStrangers >= 1, 'anonymous callers can store something')
  t.equal(await fill(bearer(await tokenOf('user-1'))), 0, 'users share the half of anonymous callers')
  t.ok(await fill(bearer(KEY)) >= byStrangers, 'the other half is left for services')
})

t.test('digests of keys are compared, each once', async t => {
  const find = createApiKeys(['a:aaaaaaaaaaaaaaaa', 'b:bbbbbbbbbbbbbbbb', 'cccccccccccccccc'])
  t.equal(find('aaaaaaaaaaaaaaaa')?.label, 'key:a')
  t.equal(find('bbbbbbbbbbbbbbbb')?.label, 'key:b')
  t.match(find('cccccccccccccccc')?.label, /^key:[0-9a-f]{8}$/)
  t.equal(find('a'), undefined)
  for (let count = 0; count < 3000; count++) if (find(randomUUID()) !== undefined) t.fail('another key is found')
})

/** A server of public keys. `answer` replaces its answer. */
async function startIdp (t: Test, keys: object[]) {
  let asked = 0
  let answer: RequestListener = (_, response) => { response.setHeader('content-type', 'application/json').end(JSON.stringify({ keys })) }
  const server = createServer((request, response) => {
    asked++
    answer(request, response)
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    count: () => asked,
    answer: (next: RequestListener) => { answer = next },
    serve: (next: object[]) => { answer = (_, response) => { response.end(JSON.stringify({ keys: next })) } }
  }
}

async function keyPair (kid: string, alg = 'ES256') {
  const { publicKey, privateKey } = await generateKeyPair(alg, { extractable: true })
  return {
    jwk: { ...await exportJWK(publicKey), kid, alg },
    token: (user = 'user-1', claims: JWTPayload = {}) => sign({ sub: user, exp: inAnHour(), ...claims }, { alg, key: privateKey, header: { kid } })
  }
}

t.test('new keys are fetched when a token names one, once a cooldown; withdrawn keys end their tokens', async t => {
  const [first, second, third] = [await keyPair('1'), await keyPair('2', 'EdDSA'), await keyPair('3', 'PS256')]
  const idp = await startIdp(t, [first.jwk])
  const { post, logged, inject } = await startRelay(t, { env: { JWT_JWKS_URL: idp.url } })
  const status = async (token: string) => (await post(identity({ identified_id: 'user-1' }), { headers: bearer(token) })).statusCode
  const old = await first.token()
  t.equal(await status(old), 200)
  t.equal(idp.count(), 1, 'the keys were fetched at start')
  idp.serve([second.jwk])
  t.same(await Promise.all([status(await second.token()), status(await second.token('user-1', { jti: '2' }))]), [200, 200], 'a new key works at once')
  t.equal(idp.count(), 2, 'requests at the same time ask once')
  t.equal(await status(old), 401, 'a token of a withdrawn key is forgotten')
  for (let attempt = 0; attempt < 20; attempt++) t.equal(await status(await third.token()), 401)
  t.equal(idp.count(), 2, 'unknown keys ask once a cooldown')
  t.equal((await inject({ url: '/readyz?verbose' })).json().parts.jwks, 'current')
  t.same(logged().filter(line => Number(line.level) >= 40), [])
})

t.test('a server of keys that is down, slow or wrong leaves the known keys in use, and the log says so once', async t => {
  const [first, second] = [await keyPair('1'), await keyPair('2')]
  const idp = await startIdp(t, [first.jwk])
  const lines: { message: string, cause?: unknown }[] = []
  const write = (fields: object, message: string) => { lines.push({ ...fields, message }) }
  const changes: true[] = []
  const jwks = await createJwks(idp.url, { log: { ...silent, info: write, error: write }, onChange: () => { changes.push(true) }, refreshMs: 20, cooldownMs: 20 })
  t.teardown(jwks.close)
  const find = (kid: string): Promise<string> => jwks.getKey({ alg: 'ES256', kid }, { payload: '', signature: '' }).then(() => 'found', () => 'unknown')
  const answers: [cause: RegExp, answer: RequestListener][] = [
    [/status 503/, (_, response) => { response.writeHead(503).end() }],
    [/status 302/, ({ url }, response) => { if (url === '/elsewhere') response.end(JSON.stringify({ keys: [second.jwk] })); else response.writeHead(302, { location: '/elsewhere' }).end() }],
    [/not JSON/, (_, response) => { response.end('<html>') }],
    [/without keys/, (_, response) => { response.end('{"keys":[]}') }],
    [/without keys/, (_, response) => { response.end('null') }],
    [/without keys/, (_, response) => { response.end('{"keys":[{"kty":"oct","k":"AAAA"},{"kty":"RSA","use":"enc"},7]}') }],
    [/more than 262144 bytes/, (_, response) => { response.end('x'.repeat(300_000)) }],
    [/ECONNRESET/, request => { request.socket.destroy() }]
  ]
  for (const [cause, answer] of answers) {
    lines.length = 0
    idp.answer(answer)
    while (jwks.state() === 'current') await sleep(5)
    const asked = idp.count()
    while (idp.count() < asked + 2) await sleep(5)
    t.equal(await find('1'), 'found', 'the known key stays')
    t.equal(await find('2'), 'unknown')
    t.match(lines, [{ message: 'JWKS unavailable, known keys stay', cause }])
    idp.serve([first.jwk])
    while (jwks.state() === 'stale') await sleep(5)
    t.match(lines, [{}, { message: 'JWKS available again' }])
  }
  t.equal(changes.length, 0)
  idp.serve([first.jwk, second.jwk])
  while (changes.length === 0) await sleep(5)
  t.equal(await find('2'), 'found', 'the timer finds new keys by itself')
  jwks.close()
  await sleep(60)
  const asked = idp.count()
  await sleep(100)
  t.equal(idp.count(), asked, 'after close nothing is asked')
})

t.test('tokens of unknown keys hold up no other while the server of keys hangs', async t => {
  const [known, unknown] = [await keyPair('1'), await keyPair('2')]
  const idp = await startIdp(t, [known.jwk])
  const { post } = await startRelay(t, { env: { JWT_JWKS_URL: idp.url } })
  const status = async (token: string) => (await post(identity({ identified_id: 'user-1' }), { headers: bearer(token) })).statusCode
  idp.answer(() => {})
  let isOver = false
  const tokens = await Promise.all(Array.from({ length: 30 }, (_, index) => unknown.token('user-1', { jti: String(index) })))
  const waiting = Promise.all(tokens.map(status)).finally(() => { isOver = true })
  while (idp.count() < 2) await sleep(5)
  t.equal(await status(await known.token()), 200)
  t.notOk(isOver, 'the others still wait')
  t.same(new Set(await waiting), new Set([401]), 'they wait no longer than the server has time to answer')
  t.equal(idp.count(), 2)
})

t.test('without its keys the relay does not start', async t => {
  const idp = await startIdp(t, [])
  await t.rejects(createJwks(idp.url, { log: silent, onChange () {} }), { message: 'JWT_JWKS_URL: no keys can be fetched (an answer without keys)' })
  await t.rejects(createJwks('http://127.0.0.1:9', { log: silent, onChange () {} }), { message: /JWT_JWKS_URL: no keys can be fetched \(.+\)/ })
  await t.rejects(startRelay(t, { env: { JWT_JWKS_URL: 'http://127.0.0.1:9' } }), /JWT_JWKS_URL/)
})

t.test('a key that jose cannot use is 401, and a token that names no key fits a lone one', async t => {
  const { publicKey, privateKey } = await generateKeyPair('ES256', { extractable: true })
  const jwk = await exportJWK(publicKey)
  const idp = await startIdp(t, [jwk, { kty: 'EC', kid: 'broken', crv: 'P-256', x: 'AA', y: 'AA' }])
  const { post, logged } = await startRelay(t, { env: { JWT_JWKS_URL: idp.url } })
  const status = async (header: object) => (await post(identity({ identified_id: 'user-1' }), {
    headers: bearer(await sign({ sub: 'user-1', exp: inAnHour() }, { alg: 'ES256', key: privateKey, header }))
  })).statusCode
  t.equal(await status({ kid: 'broken' }), 401)
  t.match(logged().findLast(line => line.status === 401)?.cause, /unusable key|ERR_/)
  idp.serve([jwk])
  const { post: second } = await startRelay(t, { env: { JWT_JWKS_URL: idp.url } })
  const token = await sign({ sub: 'user-1', exp: inAnHour() }, { alg: 'ES256', key: privateKey })
  t.equal((await second(identity({ identified_id: 'user-1' }), { headers: bearer(token) })).statusCode, 200)
})

t.test('a changed secret ends the tokens of the old one, those that are being verified included', async t => {
  const { tokens, app, post, config } = await startRelay(t, { env: { JWT_SECRET: SECRET, API_KEYS: KEY } })
  const token = await tokenOf('user-1')
  const verifying = tokens?.verify(token)
  const changed = readConfig({ MIXPANEL_TOKEN: 'x', JWT_SECRET: 'n'.repeat(32), API_KEYS: SECOND_KEY }, () => '')
  tokens?.useSecret(config)
  tokens?.useSecret(changed)
  app.useApiKeys(changed)
  await verifying
  t.equal(tokens?.find(token), undefined)
  t.equal((await post(identity({ identified_id: 'user-1' }), { headers: bearer(token) })).statusCode, 401)
  const fresh = await sign({ sub: 'user-1', exp: inAnHour() }, { key: new TextEncoder().encode('n'.repeat(32)) })
  t.equal((await post(identity({ identified_id: 'user-1' }), { headers: bearer(fresh) })).statusCode, 200)
  t.equal((await post(identity(), { headers: bearer(KEY) })).statusCode, 401)
  t.equal((await post(identity(), { headers: bearer(SECOND_KEY) })).statusCode, 200)
})
