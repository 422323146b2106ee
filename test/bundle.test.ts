import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { identity, needsRedis, startRedis, startSandbox, temporary, TOKEN } from './helper.ts'
import { startProcess } from './processes.ts'

const SERVER = 'bundle/server.js'

t.before(() => { t.equal(spawnSync('npm', ['run', '--silent', 'bundle']).status, 0) })

t.test('the bundle of the image is the relay, with the thread of the outbox and all that is loaded late', async t => {
  const sandbox = await startSandbox(t)
  const env = {
    MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: sandbox.url, PORT: '0', METRICS_PORT: '0', OUTBOX: `file:${temporary(t)}`, COMPAT: 'events', JWT_SECRET: 'x'.repeat(32), ALLOW_ANONYMOUS: 'true'
  }
  const relay = startProcess(t, SERVER, [], env)
  const [, url] = await relay.until(/Server listening at (http:[^"]+)"/)
  const [, metricsUrl] = await relay.until(/"url":"([^"]+)","msg":"metrics listening"/)
  const post = async (headers = {}) => (await fetch(`${url}/identify`, {
    method: 'POST', headers: { 'content-type': 'application/json', ...headers }, body: JSON.stringify(identity())
  })).status
  t.equal(await post(), 200)
  t.equal(await post({ authorization: 'Bearer x.y.z' }), 401, 'tokens are verified')
  sandbox.faults.add({ name: 'edge_down', times: 1000 })
  t.equal(await post({ prefer: 'respond-async' }), 202)
  const { stdout } = spawnSync(process.execPath, [SERVER, 'outbox', 'list'], { env, encoding: 'utf8' })
  t.match(stdout, /^\{"id":"1"/, 'a command reaches the relay')
  sandbox.faults.clear()
  while (!/identify_relay_outbox_waiting 0/.test(await (await fetch(`${metricsUrl}/metrics`)).text())) await sleep(200)
  for (const path of ['docs', 'docs/swagger-ui.css', 'openapi.json', 'readyz']) t.equal((await fetch(`${url}/${path}`)).status, 200, path)
  relay.child.kill('SIGTERM')
  t.equal(await relay.exit, 0)
})

t.test('the bundle keeps its outbox and its limits in Redis', needsRedis, async t => {
  const [sandbox, redis] = await Promise.all([startSandbox(t), startRedis(t)])
  sandbox.faults.add({ name: 'edge_down', times: 1000 })
  const relay = startProcess(t, SERVER, [], {
    MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: sandbox.url, PORT: '0', REDIS_URL: redis.url, OUTBOX: 'redis', RATE_LIMIT_MAX: '1', ALLOW_ANONYMOUS: 'true'
  })
  const [, url] = await relay.until(/Server listening at (http:[^"]+)"/)
  const post = async () => (await fetch(`${url}/identify`, {
    method: 'POST', headers: { 'content-type': 'application/json', prefer: 'respond-async' }, body: JSON.stringify(identity())
  })).status
  t.same([await post(), await post()], [202, 429])
  relay.child.kill('SIGTERM')
  t.equal(await relay.exit, 0)
})

t.test('its commands answer as those of the build', async t => {
  for (const args of [['--version'], ['--help'], ['check-config'], ['openapi'], ['healthcheck']]) {
    const [bundled, built] = [SERVER, 'dist/server.js'].map(script =>
      spawnSync(process.execPath, [script, ...args], { env: { MIXPANEL_TOKEN: TOKEN, PORT: '9' }, encoding: 'utf8' }))
    t.same([bundled?.status, bundled?.stdout, bundled?.stderr], [built?.status, built?.stdout, built?.stderr], String(args[0]))
  }
})

t.test('the image has the bundle in place of the modules that it holds', async t => {
  t.match(readFileSync('Dockerfile', 'utf8'), /RUN .*npm run bundle\n[^]*COPY --from=build \/app\/bundle dist\n/)
})
