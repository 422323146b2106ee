import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, writeFileSync } from 'node:fs'
import { createServer, type RequestListener } from 'node:http'
import { once } from 'node:events'
import { connect, createServer as createTcpServer, type AddressInfo } from 'node:net'
import { join } from 'node:path'
import { t, type Test } from 'tap'
import { describeConfig } from '#src/commands/check-config.js'
import { reasonOf } from '#src/commands/checks/check.js'
import { judgeDisk } from '#src/commands/checks/disk.js'
import { judgeCertificate, judgeClock, judgeTcp, tlsHint } from '#src/commands/checks/network.js'
import { checkSecrets } from '#src/commands/checks/secrets.js'
import { doctorCommand } from '#src/commands/doctor.js'
import { readConfig } from '#src/config.js'
import { TunnelError } from '#src/proxy.js'
import { freePort, leaks, needsRedis, startRedis, startSandbox, temporary, TOKEN, type Env } from './helper.ts'
import { SERVER, startProcess } from './processes.ts'
import { PEM, startBlackHole, startProxy, startRaw, startTls } from './way-out.ts'

// Some of these tests wait for a server that is silent.
t.jobs = 4

/** What doctor prints for a configuration, and the sentence with which it fails. */
async function doctor (env: Env, args: string[] = [], files: [string, string][] = []) {
  let output = ''
  let sentence = ''
  try {
    for await (const line of doctorCommand(readConfig({ MIXPANEL_TOKEN: TOKEN, ...env }, () => ''), args, files)) output += line
  } catch (error) {
    sentence = (error as Error).message
  }
  return { output, sentence, leaks: leaks(output + sentence) }
}

async function startUpstream (t: Test, listener: RequestListener) {
  const server = createServer(listener).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`
}

t.test('doctor checks the way to Mixpanel and the token, and sends no identity', async t => {
  const sandbox = await startSandbox(t)
  const { exit, output } = startProcess(t, SERVER, ['doctor'], { MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: sandbox.url }, { isCovered: true })
  t.equal(await exit, 0)
  t.match(output(), /sends to http:\/\/127.*MIXPANEL_REGION=us, MIXPANEL_URL is set.*MIXPANEL_ID_MERGE=original/)
  const lines = [
    'region: the host is 127\\.0\\.0\\.1:\\d+, by MIXPANEL_URL\\..*', 'DNS: 127\\.0\\.0\\.1 has IPv4 127\\.0\\.0\\.1; IPv6 none\\.', 'TCP: 127\\.0\\.0\\.1:\\d+ IPv4 in \\d+ ms\\.', 'proxy: none is set\\.',
    'HTTP: it answered 200.*', 'clock: \\d s .*', 'credentials: /import knows MIXPANEL_TOKEN\\. It answered: data, missing or empty\\.'
  ]
  t.match(output(), new RegExp(`\\n${lines.map(line => `ok {6}${line}\\n`).join('')}$`))
  t.same(leaks(output()), [])
  t.same(sandbox.ledger.rows(), [])
  const wrong = startProcess(t, SERVER, ['doctor', 'x'], { MIXPANEL_TOKEN: TOKEN }, { isCovered: true })
  t.equal(await wrong.exit, 1)
  t.match(wrong.output(), /^doctor takes only --id-merge\.\n$/)
  // Only the first line: the checks would leave this machine.
  const { value } = await doctorCommand(readConfig({ MIXPANEL_TOKEN: TOKEN, MIXPANEL_REGION: 'eu' }, () => ''), []).next()
  t.match(value, /sends to https:\/\/api-eu\.mixpanel\.com \(MIXPANEL_REGION=eu\)/)
  const fallback = await doctor({ MIXPANEL_REGION: 'in', HTTPS_PROXY: 'http://127.0.0.1:9' })
  t.match(fallback.output, /region: the host is api-in\.mixpanel\.com, by MIXPANEL_REGION=in\./)
})

t.test('the credentials fail only by 401 and 403', async t => {
  const sandbox = await startSandbox(t, { serviceAccounts: ['me:CANARY-SECRET'] })
  const env = { MIXPANEL_URL: sandbox.url }
  t.match(await doctor({ ...env, MIXPANEL_TOKEN: 'another' }), { output: /FAILED {2}credentials: \/import rejected MIXPANEL_TOKEN \(status 401\)\. Check/, sentence: '1 of 7 checks failed.' })
  const account = { MIXPANEL_SERVICE_ACCOUNT: 'me:CANARY-SECRET', MIXPANEL_PROJECT_ID: '1' }
  t.match(await doctor({ ...env, ...account }), { output: /ok {6}credentials: \/import knows MIXPANEL_SERVICE_ACCOUNT/, sentence: '', leaks: [] })
  const rows: [status: number, body: string, line: RegExp][] = [
    [403, '', /FAILED {2}credentials: .*status 403/], [200, '1', /ok {6}credentials: \/import does not reject MIXPANEL_TOKEN\./], [200, '0', /ok {6}credentials: .*no reason/],
    [404, '', /WARN {4}credentials: it cannot be told: mixpanel_misanswered, status 404\. Try again later/], [429, '', /WARN {4}credentials: it cannot be told: mixpanel_rate_limited/]
  ]
  for (const [status, body, line] of rows) {
    const url = await startUpstream(t, ({ method }, response) => { response.writeHead(method === 'POST' ? status : 200).end(body) })
    t.match((await doctor({ MIXPANEL_URL: url })).output, line, `${status} ${body}`)
  }
})

t.test('with --id-merge doctor asks for the mode of the project', async t => {
  const sandbox = await startSandbox(t)
  const run = (env: Env = {}) => doctor({ MIXPANEL_URL: sandbox.url, ...env }, ['--id-merge'])
  t.match(await run(), { output: /two equal ids.*stored, and free.*ok {6}mode: the project does not have Simplified ID Merge/s, sentence: '' })
  t.same(sandbox.ledger.rows().map(({ outcome }) => outcome), ['errSameIDs'], 'nothing merges')
  t.match(await run({ MIXPANEL_ID_MERGE: 'simplified' }), { output: /FAILED {2}mode: the project needs MIXPANEL_ID_MERGE=original\. Set it/, sentence: '1 of 8 checks failed.' })
  const simplified = await startSandbox(t, { mode: 'simplified' })
  t.match(await run({ MIXPANEL_URL: simplified.url }), { output: /the project needs MIXPANEL_ID_MERGE=simplified/ })
  t.match(await run({ MIXPANEL_URL: simplified.url, MIXPANEL_ID_MERGE: 'simplified' }), { output: /the project has Simplified ID Merge/, sentence: '' })
  t.match(await run({ MIXPANEL_TOKEN: 'another' }), { output: /FAILED {2}mode: it cannot be told: mixpanel_rejected_credentials/ })
})

t.test('a server that cannot be reached, or fails, is said once', async t => {
  t.match(await doctor({ MIXPANEL_URL: 'http://127.0.0.1:9' }), {
    output: /ok {6}DNS.*FAILED {2}TCP: 127\.0\.0\.1:9 IPv4 ECONNREFUSED\. Check the firewall.*\nok {6}proxy.*\nskipped HTTP: not checked, because TCP failed\.\nskipped clock:.*\nskipped credentials/s, sentence: '1 of 7 checks failed.'
  })
  // A label of 64 bytes needs no name server.
  t.match(await doctor({ MIXPANEL_URL: `https://${'x'.repeat(64)}.example` }), {
    output: /FAILED {2}DNS: .*\. Check the name x{64}\.example.*skipped TCP: .*DNS failed\.\n.*skipped TLS: .*DNS failed\.\nskipped HTTP: .*DNS failed/s
  })
  const down = await startUpstream(t, (_, response) => { response.writeHead(503).end() })
  t.match(await doctor({ MIXPANEL_URL: down }), {
    output: /FAILED {2}HTTP: it answered 503\. Mixpanel, or a gateway, is failing.*ok {6}clock.*WARN {4}credentials: it cannot be told: mixpanel_unreachable, status 503/s,
    sentence: '1 of 7 checks failed.'
  })
})

t.test('nothing that is silent is waited for', async t => {
  const since = performance.now()
  const [hole, mute] = [await startBlackHole(t), await startRaw(t, '')]
  const [dropped, http, tls] = await Promise.all([
    doctor({ MIXPANEL_URL: `http://${hole}` }), doctor({ MIXPANEL_URL: mute }), doctor({ MIXPANEL_URL: mute.replace('http:', 'https:') })
  ])
  t.match(dropped.output, /FAILED {2}TCP: \S+ IPv4 no answer\./)
  t.match(http.output, /FAILED {2}HTTP: no answer in 5000 ms\. The server takes connections.*\nWARN {4}clock: it cannot be told.*/)
  t.match(http.output, /WARN {4}credentials: it cannot be told: mixpanel_timed_out/)
  t.match(tls.output, /FAILED {2}TLS: no answer in 5000 ms\..*\nskipped HTTP/)
  t.ok(performance.now() - since < 20_000)
})

t.test('doctor goes through the proxy, and tells what is wrong with it', async t => {
  const sandbox = await startSandbox(t)
  const proxy = await startProxy(t)
  const env = { MIXPANEL_URL: sandbox.url, HTTP_PROXY: proxy.url.replace('//', '//me:CANARY-SECRET@') }
  t.match(await doctor(env), {
    output: new RegExp([
      'DNS: 127', `TCP: 127\\.0\\.0\\.1:${proxy.port} IPv4`, `ok {6}proxy: HTTP_PROXY http://\\*\\*\\*@127\\.0\\.0\\.1:${proxy.port} makes a tunnel to ${new URL(sandbox.url).host}\\.\n`,
      'ok {6}HTTP: ', 'ok {6}credentials'
    ].join('.*'), 's'),
    sentence: '',
    leaks: []
  })
  t.match(await doctor({ ...env, NO_PROXY: '127.0.0.1' }), { output: /ok {6}proxy: http:\/\/\*\*\*@127\.0\.0\.1:\d+ is not for http:\/\/127\.0\.0\.1\./ })
  t.match(await doctor({ MIXPANEL_URL: sandbox.url, HTTPS_PROXY: 'http://p.example' }), { output: /ok {6}proxy: http:\/\/p\.example is not for/ })
  proxy.use((_, socket) => { socket.end('HTTP/1.1 407 No\r\n\r\n') })
  t.match(await doctor(env), { output: /FAILED {2}proxy: .* 407\. Put the right user and password.*\nskipped HTTP: not checked, because proxy failed/, leaks: [] })
  proxy.use((_, socket) => { socket.end('HTTP/1.1 403 No\r\n\r\n') })
  t.match(await doctor(env), { output: /FAILED {2}proxy: .*: proxy answered 403\. The proxy must permit CONNECT to 127\.0\.0\.1:\d+, or NO_PROXY/ })
  const secure = await startProxy(t, { isTls: true })
  t.match(await doctor({ ...env, HTTP_PROXY: secure.url }), {
    output: /FAILED {2}proxy: .*: proxy: DEPTH_ZERO_SELF_SIGNED_CERT\. A proxy or gateway has a certificate of its own.*NODE_EXTRA_CA_CERTS/
  })
  // The ports that a URL leaves out.
  for (const [url, port] of [['http://127.0.0.1', 80], ['https://127.0.0.1', 443]] as const) {
    t.match(await doctor({ MIXPANEL_URL: sandbox.url, HTTP_PROXY: url }), { output: new RegExp(`TCP: 127\\.0\\.0\\.1:${port} `) })
  }
  t.match(await doctor({ MIXPANEL_URL: 'http://127.0.0.1', NO_PROXY: '*' }), { output: /TCP: 127\.0\.0\.1:80 / })
})

t.test('doctor verifies TLS, directly and through a proxy', async t => {
  const sandbox = await startSandbox(t)
  const tls = await startTls(t, sandbox.url)
  const proxy = await startProxy(t)
  const run = async (env: Env) => {
    const { exit, output } = startProcess(t, SERVER, ['doctor'], { MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: tls.url, ...env }, { isCovered: true })
    return { code: await exit, output: output() }
  }
  const fine = /ok {6}TLS: TLSv1\.\d, issued by localhost, and the certificate is valid until .*\nok {6}HTTP: it answered 200/
  t.match(await run({ NODE_EXTRA_CA_CERTS: PEM }), { code: 0, output: fine })
  t.match(await run({ NODE_EXTRA_CA_CERTS: PEM, HTTPS_PROXY: proxy.url }), { code: 0, output: fine })
  t.match(await run({ NODE_EXTRA_CA_CERTS: PEM, MIXPANEL_URL: tls.url.replace('localhost', '127.0.0.1') }), { code: 0, output: fine })
  t.match(await run({ NODE_TLS_REJECT_UNAUTHORIZED: '0' }), { code: 1, output: /FAILED {2}TLS: DEPTH_ZERO_SELF_SIGNED_CERT .*NODE_EXTRA_CA_CERTS\.\nskipped HTTP/ })
  t.match(await doctor({ MIXPANEL_URL: sandbox.url.replace('http:', 'https:') }), { output: /FAILED {2}TLS: .*Check that the port speaks TLS/ })
})

t.test('certificates, clocks, families and disks have a bound', async t => {
  const inDays = (days: number) => new Date(Date.now() + days * 86_400_000 + 60_000).toUTCString()
  t.match(judgeCertificate('TLSv1.3', inDays(14)), { status: 'ok' })
  t.match(judgeCertificate('TLSv1.3', inDays(13)), { status: 'WARN', hint: /^it ends in 13 days/ })
  t.match(tlsHint({ code: 'CERT_HAS_EXPIRED' }), /renew/)
  t.match(tlsHint({ code: 'ERR_TLS_CERT_ALTNAME_INVALID' }), /another host/)
  const at = (seconds: number) => new Date(Date.now() + seconds * 1000).toUTCString()
  const clocks: [number, string, RegExp][] = [[0, 'ok', /^\d s/], [-50, 'ok', /ahead of/], [70, 'WARN', /behind Mixpanel/], [-70, 'WARN', /ahead of/], [3700, 'FAILED', /behind/], [-3700, 'FAILED', /ahead/]]
  for (const [seconds, status, text] of clocks) t.match(judgeClock(at(seconds)), { status, text })
  t.match(judgeClock(undefined), { status: 'WARN', text: /no Date/ })
  const [four, six] = [{ family: 4, ms: 3 }, { family: 6, ms: 4 }]
  t.same(judgeTcp('h:1', [four, six]), { status: 'ok', text: 'h:1 IPv4 in 3 ms; IPv6 in 4 ms' })
  t.match(judgeTcp('h:1', [four, { ...six, cause: 'ENETUNREACH' }]), { status: 'ok', text: 'h:1 IPv4 in 3 ms; IPv6 ENETUNREACH' })
  t.match(judgeTcp('h:1', [four, { ...six, cause: 'no answer' }]), { status: 'WARN' })
  const disk = { free: 2e9, reserved: 1.6e7, wanted: 1e9, kind: undefined, ms: 1 }
  t.same(judgeDisk('/d', disk), { status: 'ok', text: '/d has 1907 MiB free, and an fsync takes 1.0 ms' })
  t.match(judgeDisk('/d', { ...disk, free: 1e7 }), { status: 'FAILED', hint: /free some space/ })
  t.match(judgeDisk('/d', { ...disk, free: 5e8 }), { status: 'WARN', hint: /OUTBOX_MAX_BYTES permits 953 MiB/ })
  t.match(judgeDisk('/d', { ...disk, ms: 51 }), { status: 'WARN', hint: /faster disk/ })
  t.match(judgeDisk('/d', { ...disk, kind: 'NFS' }), { status: 'WARN', text: /on NFS$/, hint: /local disk/ })
  t.equal(reasonOf(Object.assign(new Error('no\n such'), { code: 'EX' })), 'EX (no such)')
  t.equal(reasonOf(Object.assign(new Error('open EX'), { code: 'EX' })), 'open EX')
  t.equal(reasonOf(new TunnelError('proxy answered 407')), 'proxy answered 407')
  t.equal(reasonOf(new Error('x')), 'x')
})

t.test('doctor measures the disk of the outbox beside a running relay, and leaves no file', async t => {
  const sandbox = await startSandbox(t)
  const root = temporary(t)
  const env = { MIXPANEL_URL: sandbox.url, OUTBOX: `file:${root}/data` }
  t.match(await doctor(env), { output: new RegExp(`ok {6}disk: ${root}/data does not exist yet; ${root} has \\d+ MiB free, and an fsync takes [\\d.]+ ms\\.|WARN {4}disk`), sentence: '' })
  t.same(readdirSync(root), [])
  const relay = startProcess(t, SERVER, [], { MIXPANEL_TOKEN: TOKEN, ...env, PORT: '0' })
  await relay.until(/Server listening/)
  t.match(await doctor(env), { output: new RegExp(`disk: ${root}/data has`) })
  t.same(readdirSync(join(root, 'data')), ['relay'])
  relay.child.kill('SIGTERM')
  t.equal(await relay.exit, 0)
  t.notMatch(relay.output(), /"level":50/)
  t.match(await doctor({ ...env, OUTBOX: 'file:/proc/relay' }), { output: /FAILED {2}disk: \/proc\/relay does not exist yet; \/proc cannot be written: / })
  if (existsSync('/dev/shm')) t.match(await doctor({ ...env, OUTBOX: 'file:/dev/shm/relay' }), { output: /WARN {4}disk: .* on tmpfs\. Use a local disk/ })
})

t.test('doctor reads the files of secrets again', async t => {
  const root = temporary(t)
  const [good, none, large, folder] = ['good', 'none', 'large', 'folder'].map(name => join(root, name)) as [string, string, string, string]
  writeFileSync(good, 'x')
  writeFileSync(large, 'x'.repeat(70_000))
  mkdirSync(folder)
  t.same(await checkSecrets([['MIXPANEL_TOKEN', good]]), { status: 'ok', text: `MIXPANEL_TOKEN_FILE ${good} can be read` })
  t.match(await checkSecrets([['MIXPANEL_TOKEN', good], ['API_KEYS', none], ['JWT_SECRET', large]]), { status: 'FAILED', text: `API_KEYS_FILE ${none}: ENOENT; JWT_SECRET_FILE ${large}: more than 65536 bytes` })
  t.match(await checkSecrets([['API_KEYS', folder]]), { status: 'WARN', text: /not a regular file/ })
  const sandbox = await startSandbox(t)
  t.match(await doctor({ MIXPANEL_URL: sandbox.url }, [], [['API_KEYS', good]]), { output: /ok {6}secrets: API_KEYS_FILE .*good can be read\.\n/, sentence: '' })
})

t.test('doctor checks Redis and what a 202 is worth there', needsRedis, async t => {
  const sandbox = await startSandbox(t)
  const redis = await startRedis(t, { more: ['--requirepass', 'CANARY-SECRET'] })
  const url = redis.url.replace('//', '//:CANARY-SECRET@')
  const cli = (...args: string[]) => spawnSync('redis-cli', ['-p', String(redis.port), '-a', 'CANARY-SECRET', ...args]).status
  const run = (env: Env = {}) => doctor({ MIXPANEL_URL: sandbox.url, REDIS_URL: url, OUTBOX: 'redis', ...env })
  const line = (status: string, rest: string) => ({ output: new RegExp(`${status.padEnd(7)} Redis: 127\\.0\\.0\\.1:${redis.port} ${rest}`), leaks: [] })
  t.match(await run(), line('ok', 'is a master with appendonly yes, appendfsync always and maxmemory-policy noeviction\\.'))
  t.match(await run({ OUTBOX: 'off' }), line('ok', 'answers, and has only rate limits \\(OUTBOX=off\\)\\.'))
  cli('config', 'set', 'maxmemory-policy', 'volatile-lru')
  t.match(await run(), line('WARN', '.*Set maxmemory-policy noeviction'))
  cli('config', 'set', 'maxmemory-policy', 'allkeys-lru')
  t.match(await run(), line('FAILED', '.*a full Redis drops queued identities'))
  cli('config', 'set', 'maxmemory-policy', 'noeviction')
  cli('config', 'set', 'appendfsync', 'everysec')
  t.match(await run(), line('WARN', '.*Set appendfsync always'))
  cli('config', 'set', 'appendonly', 'no')
  t.match(await run(), line('FAILED', '.*Set appendonly yes'))
  cli('acl', 'setuser', 'bare', 'on', '>CANARY-SECRET', '+@all', '-config', '-role', '~*')
  t.match(await run({ REDIS_URL: redis.url.replace('//', '//bare:CANARY-SECRET@') }), line('ok', 'answers\\. It refuses CONFIG'))
  cli('acl', 'setuser', 'bare', '+config')
  t.match(await run({ REDIS_URL: redis.url.replace('//', '//bare:CANARY-SECRET@') }), line('FAILED', 'is a server with'))
  t.match(await run({ REDIS_URL: redis.url }), { output: /FAILED {2}Redis: .*: Redis cannot be reached \(.*\)\. Check that it runs/ })
  cli('replicaof', '127.0.0.1', String(await freePort()))
  t.match(await run(), line('FAILED', 'is a replica\\. Name the primary'))
  redis.child.kill('SIGSTOP')
  const since = performance.now()
  t.match(await run(), { output: /FAILED {2}Redis: / })
  t.ok(performance.now() - since < 5000)
  // A connection that dies after the commands of a new connection.
  const other = await startRedis(t)
  const between = createTcpServer(socket => {
    const upstream = connect(other.port, '127.0.0.1')
    upstream.on('error', () => {}).pipe(socket.on('error', () => {}))
    socket.on('data', chunk => /role\r/i.test(String(chunk)) || upstream.write(chunk))
    socket.on('close', () => upstream.destroy())
  }).listen(0, '127.0.0.1')
  await once(between, 'listening')
  t.teardown(() => { between.close() })
  const { port } = between.address() as AddressInfo
  t.match(await run({ REDIS_URL: `redis://127.0.0.1:${port}` }), { output: /FAILED {2}Redis: Command timed out\. See whether it answers PING/ })
})

t.test('check-config prints the effective configuration, without secrets', async t => {
  const env = {
    MIXPANEL_TOKEN_FILE: '/run/secrets/token',
    MIXPANEL_REGION: 'eu',
    API_KEYS: 'web:CANARY-KEY-0123456789,CANARY-KEY-9876543210',
    REDIS_URL: 'redis://:CANARY-SECRET@h:1',
    https_proxy: 'http://me:CANARY-SECRET@proxy:3128',
    JWT_JWKS_URL: 'https://idp.example/keys?key=CANARY-SECRET',
    JWT_ISSUER: 'a\nb',
    CORS_ORIGINS: 'https://a.example,https://b.example',
    MAX_BATCH: '7'
  }
  const text = describeConfig(readConfig(env, () => TOKEN), env)
  t.same(leaks(text), [])
  const lines = text.split('\n')
  for (const line of [
    'MIXPANEL_TOKEN=*** # file /run/secrets/token', 'MIXPANEL_REGION=eu # environment', 'MIXPANEL_URL=https://api-eu.mixpanel.com # default', 'MIXPANEL_DATA_URL=https://data-eu.mixpanel.com # default',
    'REDIS_URL=*** # environment', 'HTTPS_PROXY=http://***@proxy:3128 # environment, as https_proxy', 'HTTP_PROXY= # not set', 'JWT_JWKS_URL=https://idp.example/keys?*** # environment', 'JWT_ISSUER=a b # environment',
    'JWT_SECRET= # not set', 'CORS_ORIGINS=https://a.example,https://b.example # environment', 'MAX_BATCH=7 # environment', 'DEADLINE_MS=10000 # default', 'DOCS=true # default', 'TRUST_PROXY= # not set'
  ]) t.ok(lines.includes(line), line)
  t.match(text, /^API_KEYS=key:web,key:[0-9a-f]{8} # environment$/m)
  const bare = { MIXPANEL_TOKEN: TOKEN, DOCS: 'false' }
  t.match(describeConfig(readConfig(bare, () => ''), { ...bare, MIXPANEL_ID_MERG: 'x', MIXPANEL_PORT_80_TCP: 'x', MIXPANEL_SERVICE_HOST: 'x', MIXPANEL_TOKEN_FILE: '' }),
    /^# MIXPANEL_ID_MERG is no variable of the relay, and has no effect\.\nThe configuration is valid/m)
  t.match(describeConfig(readConfig({ ...bare, HOST: '::1' }, () => ''), bare), /http:\/\/\[::1\]:8080 relays to/)
  t.match(describeConfig(readConfig(bare, () => ''), bare), /^API_KEYS= # not set$.*^JWT_JWKS_URL= # not set$.*^DOCS=false # environment$/ms)
  const { exit, output } = startProcess(t, SERVER, ['check-config'], { MIXPANEL_TOKEN: TOKEN, MIXPANEL_REGION: 'eu' }, { isCovered: true })
  t.equal(await exit, 0)
  t.match(output(), /^MIXPANEL_TOKEN=\*\*\* # environment\n(?:[A-Z_]+=.* # .*\n)+The configuration is valid: .*\.\n$/)
  t.ok(output().endsWith('\nThe configuration is valid: http://127.0.0.1:8080 relays to https://api-eu.mixpanel.com.\n'))
})
