import { spawn } from 'node:child_process'
import { existsSync, openSync, readFileSync } from 'node:fs'
import { once } from 'node:events'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { parse } from 'yaml'
import { parentOf } from '../src/commands/npm-parent.ts'
import { openFilesLimit } from '../src/commands/serve.ts'
import { exchange, freePort, identity, leaks, startProcess, startSandbox, TOKEN, type Env } from './helper.ts'

const SERVER = 'dist/server.js'

async function startServer (t: Parameters<typeof startProcess>[0], env: Env = {}, options = {}) {
  const sandbox = await startSandbox(t)
  const server = startProcess(t, SERVER, [], { MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: sandbox.url, PORT: '0', LOG_LEVEL: 'debug', ...env }, options)
  const [, url] = await server.until(/Server listening at (http:[^"]+)"/)
  const post = (body: unknown = identity()) => fetch(`${url}/identify`, {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body)
  })
  return { ...server, sandbox, url: url as string, post }
}

/** Resident memory of a process, in MB. */
const residentMb = (pid = 0) => Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) / 1024

t.test('mistakes in the configuration: exit 1 and one sentence each', async t => {
  const { url } = await startSandbox(t)
  const rows: [args: string[], env: Env, sentences: RegExp][] = [
    [[], {}, /^MIXPANEL_TOKEN is required\.\n$/],
    [[], { MIXPANEL_TOKEN: TOKEN, PORT: 'x', HOST: '0.0.0.0' }, /^PORT must be .*\.\nHOST is not a loopback address.*\.\n$/],
    [['check-config'], { MIXPANEL_TOKEN: TOKEN, MAX_BATCH: '0' }, /^MAX_BATCH must be .*\.\n$/],
    [['toString'], { MIXPANEL_TOKEN: TOKEN }, /^toString is no command/],
    [['destroy'], { MIXPANEL_TOKEN: TOKEN }, /^destroy is no command: use serve, /],
    [['healthcheck'], { MIXPANEL_TOKEN: TOKEN, PORT: '9' }, /^The relay is not alive: .+\.\n$/],
    [['healthcheck'], { MIXPANEL_TOKEN: TOKEN, PORT: '9', HOST: '::1' }, /^The relay is not alive: .+\.\n$/],
    [['healthcheck'], { MIXPANEL_TOKEN: TOKEN, PORT: '9', HOST: '::', ALLOW_ANONYMOUS: 'true' }, /^The relay is not alive: .+\.\n$/],
    [['healthcheck'], { MIXPANEL_TOKEN: TOKEN, PORT: new URL(url).port }, /^The relay is not alive: \/livez answered 404\.\n$/]
  ]
  for (const [args, env, sentences] of rows) {
    const { exit, output } = startProcess(t, SERVER, args, env)
    t.equal(await exit, 1)
    t.match(output(), sentences)
    t.same(leaks(output()), [])
  }
})

t.test('check-config says where it would relay to', async t => {
  const { exit, output } = startProcess(t, SERVER, ['check-config'], { MIXPANEL_TOKEN: TOKEN, MIXPANEL_REGION: 'eu' })
  t.equal(await exit, 0)
  t.equal(output(), 'The configuration is valid: http://127.0.0.1:8080 relays to https://api-eu.mixpanel.com.\n')
})

t.test('SIGTERM: not ready at once, in flight answered, exit 0', async t => {
  const { child, exit, output, post, sandbox, url } = await startServer(t, { SHUTDOWN_DELAY_MS: '600' })
  const burst = await Promise.all(Array.from({ length: 300 }, () => post()))
  t.ok(burst.every(answer => answer.status === 200))
  t.same(await (await fetch(`${url}/openapi.json`)).json(), parse(readFileSync('openapi.yaml', 'utf8')))
  const port = new URL(url).port
  // More lines in one go than the log keeps for later.
  await Promise.all(Array.from({ length: 32 }, () => exchange(Number(port), 'GET /nope HTTP/1.1\r\nhost: x\r\n\r\n'.repeat(16), 1000)))
  const health = startProcess(t, SERVER, ['healthcheck'], { MIXPANEL_TOKEN: TOKEN, PORT: port })
  t.equal(await health.exit, 0)
  t.equal(health.output(), 'The relay is alive.\n')
  t.match(output(), /anyone on this machine may identify anyone/)
  t.equal(output().split('may identify anyone').length, 2, 'it warns once')

  child.kill('SIGUSR1')
  sandbox.faults.add({ name: 'wait', ms: 1200, times: 5 })
  const waiting = Array.from({ length: 5 }, () => post())
  await sleep(200)
  child.kill('SIGTERM')
  await sleep(150)
  t.equal((await fetch(`${url}/readyz`)).status, 503)
  t.equal((await post()).status, 200, 'who has not heard of it yet is served')
  for (const answer of await Promise.all(waiting)) t.equal(answer.status, 200)
  t.equal(await exit, 0)
  t.equal(sandbox.ledger.rows().length, 306)
  t.equal(output().split('"route":"/identify"').length - 1, 306, 'no log line is lost')
  t.equal(output().split('"status":404').length - 1, 512)
  t.notMatch(output(), /inspector|Debugger listening/)
  t.same(leaks(output()), [])
})

t.test('a process that gets no time while it should serve: who came meanwhile is answered', async t => {
  const { url: upstream } = await startSandbox(t)
  const { child, exit, until } = startProcess(t, SERVER, [], { MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: upstream, PORT: '0', SHUTDOWN_DELAY_MS: '500' })
  const [, url] = await until(/Server listening at (http:[^"]+)"/)
  const post = async () => (await fetch(`${url}/identify`, {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(identity())
  })).status
  await Promise.all(Array.from({ length: 10 }, post))
  child.kill('SIGTERM')
  await until(/"shutdown started"/)
  child.kill('SIGSTOP')
  // On the connections that are open, and on new ones.
  const waiting = Promise.all(Array.from({ length: 30 }, post))
  await sleep(700)
  child.kill('SIGCONT')
  t.same(new Set(await waiting), new Set([200]))
  t.equal(await exit, 0)
})

t.test('what hangs longer than SHUTDOWN_TIMEOUT_MS is given up, and a second signal ends it at once', async t => {
  for (const second of [false, true]) {
    const { child, exit, post, sandbox } = await startServer(t, { SHUTDOWN_TIMEOUT_MS: second ? '60000' : '300' })
    sandbox.faults.add({ name: 'hang', times: 9 })
    const lost = post().catch(() => 'lost')
    await sleep(200)
    child.kill('SIGTERM')
    await sleep(100)
    if (second) child.kill('SIGTERM')
    t.equal(await exit, 1)
    t.equal(await lost, 'lost')
  }
})

t.test('a connection that says nothing does not hold up the end', async t => {
  const { child, exit, output, url } = await startServer(t, { HOST: '0.0.0.0', ALLOW_ANONYMOUS: 'true', MIXPANEL_URL: 'http://gateway.invalid' })
  t.match(output(), /ALLOW_ANONYMOUS: anyone who reaches this address/)
  t.match(output(), /the token travels in the clear/)
  const port = Number(new URL(url).port)
  const silent = ['', 'POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{']
  for (const bytes of silent) connect(port, '127.0.0.1', function (this: Socket) { this.write(bytes) }).on('error', () => {})
  // One who went away in the middle of his request is not waited for either.
  const gone = connect(port, '127.0.0.1', () => gone.write(silent[1] as string, () => setTimeout(() => gone.resetAndDestroy(), 100)))
  await sleep(300)
  child.kill('SIGINT')
  t.equal(await exit, 0)
})

t.test('a bug outside of requests is logged and ends the process in order', async t => {
  const throwing = 'data:text/javascript,setTimeout(() => { throw new Error("from nowhere") }, 1500)'
  const { exit, output, post } = await startServer(t, { NODE_OPTIONS: `--import=${encodeURI(throwing)}` }, { mayBreak: true })
  t.equal((await post()).status, 200)
  t.equal(await exit, 1)
  t.match(output(), /"level":60,.*from nowhere.*"msg":"unhandled error"/)
})

t.test('the address is taken: exit 1 with a sentence', async t => {
  const { url } = await startServer(t)
  const second = startProcess(t, SERVER, [], { MIXPANEL_TOKEN: TOKEN, PORT: new URL(url).port })
  t.equal(await second.exit, 1)
  t.match(second.output(), /EADDRINUSE/)
})

t.test('the demo shows the job, serves, and ends with Ctrl-C', async t => {
  const { child, exit, output, until } = startProcess(t, 'dist/sandbox/demo.js', [], { PORT: '0' })
  const [, url] = await until(/curl -i (http:\S+)\/identify/)
  for (const words of ['200 accepted +merged', '200 accepted +repeat', '200 accepted +errAnonDistinctIdAssignedAlready',
    '422 refused_by_mixpanel: event, invalid +nothing', '400 invalid_request: /identified_id +nothing']) {
    t.match(output(), new RegExp(words))
  }
  await until(/Ctrl-C ends it/)
  const answer = await fetch(`${url}/identify`, { method: 'POST', body: JSON.stringify(identity()) })
  t.same(await answer.json(), { status: 'accepted' })
  t.equal((await fetch(`${url}/openapi.json`)).status, 200)
  const taken = startProcess(t, 'dist/sandbox/demo.js', [], { PORT: new URL(url as string).port })
  t.equal(await taken.exit, 1)
  t.match(taken.output(), /PORT=18080 npm run demo/)
  child.kill('SIGINT')
  t.equal(await exit, 0)
})

t.test('the sandbox alone', async t => {
  const { child, exit, until } = startProcess(t, 'dist/sandbox/server.js', [], { PORT: '0' })
  const [, url] = await until(/listens on (http:\S+);/)
  t.equal(await (await fetch(`${url}/track`, { method: 'POST', body: 'x' })).text(), '0')
  const strict = await fetch(`${url}/track?strict=1`, { method: 'POST', body: new URLSearchParams({ data: '[{"event":"$identify","properties":{}}]' }) })
  t.match(await strict.json(), { failed_records: [{ index: 0, field: 'properties.time' }] })
  child.kill('SIGTERM')
  t.equal(await exit, 0)
})

t.test('openapi prints the document that the repository holds', async t => {
  const { exit, output } = startProcess(t, SERVER, ['openapi'], { MIXPANEL_TOKEN: TOKEN, LOG_LEVEL: 'silent' })
  t.equal(await exit, 0)
  t.equal(output(), readFileSync('openapi.yaml', 'utf8'))
})

t.test('a signal while it starts: exit 0', async t => {
  const launch = () => {
    const child = spawn(process.execPath, [SERVER], { env: { MIXPANEL_TOKEN: TOKEN, PORT: '0' } })
    t.teardown(() => { child.kill('SIGKILL') })
    return child
  }
  const started = performance.now()
  const whole = launch()
  await new Promise<void>(resolve => whole.stdout.on('data', chunk => /Server listening/.test(String(chunk)) && resolve()))
  const startMs = performance.now() - started
  for (const share of [0.4, 0.6, 0.8]) {
    const child = launch()
    await sleep(startMs * share)
    child.kill('SIGTERM')
    t.same(await new Promise(resolve => child.once('exit', (...how) => resolve(how))), [0, null], `after ${share} of its start`)
  }
})

t.test('a signal while it waits for Redis: exit 0', async t => {
  const silent = createServer().listen(0, '127.0.0.1')
  t.teardown(() => silent.close())
  await once(silent, 'listening')
  const { port } = silent.address() as AddressInfo
  const { child, exit } = startProcess(t, SERVER, [], { MIXPANEL_TOKEN: TOKEN, PORT: '0', REDIS_URL: `redis://127.0.0.1:${port}` })
  await once(silent, 'connection')
  child.kill('SIGTERM')
  t.equal(await exit, 0)
})

t.test('SIGHUP ends nothing', async t => {
  const { child, exit, post } = await startServer(t)
  child.kill('SIGHUP')
  await sleep(200)
  t.equal((await post()).status, 200)
  child.kill('SIGTERM')
  t.equal(await exit, 0)
})

t.test('npm start: when npm ends, or is killed, the relay drains and exits', async t => {
  for (const signal of ['SIGTERM', 'SIGKILL'] as const) {
    const { execArgv, env: { PATH, HOME, ...others } } = process
    const coverage = Object.fromEntries(Object.entries(others).filter(([name]) => /^_?TAP|^NODE_V8/.test(name)))
    const loaders = execArgv.filter(argument => /processinfo/.test(argument)).join(' ')
    const env = { ...coverage, PATH, HOME, NODE_OPTIONS: loaders, MIXPANEL_TOKEN: TOKEN, PORT: '0' }
    const npm = spawn('npm', ['start'], { env, detached: true })
    t.teardown(() => { try { process.kill(-(npm.pid as number), 'SIGKILL') } catch {} })
    let output = ''
    npm.stdout.on('data', chunk => { output += String(chunk) })
    while (!/Server listening at (http:[^"]+)"/.test(output)) await sleep(50)
    const [, url] = /Server listening at (http:[^"]+)"/.exec(output) as unknown as [string, string]
    t.ok((await fetch(`${url}/livez`)).ok)
    // Longer than the relay takes to look for the first time.
    await sleep(700)
    npm.kill(signal)
    const alive = () => fetch(`${url}/livez`).then(() => true, () => false)
    const started = performance.now()
    while (await alive() && performance.now() - started < 10_000) await sleep(100)
    t.ok(performance.now() - started < 5000, signal)
    t.match(output, /"shutdown started"/)
  }
})

t.test('a process that was stopped: what lay in its sockets counts, and its own pause is no failure of Mixpanel', async t => {
  const { child, post, sandbox, url } = await startServer(t, { MIXPANEL_TIMEOUT_MS: '1000', DEADLINE_MS: '1500', MAX_BATCH: '1' })
  await post()
  const pause = async (fault: 'wait' | 'hang') => {
    sandbox.faults.add({ name: fault, ms: 400, times: 10 })
    const waiting = Promise.all(Array.from({ length: 10 }, () => post()))
    await sleep(200)
    child.kill('SIGSTOP')
    await sleep(2500)
    child.kill('SIGCONT')
    return new Set((await waiting).map(({ status }) => status))
  }
  t.same(await pause('wait'), new Set([200]))
  t.same(await pause('hang'), new Set([504]))
  const { parts } = await (await fetch(`${url}/readyz?verbose`)).json() as { parts: { mixpanel: string } }
  t.equal(parts.mixpanel, 'asked', 'the breaker is closed')
})

t.test('nobody reads its log: it serves on within its memory, and ends in time', async t => {
  const { child, exit, post } = await startServer(t, { RATE_LIMIT_MAX: '1000000', SHUTDOWN_TIMEOUT_MS: '1000' })
  child.stdout?.pause()
  const before = residentMb(child.pid)
  for (let round = 0; round < 30; round++) {
    const answers = await Promise.all(Array.from({ length: 200 }, () => post()))
    t.ok(answers.every(({ status }) => status === 200))
  }
  t.ok(residentMb(child.pid) < before + 120, `${before} and ${residentMb(child.pid)} MB`)
  const started = performance.now()
  child.kill('SIGTERM')
  const code = await Promise.race([new Promise(resolve => child.once('exit', resolve)), sleep(6000)])
  t.equal(code, 0)
  t.ok(performance.now() - started < 4500)
  child.stdout?.resume()
  await exit
})

t.test('its log cannot be written: it serves on, and ends at the first signal', { skip: existsSync('/dev/full') ? false : 'no /dev/full here' }, async t => {
  const { url: upstream } = await startSandbox(t)
  const port = await freePort()
  const full = openSync('/dev/full', 'w')
  const child = spawn(process.execPath, [SERVER], {
    env: { MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: upstream, PORT: String(port) }, stdio: ['ignore', full, 'ignore']
  })
  t.teardown(() => { child.kill('SIGKILL') })
  const post = () => fetch(`http://127.0.0.1:${port}/identify`, { method: 'POST', body: JSON.stringify(identity()) }).then(({ status }) => status, () => 0)
  while (await post() !== 200) await sleep(50)
  await sleep(1500)
  t.equal(await post(), 200)
  child.kill('SIGTERM')
  t.equal(await new Promise(resolve => child.once('exit', resolve)), 0)
})

t.test('with few files it has fewer connections, says so, and is never locked out', async t => {
  const { url: upstream } = await startSandbox(t)
  const port = await freePort()
  const child = spawn('sh', ['-c', `ulimit -n 300; exec ${process.execPath} ${SERVER}`], {
    env: { MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: upstream, PORT: String(port) }, stdio: ['ignore', 'pipe', 'inherit']
  })
  t.teardown(() => { child.kill('SIGKILL') })
  let output = ''
  child.stdout.on('data', chunk => { output += String(chunk) })
  while (!/Server listening/.test(output)) await sleep(50)
  t.match(output, /"level":40,.*"connections":172,"open_files":300/)
  const silent = Array.from({ length: 400 }, () => connect(port, '127.0.0.1').on('error', () => {}))
  t.teardown(() => silent.forEach(socket => socket.destroy()))
  await sleep(300)
  for (let count = 0; count < 5; count++) {
    t.equal((await fetch(`http://127.0.0.1:${port}/livez`, { headers: { connection: 'close' } })).status, 200)
    t.equal((await fetch(`http://127.0.0.1:${port}/identify`, { method: 'POST', body: JSON.stringify(identity()) })).status, 200)
  }
})

t.test('more connections than files: it says so', async t => {
  const { child, exit, output } = await startServer(t, { MAX_CONNECTIONS: '1000000' })
  child.kill('SIGTERM')
  t.equal(await exit, 0)
  t.match(output(), /"connections":\d+,"open_files":\d+,"msg":"fewer connections than MAX_CONNECTIONS/)
  t.equal(openFilesLimit(() => 'Limit  Soft Limit\nMax open files            1024                 4096                 files\n'), 1024)
  for (const limits of ['', 'Max open files            unlimited            unlimited            files']) t.equal(openFilesLimit(() => limits), Infinity)
  t.equal(parentOf(() => '42 (a name) with ) S 17 42 42 0'.replace(' with )', '')), '17')
  t.equal(parentOf(() => { throw new Error('ENOENT') }), '')
})

t.test('idle connections outlive those of the longest load balancer', async t => {
  const { url } = await startServer(t)
  t.match(await exchange(Number(new URL(url).port), 'GET /livez HTTP/1.1\r\nhost: x\r\n\r\n', 200), /\r\nKeep-Alive: timeout=620\r\n/)
})

t.test('/docs and /openapi.json are on for loopback, or where DOCS says so', async t => {
  for (const [env, status] of [[{}, 200], [{ DOCS: 'false' }, 404], [{ HOST: '0.0.0.0', ALLOW_ANONYMOUS: 'true' }, 404], [{ HOST: '0.0.0.0', ALLOW_ANONYMOUS: 'true', DOCS: 'true' }, 200]] as const) {
    const { url, child, exit } = await startServer(t, env)
    const local = `http://127.0.0.1:${new URL(url).port}`
    for (const path of ['/docs', '/openapi.json', '/docs/swagger-ui-bundle.js']) {
      const answer = await fetch(local + path)
      t.equal(answer.status, status, `${path} with ${JSON.stringify(env)}`)
      const text = await answer.text()
      if (status === 404) continue
      const again = await fetch(local + path, { headers: { 'if-none-match': `"x", W/${answer.headers.get('etag')}` } })
      t.same([again.status, await again.text()], [304, ''])
      t.equal(await (await fetch(local + path, { headers: { 'if-none-match': '"another"' } })).text(), text)
    }
    child.kill('SIGTERM')
    t.equal(await exit, 0)
  }
})
