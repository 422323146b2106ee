import { spawn } from 'node:child_process'
import { existsSync, openSync, readdirSync, readFileSync } from 'node:fs'
import { connect } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { parentOf } from '#src/commands/npm-parent.js'
import { openFilesLimit } from '#src/commands/serve.js'
import { freePort, identity, leaks, startSandbox, temporary, TOKEN, type Env } from './helper.ts'
import { SERVER, startProcess, startServer, withoutCoverage } from './processes.ts'
import { exchange, get } from './raw-http.ts'

/** Resident memory of a process, in MB. */
const residentMb = (pid = 0) => Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) / 1024

// Most of these tests wait for a process or for a bound in time.
t.jobs = 3

t.test('a command that fails exits with 1 and one sentence for each mistake', async t => {
  const rows: [args: string[], env: Env, sentences: RegExp, isCovered?: boolean][] = [
    [[], { MIXPANEL_TOKEN: TOKEN, PORT: 'x', HOST: '0.0.0.0' }, /^PORT must be .*\.\nHOST is not a loopback address.*\.\n$/],
    [['check-config'], { MIXPANEL_TOKEN: TOKEN, MAX_BATCH: '0' }, /^MAX_BATCH must be .*\.\n$/],
    [['toString'], { MIXPANEL_TOKEN: TOKEN }, /^toString is not a command: use serve, /, true],
    [['healthcheck'], { MIXPANEL_TOKEN: TOKEN, PORT: '9' }, /^The relay is not alive: .+\.\n$/, true]
  ]
  for (const [args, env, sentences, isCovered = false] of rows) {
    const { exit, output } = startProcess(t, SERVER, args, env, { isCovered })
    t.equal(await exit, 1, `${args} exits with 1`)
    t.match(output(), sentences)
    t.same(leaks(output()), [], 'the output does not show the token')
  }
})

t.test('openapi prints openapi.yaml', async t => {
  const { exit, output } = startProcess(t, SERVER, ['openapi'], { MIXPANEL_TOKEN: TOKEN, LOG_LEVEL: 'silent' }, { isCovered: true })
  t.equal(await exit, 0)
  t.ok(output() === readFileSync('openapi.yaml', 'utf8'), 'openapi.yaml is up to date: run npm run openapi')
})

t.test('the demo prints its examples, serves, and ends at Ctrl-C', async t => {
  const { child, exit, output, until } = startProcess(t, 'dist/sandbox/demo.js', [], { PORT: '0' }, { isCovered: true })
  const [, url] = await until(/curl -i (http:\S+)\/identify/)
  for (const words of ['200 accepted +merged', '200 accepted +repeat', '200 accepted +errAnonDistinctIdAssignedAlready',
    '422 refused_by_mixpanel: event, invalid +nothing', '400 invalid_request: /identified_id +nothing']) {
    t.match(output(), new RegExp(words))
  }
  await until(/Ctrl-C stops the demo/)
  const [, page = ''] = await until(/in a browser: (http:\S+)/)
  t.match(await (await fetch(page, { headers: { accept: 'text/html' } })).text(), /<title>Mixpanel sandbox/)
  const answer = await fetch(`${url}/identify`, { method: 'POST', body: JSON.stringify(identity()) })
  t.same(await answer.json(), { status: 'accepted' })
  t.equal((await fetch(`${url}/openapi.json`)).status, 200)
  t.match(output(), /"verdict":"refused","reason":"errAnonDistinctIdAssignedAlready"/, 'it ends with verify')
  const wrong = startProcess(t, 'dist/sandbox/demo.js', ['legacy'], {}, { isCovered: true })
  t.equal(await wrong.exit, 1)
  t.match(wrong.output(), /npm run demo -- simplified/)
  const taken = startProcess(t, 'dist/sandbox/demo.js', ['simplified'], { PORT: new URL(url as string).port }, { isCovered: true })
  t.equal(await taken.exit, 1)
  t.match(taken.output(), /PORT=18080 npm run demo/)
  child.kill('SIGINT')
  t.equal(await exit, 0)
})

t.test('the sandbox runs alone', async t => {
  const { child, exit, until } = startProcess(t, 'dist/sandbox/server.js', [], { PORT: '0' }, { isCovered: true })
  const [, url] = await until(/listens on (http:\S+);/)
  t.equal(await (await fetch(`${url}/track`, { method: 'POST', body: 'x' })).text(), '0')
  const strict = await fetch(`${url}/track?strict=1`, { method: 'POST', body: new URLSearchParams({ data: '[{"event":"$identify","properties":{}}]' }) })
  t.match(await strict.json(), { failed_records: [{ index: 0, field: 'properties.time' }] })
  child.kill('SIGTERM')
  t.equal(await exit, 0)
})

t.test('the sandbox imitates one of three modes', async t => {
  const wrong = startProcess(t, 'dist/sandbox/server.js', [], { SANDBOX_MODE: 'other' }, { isCovered: true })
  t.equal(await wrong.exit, 1)
  t.match(wrong.output(), /SANDBOX_MODE must be original, simplified or legacy/)
})

t.test('SIGUSR2 toggles debug at run time, and neither it nor SIGUSR1 stops anything', async t => {
  const { url: upstream } = await startSandbox(t)
  // It says when its handlers are there, and then loads the rest of the program.
  const ready = 'data:text/javascript,process.on("newListener", name => { if (name === "SIGUSR2") console.log("handled") })'
  const early = startProcess(t, SERVER, [], { MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: upstream, PORT: '0', NODE_OPTIONS: `--import=${encodeURI(ready)}` })
  await early.until(/handled/)
  for (const signal of ['SIGUSR1', 'SIGUSR2'] as const) early.child.kill(signal)
  await early.until(/Server listening/)
  early.child.kill('SIGTERM')
  t.equal(await early.exit, 0)
  const { child, exit, output, until, post } = await startServer(t, upstream, {}, { isCovered: true })
  child.kill('SIGUSR2')
  await until(/"level":40,.*"log_level":"debug".*"log level set"/)
  t.equal((await post()).status, 200)
  child.kill('SIGUSR2')
  await until(/"log_level":"info"/)
  t.equal((await post()).status, 200)
  child.kill('SIGTERM')
  t.equal(await exit, 0)
  t.notMatch(output(), /"signal":"SIGUSR/)
})

t.test('an exception outside of requests is logged, and the process exits with 1', async t => {
  const throwing = 'data:text/javascript,process.once("SIGUSR2", () => { throw new Error("outside") })'
  const { url: upstream } = await startSandbox(t)
  const { child, exit, output, post } = await startServer(t, upstream, { NODE_OPTIONS: `--import=${encodeURI(throwing)}` }, { mayBreak: true, isCovered: true })
  t.equal((await post()).status, 200)
  child.kill('SIGUSR2')
  t.equal(await exit, 1)
  t.match(output(), /"level":60,.*outside.*"msg":"unhandled error"/)
})

t.test('--help and --version need no configuration', async t => {
  const help = startProcess(t, SERVER, ['--help'], {}, { isCovered: true })
  t.equal(await help.exit, 0)
  for (const name of ['serve', 'healthcheck', 'check-config', 'doctor', 'verify', 'outbox drop --user', 'openapi']) t.match(help.output(), name)
  const version = startProcess(t, SERVER, ['--version'], {}, { isCovered: true })
  t.equal(await version.exit, 0)
  t.equal(version.output().trim(), JSON.parse(readFileSync('package.json', 'utf8')).version)
})

t.test('what Kubernetes sets for a Service named metrics is ignored with one warning', async t => {
  const { url } = await startSandbox(t)
  const server = await startServer(t, url, { METRICS_PORT: 'tcp://10.0.0.1:9090', JWT_PORT: 'tcp://10.0.0.1:80', MIXPANEL_REGIO: 'eu' }, { isCovered: true })
  t.match(server.output(), /"variable":"MIXPANEL_REGIO","msg":"variable unknown"/)
  t.match(server.output(), /"variable":"METRICS_PORT","hint":"[^"]*enableServiceLinks[^"]*","msg":"variable ignored"/)
  t.equal(await server.kill('SIGTERM'), 0)
})

t.test('no secret stays in the environment, which child processes and diagnostic reports have', async t => {
  const { url } = await startSandbox(t)
  const directory = temporary(t)
  const secrets = { API_KEYS: 'web:CANARY-KEY-0123456789', JWT_SECRET: `CANARY-JWT-${'s'.repeat(32)}`, MIXPANEL_SERVICE_ACCOUNT: 'me:CANARY-SECRET', MIXPANEL_PROJECT_ID: '1' }
  const { child } = await startServer(t, url, { ...secrets, NODE_OPTIONS: `--report-on-signal --report-directory=${directory}` })
  child.kill('SIGUSR2')
  while (readdirSync(directory).length === 0) await sleep(20)
  await sleep(500)
  const report = readFileSync(join(directory, String(readdirSync(directory)[0])), 'utf8')
  t.match(report, /"MIXPANEL_PROJECT_ID": "1"/, 'the report has the environment')
  t.same(leaks(report), [])
})

t.test('a port that is in use is exit 1 and a sentence', async t => {
  const { url: upstream } = await startSandbox(t)
  const { url } = await startServer(t, upstream)
  const second = startProcess(t, SERVER, [], { MIXPANEL_TOKEN: TOKEN, PORT: new URL(url).port })
  t.equal(await second.exit, 1)
  t.match(second.output(), /EADDRINUSE/)
})

t.test('a library that OUTBOX does not need is not loaded', { skip: !existsSync('/proc/self/maps') && 'needs /proc' }, async t => {
  // Threads have modules of their own, but the process has the library of all of them.
  const report = `data:text/javascript,${encodeURIComponent(`
    import module from 'node:module'
    import { readFileSync } from 'node:fs'
    const names = () => [...Object.keys(module._cache), ...readFileSync('/proc/self/maps', 'utf8').split('\\n')]
    process.on('SIGTERM', () => console.log('loaded:' + names().filter(path => /libsql|ioredis/.test(path)).length))`)}`
  const sandbox = await startSandbox(t)
  const loaded = async (env: Env) => {
    const server = await startServer(t, sandbox.url, { ...env, NODE_OPTIONS: `--import=${report}` })
    t.equal(await server.kill('SIGTERM'), 0)
    return Number((await server.until(/loaded:(\d+)/))[1])
  }
  t.equal(await loaded({}), 0, 'without OUTBOX neither libsql nor ioredis is loaded')
  t.ok(await loaded({ OUTBOX: `file:${temporary(t)}/outbox` }) > 0, 'with OUTBOX=file libsql is loaded')
})

t.test('a log that is not read costs bounded memory and does not delay the exit', async t => {
  const { url: upstream } = await startSandbox(t)
  const { child, exit, port, post } = await startServer(t, upstream, { SHUTDOWN_TIMEOUT_MS: '1000' })
  child.stdout?.pause()
  const before = residentMb(child.pid)
  // Nearly two megabytes of log, of which the relay keeps one.
  const requests = get('/nope', `x-request-id: ${'x'.repeat(128)}\r\n`).repeat(16)
  for (let round = 0; round < 10; round++) {
    await Promise.all(Array.from({ length: 32 }, () => exchange(port, requests, { answers: 16 })))
    t.equal((await post()).status, 200, 'an identity is accepted')
  }
  t.ok(residentMb(child.pid) < before + 120, `the memory grows by less than 120 MB, and did from ${before} to ${residentMb(child.pid)} MB`)
  const started = performance.now()
  child.kill('SIGTERM')
  const code = await Promise.race([new Promise(resolve => child.once('exit', resolve)), sleep(6000)])
  t.equal(code, 0)
  t.ok(performance.now() - started < 4500, 'the process ends within SHUTDOWN_TIMEOUT_MS and 3 s')
  child.stdout?.resume()
  await exit
})

t.test('the relay serves while its log cannot be written, and ends at the first signal', { skip: existsSync('/dev/full') ? false : '/dev/full does not exist' }, async t => {
  const { url: upstream } = await startSandbox(t)
  const port = await freePort()
  const full = openSync('/dev/full', 'w')
  const env = { MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: upstream, PORT: String(port) }
  // tap adds what coverage needs.
  const child = spawn(process.execPath, [SERVER], { env, stdio: ['ignore', full, 'ignore'] })
  t.teardown(() => { child.kill('SIGKILL') })
  const post = () => fetch(`http://127.0.0.1:${port}/identify`, { method: 'POST', body: JSON.stringify(identity()) }).then(({ status }) => status, () => 0)
  while (await post() !== 200) await sleep(50)
  await sleep(500)
  t.equal(await post(), 200)
  child.kill('SIGTERM')
  t.equal(await new Promise(resolve => child.once('exit', resolve)), 0)
})

t.test('with few open files allowed the relay bounds its connections, warns, and serves', async t => {
  const { url: upstream } = await startSandbox(t)
  const port = await freePort()
  const env = { MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: upstream, PORT: String(port) }
  const child = spawn('sh', ['-c', 'ulimit -n 300; exec env "$@"', 'sh', ...withoutCoverage(env, SERVER)], { stdio: ['ignore', 'pipe', 'inherit'] })
  t.teardown(() => { child.kill('SIGKILL') })
  let output = ''
  child.stdout.on('data', chunk => { output += String(chunk) })
  while (!/Server listening/.test(output)) await sleep(50)
  t.match(output, /"level":40,.*"connections":172,"open_files":300/, 'the warning has the numbers')
  const silent = Array.from({ length: 400 }, () => connect(port, '127.0.0.1').on('error', () => {}))
  t.teardown(() => silent.forEach(socket => socket.destroy()))
  await sleep(300)
  for (let count = 0; count < 5; count++) {
    t.equal((await fetch(`http://127.0.0.1:${port}/livez`, { headers: { connection: 'close' } })).status, 200)
    t.equal((await fetch(`http://127.0.0.1:${port}/identify`, { method: 'POST', body: JSON.stringify(identity()) })).status, 200)
  }
})

t.test('MAX_CONNECTIONS beyond the open files limit is a warning', async t => {
  const { url: upstream } = await startSandbox(t)
  const { child, exit, output } = await startServer(t, upstream, { MAX_CONNECTIONS: '1000000' }, { isCovered: true })
  child.kill('SIGTERM')
  t.equal(await exit, 0)
  t.match(output(), /"connections":\d+,"open_files":\d+,"msg":"fewer connections than MAX_CONNECTIONS"/)
})

t.test('openFilesLimit and parentOf read /proc, and have a default where it cannot be read', async t => {
  t.equal(openFilesLimit(() => 'Limit  Soft Limit\nMax open files            1024                 4096                 files\n'), 1024)
  t.equal(openFilesLimit(() => { throw new Error('ENOENT') }), Infinity)
  for (const limits of ['', 'Max open files            unlimited            unlimited            files']) t.equal(openFilesLimit(() => limits), Infinity)
  t.equal(parentOf(() => '42 (a name) with ) S 17 42 42 0'.replace(' with )', '')), '17')
  t.equal(parentOf(() => { throw new Error('ENOENT') }), '')
})
