import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { parse } from 'yaml'
import { whenOrphaned } from '#src/commands/npm-parent.js'
import { identity, leaks, listen, startRelay, startSandbox, TOKEN } from './helper.ts'
import { SERVER, startProcess, startServer } from './processes.ts'
import { exchange, get, halfOpenPeer, post, statuses } from './raw-http.ts'

// Most of these tests wait for a process or for a bound in time.
t.jobs = 3

t.test('once the shutdown has begun /readyz is 503, and requests are still served', async t => {
  const { app, inject, post } = await startRelay(t)
  app.beginShutdown()
  t.match(await inject({ url: '/readyz' }), { statusCode: 503, body: '{"status":"draining"}', headers: { connection: 'close' } })
  t.equal((await inject({ url: '/livez' })).statusCode, 200, 'the relay is alive')
  t.match(await post(identity()), { statusCode: 200, headers: { connection: 'close' } }, 'an identity is sent')
})

t.test('close answers the requests in flight, and refuses what completes after it', async t => {
  const { app, port, sandbox } = await listen(t)
  sandbox.faults.add({ name: 'wait', ms: 400 })
  const inFlight = halfOpenPeer(t, port)
  inFlight.socket.write(post(JSON.stringify(identity())))
  // Half a request before the close, the other half after it.
  const late = halfOpenPeer(t, port)
  const whole = post(JSON.stringify(identity()))
  late.socket.write(whole.slice(0, 20))
  await sleep(150)
  // The kernel has this one, and Node has not accepted it yet.
  const pending = halfOpenPeer(t, port)
  pending.socket.write(get('/livez'))
  const closed = app.close()
  while (!app.isShuttingDown()) await sleep(5)
  late.socket.write(whole.slice(20))
  t.match(await inFlight.ended, /^HTTP\/1.1 200 OK.*"accepted"/s, 'the request in flight is answered')
  t.match(await late.ended, /^HTTP\/1.1 503 .*retry-after: 1.*"draining"/s, 'the late request gets 503')
  t.match(await pending.ended, /^HTTP\/1.1 200 OK/, 'the pending connection is accepted and answered')
  for (const { socket } of [inFlight, late, pending]) socket.destroy()
  await closed
})

t.test('at SIGTERM the relay is not ready at once, answers what is in flight, and exits with 0', async t => {
  const sandbox = await startSandbox(t)
  // As under npm start, where the relay watches npm.
  const env = { SHUTDOWN_DELAY_MS: '600', LOG_LEVEL: 'debug', npm_lifecycle_event: 'start' }
  const { child, exit, output, post, url, port } = await startServer(t, sandbox.url, env, { isCovered: true })
  const burst = await Promise.all(Array.from({ length: 100 }, () => post()))
  t.ok(burst.every(answer => answer.status === 200), 'a hundred concurrent identities are accepted')
  t.same(await (await fetch(`${url}/openapi.json`)).json(), parse(readFileSync('openapi.yaml', 'utf8')))
  // More log lines at once than fit into one write.
  await Promise.all(Array.from({ length: 32 }, () => exchange(port, get('/nope').repeat(16), { answers: 16 })))
  const health = startProcess(t, SERVER, ['healthcheck'], { MIXPANEL_TOKEN: TOKEN, PORT: String(port) })
  t.equal(await health.exit, 0)
  t.equal(health.output(), 'The relay is alive.\n')
  t.match(output(), /"risk":"any process on this machine may merge identities","msg":"no caller credentials"/)
  t.equal(output().split('no caller credentials').length, 2, 'the warning is logged once')

  child.kill('SIGUSR1')
  sandbox.faults.add({ name: 'wait', ms: 1200, times: 5 })
  const inFlight = Array.from({ length: 5 }, () => post())
  await sleep(200)
  child.kill('SIGTERM')
  await sleep(150)
  t.equal((await fetch(`${url}/readyz`)).status, 503, 'the relay is not ready')
  t.equal((await post()).status, 200, 'during SHUTDOWN_DELAY_MS an identity is still accepted')
  for (const answer of await Promise.all(inFlight)) t.equal(answer.status, 200, 'an identity in flight is accepted')
  t.equal(await exit, 0)
  t.equal(sandbox.ledger.rows().length, 106)
  t.equal(output().split('"route":"/identify"').length - 1, 106, 'each identity has its log line')
  t.equal(output().split('"status":404').length - 1, 512, 'each unknown path has its log line')
  t.notMatch(output(), /inspector|Debugger listening/, 'SIGUSR1 does not open the inspector')
  t.same(leaks(output()), [])
})

t.test('requests that arrive while the process is stopped in its shutdown are answered', async t => {
  const { url: upstream } = await startSandbox(t)
  const { child, exit, until, port } = await startServer(t, upstream, { SHUTDOWN_DELAY_MS: '500' })
  const open = Array.from({ length: 10 }, () => halfOpenPeer(t, port))
  for (const { socket } of open) socket.write(post(JSON.stringify(identity())))
  await Promise.all(open.map(({ answered }) => answered()))
  child.kill('SIGTERM')
  await until(/"shutdown started"/)
  child.kill('SIGSTOP')
  // The kernel accepts new connections for the stopped process.
  const fresh = Array.from({ length: 20 }, () => halfOpenPeer(t, port))
  await Promise.all(fresh.map(({ socket }) => once(socket, 'connect')))
  for (const { socket } of [...open, ...fresh]) socket.write(post(JSON.stringify(identity())))
  await sleep(700)
  child.kill('SIGCONT')
  await Promise.all([...open.map(({ answered }) => answered(2)), ...fresh.map(({ answered }) => answered())])
  for (const { text } of open) t.same(statuses(text()), [200, 200], 'a request on an open connection is answered')
  for (const { text } of fresh) t.same(statuses(text()), [200], 'a request on a new connection is answered')
  for (const { socket } of [...open, ...fresh]) socket.destroy()
  t.equal(await exit, 0)
})

t.test('SHUTDOWN_TIMEOUT_MS ends a shutdown with a hanging request; a second signal ends it at once', async t => {
  for (const second of [false, true]) {
    const sandbox = await startSandbox(t)
    const { child, exit, post } = await startServer(t, sandbox.url, { SHUTDOWN_TIMEOUT_MS: second ? '60000' : '300' })
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

t.test('a silent connection does not delay the exit', async t => {
  const { child, exit, output, port } = await startServer(t, 'http://gateway.invalid', { HOST: '0.0.0.0', ALLOW_ANONYMOUS: 'true', ALLOW_HTTP_UPSTREAM: 'true' }, { isCovered: true })
  t.match(output(), /"risk":"any caller that reaches this address may merge identities","msg":"no caller credentials"/)
  t.match(output(), /"risk":"the token travels in the clear","msg":"MIXPANEL_URL without https"/)
  const silent = ['', 'POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{']
  for (const bytes of silent) connect(port, '127.0.0.1', function (this: Socket) { this.write(bytes) }).on('error', () => {})
  // A connection that was reset in the middle of its request.
  const reset = connect(port, '127.0.0.1', () => reset.write(silent[1] as string, () => setTimeout(() => reset.resetAndDestroy(), 100)))
  await sleep(300)
  child.kill('SIGINT')
  t.equal(await exit, 0)
})

t.test('a signal during the start is exit 0', async t => {
  const launch = () => startProcess(t, SERVER, [], { MIXPANEL_TOKEN: TOKEN, PORT: '0' })
  const started = performance.now()
  const whole = launch()
  await whole.until(/Server listening/)
  const startMs = performance.now() - started
  for (const share of [0.4, 0.6, 0.8]) {
    const { child } = launch()
    await sleep(startMs * share)
    child.kill('SIGTERM')
    const [code] = await once(child, 'exit')
    t.equal(code, 0, `a signal after ${share} of the start is exit 0`)
  }
})

t.test('a signal while the relay waits for Redis is exit 0', async t => {
  const silent = createServer().listen(0, '127.0.0.1')
  t.teardown(() => silent.close())
  await once(silent, 'listening')
  const { port } = silent.address() as AddressInfo
  const { child, exit } = startProcess(t, SERVER, [], { MIXPANEL_TOKEN: TOKEN, PORT: '0', REDIS_URL: `redis://127.0.0.1:${port}` }, { isCovered: true })
  await once(silent, 'connection')
  child.kill('SIGTERM')
  t.equal(await exit, 0)
})

t.test('SIGHUP does not end the relay', async t => {
  const { url: upstream } = await startSandbox(t)
  const { child, exit, post } = await startServer(t, upstream)
  child.kill('SIGHUP')
  await sleep(200)
  t.equal((await post()).status, 200)
  child.kill('SIGTERM')
  t.equal(await exit, 0)
})

t.test('the relay shuts down when npm start ends or is killed', async t => {
  for (const signal of ['SIGTERM', 'SIGKILL'] as const) {
    const { PATH, HOME } = process.env
    const npm = spawn('env', ['-i', `PATH=${PATH}`, `HOME=${HOME}`, `MIXPANEL_TOKEN=${TOKEN}`, 'PORT=0', 'npm', 'start'], { detached: true })
    t.teardown(() => { try { process.kill(-(npm.pid as number), 'SIGKILL') } catch {} })
    let output = ''
    npm.stdout.on('data', chunk => { output += String(chunk) })
    while (!/Server listening at (http:[^"]+)"/.test(output)) await sleep(50)
    const [, url] = /Server listening at (http:[^"]+)"/.exec(output) as unknown as [string, string]
    t.ok((await fetch(`${url}/livez`)).ok)
    // The relay looks for npm every 500 ms.
    await sleep(700)
    npm.kill(signal)
    const alive = () => fetch(`${url}/livez`).then(() => true, () => false)
    const started = performance.now()
    while (await alive() && performance.now() - started < 10_000) await sleep(100)
    t.ok(performance.now() - started < 5000, `after ${signal} the relay ends within 5 s`)
    // The last lines are written when the process exits.
    while (!/"shutdown started"/.test(output) && performance.now() - started < 10_000) await sleep(50)
    t.match(output, /"shutdown started"/, `after ${signal} the relay shuts down in order`)
  }
})

t.test('whenOrphaned calls back once when the parent or its parent changes', async t => {
  let calls = 0
  let grandparent = '17'
  whenOrphaned(() => 42, pid => `${pid} (sh) S ${grandparent} 42`, () => { calls++ })
  await sleep(600)
  t.equal(calls, 0, 'nothing has changed')
  grandparent = '1'
  await sleep(1200)
  t.equal(calls, 1)
})

t.test('after a stop of the process what arrived counts, and the breaker stays closed', async t => {
  const sandbox = await startSandbox(t)
  const { child, parts, post } = await startServer(t, sandbox.url, { MIXPANEL_TIMEOUT_MS: '1500', DEADLINE_MS: '2500', MAX_BATCH: '1' })
  await post()
  const pause = async (fault: 'wait' | 'hang') => {
    sandbox.faults.add({ name: fault, ms: 400, times: 10 })
    const answers = Promise.all(Array.from({ length: 10 }, () => post()))
    await sleep(200)
    child.kill('SIGSTOP')
    await sleep(2800)
    child.kill('SIGCONT')
    return new Set((await answers).map(({ status }) => status))
  }
  t.same(await pause('wait'), new Set([200]), 'answers that arrived during the stop count')
  t.same(await pause('hang'), new Set([504]), 'a request that is not answered times out')
  t.equal((await parts()).mixpanel, 'asked', 'the breaker is closed')
})
