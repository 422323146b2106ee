import { generateKeyPair, exportJWK, SignJWT } from 'jose'
import { once } from 'node:events'
import type { IncomingMessage } from 'node:http'
import type { Duplex } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { EnvHttpProxyAgent, type Dispatcher } from 'undici'
import { createJwks } from '#src/http/callers/jwks.js'
import { readConfig } from '#src/config.js'
import { startGet } from '#src/get.js'
import { identifyEvent } from '#src/identity/event.js'
import { createMixpanel } from '#src/mixpanel/client.js'
import { describeProxy, proxyFor } from '#src/proxy.js'
import { createTunnels } from '#src/tunnel.js'
import { identity, leaks, silent, startRelay, startRelayWithOutbox, startSandbox, TOKEN, type Env } from './helper.ts'
import { SERVER, startProcess, startServer } from './processes.ts'
import { PEM, startProxy, startRaw, startTls } from './way-out.ts'

const read = (env: Env) => readConfig({ MIXPANEL_TOKEN: TOKEN, ...env }, () => '')

/** A proxy of undici's EnvHttpProxyAgent for a URL: its decision without a request. */
async function decisionOfUndici (env: { HTTPS_PROXY?: string, HTTP_PROXY?: string, NO_PROXY?: string }, url: string): Promise<boolean> {
  let isProxied: boolean | undefined
  const agent = new EnvHttpProxyAgent({
    httpProxy: env.HTTP_PROXY ?? '',
    httpsProxy: env.HTTPS_PROXY ?? '',
    noProxy: env.NO_PROXY ?? '',
    // The agent of a proxy has a `connect` of its own.
    factory: (_: unknown, { connect }: { connect?: unknown }) => {
      isProxied = typeof connect === 'function'
      throw new Error('decided')
    }
  } as ConstructorParameters<typeof EnvHttpProxyAgent>[0])
  await agent.request({ origin: new URL(url).origin, path: '/', method: 'GET' } as Dispatcher.RequestOptions).catch(() => {})
  return isProxied as boolean
}

t.test('a URL has the proxy that undici would use', async t => {
  const [https, http] = ['http://s.example:1', 'http://h.example:2']
  const sets: Env[] = [{}, { HTTPS_PROXY: https }, { HTTP_PROXY: http }, { HTTPS_PROXY: https, HTTP_PROXY: http }]
  const lists = ['', '*', 'example.com', '.example.com', '*.example.com', 'EXAMPLE.com', 'api.example.com:443', 'api.example.com:80', 'api.example.com:8443', 'xample.com',
    'a, example.com', 'a example.com', 'a,*', ' , ', '127.0.0.1', '[::1]', '[::1]:8081', '::1', 'example.com:0', '.', 'com']
  const urls = ['https://api.example.com', 'http://api.example.com', 'https://api.example.com:8443', 'http://example.com', 'https://API.example.com', 'http://127.0.0.1:8081', 'https://[::1]:8081', 'http://localhost']
  let proxied = 0
  for (const env of sets) {
    for (const NO_PROXY of lists) {
      for (const url of urls) {
        const found = proxyFor({ ...env, NO_PROXY }, url)
        if (found !== undefined) proxied++
        t.equal(found !== undefined, await decisionOfUndici({ ...env, NO_PROXY }, url), JSON.stringify({ ...env, NO_PROXY, url }))
        if (found !== undefined) t.equal(found.variable, url.startsWith('https') && 'HTTPS_PROXY' in env ? 'HTTPS_PROXY' : 'HTTP_PROXY')
      }
    }
  }
  t.ok(proxied > 100 && proxied < 600, `some are proxied: ${proxied}`)
  t.equal(proxyFor({ HTTPS_PROXY: https }, 'HTTPS://api.example.com')?.variable, 'HTTPS_PROXY')
})

t.test('the variables count in lower case too, and mistakes name them', async t => {
  const url = 'http://proxy.example:3128'
  t.match(read({ https_proxy: url, HTTPS_PROXY: 'http://other', no_proxy: ' a,b ', HTTP_PROXY: '' }), { HTTPS_PROXY: url, NO_PROXY: 'a,b', HTTP_PROXY: undefined })
  t.equal(read({ https_proxy: '', HTTPS_PROXY: url }).HTTPS_PROXY, url, 'an empty one is unset')
  t.equal(read({ mixpanel_region: 'eu' }).MIXPANEL_REGION, 'us', 'no other variable has a second name')
  for (const fine of ['https://proxy', 'HTTP://proxy:8080/', 'http://me:p%40ss@proxy', 'http://me@[::1]:3128']) t.equal(read({ HTTP_PROXY: fine }).HTTP_PROXY, fine)
  const rule = 'must be the URL of an HTTP proxy, such as http://proxy.example.com:3128. A SOCKS proxy cannot be used.'
  for (const wrong of ['socks5://CANARY-SECRET@proxy:1080', 'socks://proxy', 'proxy:3128', 'proxy.example', 'http://', 'ftp://proxy', 'http://me:%zz@proxy', 'http://proxy:99999']) {
    t.throws(() => read({ HTTPS_PROXY: wrong }), { name: 'ConfigError', message: `HTTPS_PROXY ${rule}` }, wrong)
    t.throws(() => read({ http_proxy: wrong }), { message: `http_proxy ${rule}` }, wrong)
  }
  t.throws(() => read({ HTTPS_PROXY: '"http://proxy"' }), { message: /^HTTPS_PROXY must not have white space or quotes/ })
  t.throws(() => read({ no_proxy: '"a,b"' }), { message: 'no_proxy must not have white space or quotes around its value.' })
  t.equal(describeProxy({ url: new URL('http://me:CANARY-SECRET@proxy:3128/x') }), 'http://***@proxy:3128')
  t.equal(describeProxy({ url: new URL('https://proxy') }), 'https://proxy')
})

t.test('a proxy on another machine reads no http request to loopback, unless that is intended', async t => {
  const url = 'http://127.0.0.1:8081'
  const env = { MIXPANEL_URL: url, HTTP_PROXY: 'http://proxy.example:3128' }
  const message = 'MIXPANEL_URL must be https, because http would carry secrets unencrypted to another machine, the proxy: name its host in NO_PROXY, or set ALLOW_HTTP_UPSTREAM=true if that is intended.'
  t.throws(() => read(env), { name: 'ConfigError', message })
  for (const more of [{ NO_PROXY: '127.0.0.1' }, { ALLOW_HTTP_UPSTREAM: 'true' }, { HTTP_PROXY: 'http://127.0.0.1:3128' }, { HTTP_PROXY: '', HTTPS_PROXY: 'http://proxy.example' }]) {
    t.equal(read({ ...env, ...more }).MIXPANEL_URL, url, JSON.stringify(more))
  }
  t.throws(() => read({ ...env, HTTP_PROXY: 'proxy' }), { message: /^HTTP_PROXY must be [^\n]*$/ }, 'one mistake')
  const keys = { HTTP_PROXY: 'http://proxy.example:3128', JWT_JWKS_URL: 'http://localhost:9/keys' }
  t.throws(() => read(keys), { message: 'JWT_JWKS_URL must not be http through a proxy, which could pose as any user: name its host in NO_PROXY.' })
  for (const more of [{ NO_PROXY: 'localhost' }, { JWT_JWKS_URL: 'https://idp.example' }, { HTTP_PROXY: 'http://[::1]' }]) t.ok(read({ ...keys, ...more }))
  t.throws(() => read({ ...keys, JWT_JWKS_URL: 'x' }), { message: /^JWT_JWKS_URL must be an https URL[^\n]*$/ })
})

t.test('identities share tunnels, and only the proxy gets its credentials', async t => {
  const proxy = await startProxy(t)
  const { post, sandbox, lines } = await startRelay(t, { env: { HTTP_PROXY: proxy.url.replace('//', '//me%40corp:CANARY-SECRET@') } })
  for (let count = 0; count < 20; count++) t.match((await post(identity())).json(), { status: 'accepted' })
  t.same(proxy.targets(), [new URL(sandbox.url).host], 'one tunnel carries twenty requests')
  t.match(proxy.requests[0]?.headers, {
    host: new URL(sandbox.url).host, 'proxy-authorization': `Basic ${btoa('me@corp:CANARY-SECRET')}`, 'user-agent': undefined, authorization: undefined
  })
  t.equal(sandbox.requests.length, 20)
  t.same(leaks(lines.join('')), [])
  const free = await startRelay(t, { env: { HTTP_PROXY: 'http://127.0.0.1:9', NO_PROXY: 'localhost,127.0.0.1' } })
  t.equal((await free.post(identity())).statusCode, 200, 'NO_PROXY')
  const user = await startProxy(t)
  const lone = await startRelay(t, { env: { HTTP_PROXY: user.url.replace('//', '//me@') } })
  t.equal((await lone.post(identity())).statusCode, 200)
  t.equal(user.requests[0]?.headers['proxy-authorization'], `Basic ${btoa('me:')}`, 'a user without a password')
})

t.test('at most 64 requests are in flight, each in a tunnel, and an answer is bounded', async t => {
  const proxy = await startProxy(t)
  const { post, sandbox } = await startRelay(t, { env: { HTTP_PROXY: proxy.url, MAX_BATCH: '1' } })
  sandbox.faults.add({ name: 'wait', ms: 50, times: 200 })
  const answers = await Promise.all(Array.from({ length: 200 }, () => post(identity())))
  t.same(new Set(answers.map(({ statusCode }) => statusCode)), new Set([200]))
  t.ok(proxy.most() <= 64 && proxy.requests.length <= 64, `${proxy.most()} tunnels at once, and ${proxy.requests.length} in all`)
  const long = await startRaw(t, `HTTP/1.1 200 OK\r\ncontent-length: 9999999\r\n\r\n${'x'.repeat(200_000)}`)
  t.match(await sendOnce({ MIXPANEL_URL: long, HTTP_PROXY: proxy.url }), { code: 'mixpanel_misanswered', cause: 'UND_ERR_RES_EXCEEDED_MAX_SIZE' })
})

/** The answer to one request of a client of its own. */
async function sendOnce (env: Env, timeoutMs = 2000) {
  const client = createMixpanel(read({ MIXPANEL_TIMEOUT_MS: '2000', ...env }))
  const { identified_id: user, anon_id: anon } = identity() as { identified_id: string, anon_id: string }
  try {
    return await client.send(client.encode([identifyEvent({ identified_id: user, anon_id: anon }, Date.now())]), timeoutMs)
  } finally {
    await client.close()
  }
}

const refuse = (status: string) => (_: IncomingMessage, socket: Duplex) => { socket.end(`HTTP/1.1 ${status}\r\ncontent-length: 6\r\nproxy-authenticate: Basic\r\n\r\nCANARY`) }

t.test('a tunnel that is not made is a failure after which nothing was sent, with its cause', async t => {
  const sandbox = await startSandbox(t)
  const proxy = await startProxy(t)
  const env = { MIXPANEL_URL: sandbox.url, HTTP_PROXY: proxy.url.replace('//', '//me:CANARY-SECRET@') }
  const unsent = (cause: string | RegExp, code = 'mixpanel_unreachable') => ({ code, taken: 'no', cause, isTransient: true })
  for (const status of ['407 Proxy Authentication Required', '403 Forbidden', '502 Bad Gateway', '503 Busy', '302 Found']) {
    proxy.use(refuse(status))
    t.match(await sendOnce(env), unsent(`proxy answered ${status.slice(0, 3)}`))
  }
  proxy.use((_, socket) => { socket.destroy() })
  const asked = proxy.requests.length
  t.match(await sendOnce(env), unsent('proxy: ECONNRESET'))
  t.equal(proxy.requests.length, asked + 1, 'a proxy that hangs up is asked once')
  t.match(await sendOnce({ ...env, HTTP_PROXY: await startRaw(t, 'SSH-2.0-OpenSSH\r\n') }), unsent(/^proxy: HPE_/))
  t.match(await sendOnce({ ...env, HTTP_PROXY: 'http://127.0.0.1:9' }), unsent('proxy: ECONNREFUSED'))
  // A label of 64 bytes needs no name server.
  t.match(await sendOnce({ ...env, ALLOW_HTTP_UPSTREAM: 'true', HTTP_PROXY: `http://${'x'.repeat(64)}` }), unsent(/^proxy: (ENOTFOUND|EAI_)/))
  // The proxy speaks no TLS.
  t.match(await sendOnce({ ...env, HTTP_PROXY: proxy.url.replace('http:', 'https:') }), unsent(/^proxy: /))
  const mute = await startProxy(t, { answer: () => {} })
  t.match(await sendOnce({ ...env, HTTP_PROXY: mute.url, MIXPANEL_TIMEOUT_MS: '50' }), unsent('no answer from the proxy in 50 ms', 'mixpanel_timed_out'))
  t.match(await sendOnce({ ...env, HTTP_PROXY: mute.url, MIXPANEL_TIMEOUT_MS: '300' }, 50), unsent('no connection in 50 ms', 'mixpanel_timed_out'))
  t.equal(sandbox.requests.length, 0, 'nothing was sent')
})

t.test('a proxy that refuses is 502, one that is silent 504, and with an outbox nothing is lost', async t => {
  const proxy = await startProxy(t, { answer: refuse('407 Proxy Authentication Required') })
  const env = { HTTP_PROXY: proxy.url.replace('//', '//me:CANARY-SECRET@'), MIXPANEL_TIMEOUT_MS: '200', DEADLINE_MS: '600' }
  const { post, logged, lines, sandbox } = await startRelay(t, { env })
  const refused = await post(identity())
  t.match(refused.json(), { status: 502, code: 'mixpanel_unreachable', retryable: true })
  t.match(logged(), [{ msg: 'retrying', cause: 'proxy answered 407' }, { msg: 'request completed', status: 502, cause: 'proxy answered 407' }])
  proxy.use(() => {})
  const since = performance.now()
  const silent = await post(identity())
  t.match(silent.json(), { status: 504, code: 'mixpanel_timed_out' })
  t.ok(performance.now() - since < 1500, 'within the deadline')
  t.same(leaks(lines.join('') + refused.payload + silent.payload), [])
  t.equal(sandbox.requests.length, 0)
  const other = await startProxy(t, { answer: refuse('502 Bad Gateway') })
  const stored = await startRelayWithOutbox(t, { env: { HTTP_PROXY: other.url } })
  t.equal((await stored.post(identity())).statusCode, 202)
  other.use(undefined)
  while (stored.outbox.counts().waiting > 0) await sleep(50)
  t.equal(stored.sandbox.ledger.rows().length, 1)
})

t.test('a proxy that dies during a request leaves the outcome unknown; the next request makes a new tunnel', async t => {
  const sandbox = await startSandbox(t)
  const proxy = await startProxy(t)
  const env = { MIXPANEL_URL: sandbox.url, HTTP_PROXY: proxy.url }
  sandbox.faults.add({ name: 'wait', ms: 300 })
  const answer = sendOnce(env)
  while (sandbox.requests.length === 0) await sleep(5)
  proxy.breakAll()
  t.match(await answer, { code: 'mixpanel_unreachable', taken: 'unknown', isTransient: true })
  sandbox.faults.clear()
  t.match(await sendOnce(env), { code: 'accepted' })
  t.equal(proxy.requests.length, 2)
})

t.test('a tunnel names its target, takes any 2xx, and loses no byte', async t => {
  const early = await startRaw(t, 'HTTP/1.1 201 Made\r\n\r\nhello')
  const socket = await createTunnels({ url: new URL(early) }, 1000)({ protocol: 'http:', hostname: '[::1]', port: '' })
  t.equal(String((await once(socket, 'data'))[0]), 'hello')
  socket.destroy()
  const proxy = await startProxy(t, { answer: refuse('403 No') })
  for (const [hostname, port, protocol] of [['[::1]', '', 'http:'], ['::1', '8080', 'http:'], ['api.example', '', 'https:']] as const) {
    await t.rejects(createTunnels({ url: new URL(proxy.url) }, 1000)({ hostname, port, protocol }), { name: 'TunnelError', message: 'proxy answered 403' })
  }
  t.same(proxy.targets(), ['[::1]:80', '[::1]:8080', 'api.example:443'])
  t.match(proxy.requests[0]?.headers, { connection: 'keep-alive', 'proxy-connection': 'keep-alive' })
})

t.test('TLS is verified end to end, whatever the environment says', async t => {
  const sandbox = await startSandbox(t)
  const tls = await startTls(t, sandbox.url)
  const [plain, secure] = [await startProxy(t), await startProxy(t, { isTls: true })]
  const trusting = { NODE_EXTRA_CA_CERTS: PEM, NODE_NO_WARNINGS: '1' }
  for (const proxy of [plain, secure]) {
    const before = tls.connections.length
    const relay = await startServer(t, tls.url, { ...trusting, HTTPS_PROXY: proxy.url.replace('//', '//me:CANARY-SECRET@'), MAX_BATCH: '1' }, { isCovered: proxy === plain })
    t.match(relay.output(), `"proxy":"${proxy.url.replace('//', '//***@')}"`, 'the log says which proxy')
    t.same(new Set((await Promise.all(Array.from({ length: 20 }, () => relay.post()))).map(({ status }) => status)), new Set([200]))
    t.equal((await relay.post()).status, 200)
    t.same(new Set(proxy.targets()), new Set([new URL(tls.url).host]))
    t.ok(tls.connections.length > before)
    t.equal(await relay.kill('SIGTERM'), 0)
    t.same(leaks(relay.output()), [])
  }
  const seen = sandbox.requests.length
  const careless = { NODE_TLS_REJECT_UNAUTHORIZED: '0', NODE_NO_WARNINGS: '1' }
  const rows: [Env, RegExp][] = [
    [{ ...careless, HTTPS_PROXY: plain.url }, /DEPTH_ZERO_SELF_SIGNED_CERT through the proxy/],
    [{ ...careless, HTTPS_PROXY: secure.url }, /proxy: DEPTH_ZERO_SELF_SIGNED_CERT/],
    [{ ...trusting, HTTPS_PROXY: plain.url, MIXPANEL_URL: tls.url.replace('localhost', 'other.example') }, /ERR_TLS_CERT_ALTNAME_INVALID through the proxy/]
  ]
  for (const [env, cause] of rows) {
    const relay = await startServer(t, tls.url, env)
    t.equal((await relay.post()).status, 502)
    await relay.until(cause)
    await relay.kill()
  }
  t.equal(sandbox.requests.length, seen, 'no request arrives')
  const mute = await startProxy(t, { answer: (_, socket) => { socket.write('HTTP/1.1 200 OK\r\n\r\n') } })
  await t.rejects(createTunnels({ url: new URL(mute.url) }, 50)({ protocol: 'https:', hostname: '127.0.0.1', port: '' }), { message: 'no answer from 127.0.0.1 through the proxy in 50 ms', code: 'ETIMEDOUT' })
})

t.test('a new tunnel continues the TLS session of an earlier one', async t => {
  const sandbox = await startSandbox(t)
  const tls = await startTls(t, sandbox.url)
  const proxy = await startProxy(t)
  const relay = await startServer(t, tls.url, { NODE_EXTRA_CA_CERTS: PEM, HTTPS_PROXY: proxy.url }, { isCovered: true })
  t.equal((await relay.post()).status, 200)
  proxy.breakAll()
  await sleep(100)
  t.equal((await relay.post()).status, 200)
  t.same(tls.connections, [false, true])
  t.equal(await relay.kill('SIGTERM'), 0)
})

/** The keys of an identity provider, behind TLS on this machine. */
async function startKeys (t: Test) {
  const { publicKey, privateKey } = await generateKeyPair('ES256')
  const keys = JSON.stringify({ keys: [{ ...await exportJWK(publicKey), kid: '1', alg: 'ES256' }] })
  const url = await startRaw(t, `HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: ${keys.length}\r\n\r\n${keys}`, socket => socket.end())
  return { url, sign: (sub: string) => new SignJWT({ sub }).setProtectedHeader({ alg: 'ES256', kid: '1' }).setExpirationTime('1h').sign(privateKey) }
}

t.test('the keys of users, and the export, come through the proxy', async t => {
  const proxy = await startProxy(t)
  const keys = await startKeys(t)
  const { post } = await startRelay(t, { env: { HTTP_PROXY: proxy.url, JWT_JWKS_URL: `${keys.url}/keys` } })
  const body = identity()
  t.equal((await post(body, { headers: { authorization: `Bearer ${await keys.sign(body.identified_id)}` } })).statusCode, 200)
  t.equal(proxy.targets()[0], new URL(keys.url).host)
  const refusing = await startProxy(t, { answer: refuse('407 No') })
  const found = proxyFor({ HTTP_PROXY: refusing.url }, keys.url)
  await t.rejects(createJwks(keys.url, { log: silent, onChange () {}, proxy: found }), { message: 'JWT_JWKS_URL: no keys can be fetched (proxy answered 407)' })

  const account = 'me:CANARY-SECRET'
  const sandbox = await startSandbox(t, { serviceAccounts: [account] })
  const tls = await startTls(t, sandbox.url)
  const today = new Date().toISOString().slice(0, 10)
  const env = { MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: tls.url, MIXPANEL_SERVICE_ACCOUNT: account, MIXPANEL_PROJECT_ID: '1', NODE_EXTRA_CA_CERTS: PEM }
  const days = ['verify', '--from', today, '--to', today]
  const { exit, output } = startProcess(t, SERVER, days, { ...env, HTTPS_PROXY: proxy.url }, { isCovered: true })
  t.equal(await exit, 0)
  t.match(output(), /refused: 0/)
  t.equal(proxy.targets().at(-1), new URL(tls.url).host)
  const failing = startProcess(t, SERVER, days, { ...env, HTTPS_PROXY: refusing.url }, { isCovered: true })
  t.equal(await failing.exit, 1)
  t.match(failing.output(), /Mixpanel cannot be reached \(proxy answered 407\)/)
})

t.test('a server behind a proxy that is silent is not waited for', async t => {
  const proxy = await startProxy(t)
  const mute = await startRaw(t, '')
  const found = proxyFor({ HTTP_PROXY: proxy.url }, mute)
  await t.rejects(once(startGet(mute, { timeoutMs: 100, proxy: found }), 'response'), { code: 'ETIMEDOUT', message: 'no answer in 100 ms' })
})
