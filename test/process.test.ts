import { readFileSync } from 'node:fs'
import { connect, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { parse } from 'yaml'
import { exchange, identity, leaks, startProcess, startSandbox, TOKEN, type Env } from './helper.ts'

const SERVER = 'dist/server.js'

async function startServer (t: Parameters<typeof startProcess>[0], env: Env = {}) {
  const sandbox = await startSandbox(t)
  const server = startProcess(t, SERVER, [], { MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: sandbox.url, PORT: '0', LOG_LEVEL: 'debug', ...env })
  const [, url] = await server.until(/Server listening at (http:[^"]+)"/)
  const post = (body: unknown = identity()) => fetch(`${url}/identify`, {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body)
  })
  return { ...server, sandbox, url: url as string, post }
}

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
  await until(/"draining"/)
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
  const { exit, output, post } = await startServer(t, { NODE_OPTIONS: `--import=${encodeURI(throwing)}` })
  t.equal((await post()).status, 200)
  t.equal(await exit, 1)
  t.match(output(), /"level":60,.*from nowhere.*"msg":"bug"/)
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
