import { spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { createServer, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { basename, dirname, join } from 'node:path'
import openapiTypes, { astToString, COMMENT_HEADER } from 'openapi-typescript'
import { t, type Test } from 'tap'
import { parse } from 'yaml'
import { SECRETS } from '#src/config.js'
import { Environment } from '#src/environment.js'
import { createRelayClient } from '../examples/service/identify.ts'
import { freePort, identity, startSandbox, TOKEN, type Env } from './helper.ts'
import { SERVER, startProcess, startServer, withoutCoverage } from './processes.ts'

const KEY = 'CANARY-SECRET-of-a-service'

// Most of these tests wait for a process or for a pause.
t.jobs = 3

t.test('the types of the service example match openapi.yaml', async t => {
  const types = COMMENT_HEADER + astToString(await openapiTypes(readFileSync('openapi.yaml', 'utf8')))
  t.ok(types === readFileSync('examples/service/relay-api.d.ts', 'utf8'), 'examples/service/relay-api.d.ts is up to date: run npm run openapi')
})

/** The relay as a process that wants an API key, in front of a sandbox. */
async function start (t: Test, env: Env = {}) {
  const sandbox = await startSandbox(t)
  const relay = await startServer(t, sandbox.url, { API_KEYS: `backfill:${KEY}`, ...env })
  /** Resolves with the log lines of requests once there are `count`. */
  async function requests (count: number) {
    await relay.until(new RegExp(`(?:"msg":"request completed"[^]*?){${count}}`))
    return relay.output().split('\n').filter(line => line.includes('"request completed"')).map(line => JSON.parse(line) as Record<string, unknown>)
  }
  return { sandbox, relay, requests, client: createRelayClient({ url: relay.url, apiKey: KEY }) }
}

t.test('the service example sends the identities of a file, and names those that failed', async t => {
  const { sandbox, relay, requests } = await start(t)
  const run = async (apiKey: string, identities: object[]) => {
    const env = { RELAY_URL: relay.url, RELAY_API_KEY: apiKey, NODE_OPTIONS: '--import=ts-blank-space/register' }
    const { child, exit, output } = startProcess(t, 'examples/service/main.ts', [], env)
    child.stdin?.end(identities.map(line => JSON.stringify(line)).join('\n'))
    return { code: await exit, output: output() }
  }
  const users = Array.from({ length: 501 }, (_, index) => identity({ identified_id: `user-${index}` }))
  t.same(await run(KEY, users), { code: 0, output: 'identities accepted or queued: 501\n' })
  t.same(sandbox.ledger.rows().map(({ properties }) => properties.distinct_id), users.map(user => user.identified_id), 'in their order')
  t.match(await requests(2), [{ status: 200, identities: 500, caller: 'key:backfill' }, { status: 200, identities: 1 }])
  t.same(await run(KEY, [identity(), identity({ identified_id: 'user-501', anon_id: '12345' })]), {
    code: 1, output: 'user-501: invalid_request /anon_id must be a UUID v4, with or without the $device: prefix\nidentities accepted or queued: 1\n'
  })
  t.match(await run('another-key-of-a-service', [identity()]), { code: 1, output: /RelayError: unauthenticated: / })
})

t.test('the client of the service example says why an identity was not taken, and sends it once', async t => {
  const { sandbox, relay, requests, client } = await start(t)
  t.equal(await client.identify(identity()), 'accepted')
  await t.rejects(client.identify(identity({ identified_id: 'null' })), {
    name: 'RelayError', status: 400, problem: { code: 'invalid_request', retryable: false, errors: [{ pointer: '/identified_id' }] }
  })
  const stranger = createRelayClient({ url: relay.url, apiKey: 'another-key-of-a-service' })
  await t.rejects(stranger.identify(identity()), { name: 'RelayError', status: 401, problem: { code: 'unauthenticated' } })
  await t.rejects(stranger.identifyBatch([identity()]), { name: 'RelayError', status: 401, problem: { code: 'unauthenticated' } })
  t.match((await requests(4)).map(({ status }) => status), [200, 400, 401, 401])
  t.equal(sandbox.requests.length, 1)
})

t.test('the client of the service example repeats what may succeed later, and of a batch only that', async t => {
  const { sandbox, requests, client } = await start(t, { MAX_BATCH: '1' })
  sandbox.faults.add({ name: 'rate_limited', retry_after: '2' })
  t.equal(await client.identify(identity()), 'accepted')
  const [failed, repeated] = await requests(2)
  t.match([failed, repeated], [{ status: 503, code: 'mixpanel_rate_limited' }, { status: 200 }])
  const pause = Number(repeated?.time) - Number(failed?.time)
  t.ok(pause >= 1900, `the repeat comes after Retry-After, and came after ${pause} ms`)

  const first = identity()
  sandbox.faults.add({ name: 'rate_limited', retry_after: '2' })
  // The second identity waits for the first, and fails with it.
  const second = { ...first, identified_id: 'another-user' }
  t.match(await client.identifyBatch([identity({ anon_id: '12345' }), first, second]), [
    { index: 0, status: 'failed', problem: { code: 'invalid_request' } }, { index: 1, status: 'accepted' }, { index: 2, status: 'accepted' }
  ])
  t.match((await requests(4)).slice(2), [{ status: 207, identities: 3, failed: 3 }, { status: 200, identities: 2 }])
  t.same(sandbox.ledger.rows().slice(1).map(({ properties }) => properties.distinct_id), [first.identified_id, 'another-user'], 'in their order')
})

/** A server whose answers are the given functions, one after the other; the last one stays. Returns its URL and how often it was asked. */
async function stub (t: Test, ...answers: ((response: ServerResponse) => void)[]) {
  let asked = 0
  const server = createServer((request, response) => {
    request.resume().on('end', () => answers[Math.min(asked++, answers.length - 1)]?.(response))
  })
  await once(server.listen(0, '127.0.0.1'), 'listening')
  t.teardown(() => { server.close().closeAllConnections() })
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, asked: () => asked }
}

const drop = (response: ServerResponse) => { response.destroy() }
const badGateway = (response: ServerResponse) => { response.writeHead(502, { 'content-type': 'text/html' }).end('<h1>502 Bad Gateway</h1>') }
const accept = (response: ServerResponse) => { response.writeHead(200, { 'content-type': 'application/json' }).end('{"status":"accepted"}') }

t.test('the client of the service example repeats a request that a proxy answers, or nothing, and gives up', async t => {
  const recovers = await stub(t, drop, badGateway, accept)
  t.equal(await createRelayClient({ url: recovers.url, apiKey: KEY }).identify(identity()), 'accepted')
  t.equal(recovers.asked(), 3)

  const failing = await stub(t, badGateway)
  await t.rejects(createRelayClient({ url: failing.url, apiKey: KEY }).identify(identity()), { name: 'RelayError', status: 502, problem: undefined })
  t.equal(failing.asked(), 4, 'a bounded number of times')

  const gone = await stub(t, drop)
  await t.rejects(createRelayClient({ url: gone.url, apiKey: KEY }).identifyBatch([identity()]), { message: 'fetch failed' })
  t.equal(gone.asked(), 4)

  const refusing = await stub(t, response => { response.writeHead(404).end('no such host') })
  await t.rejects(createRelayClient({ url: refusing.url, apiKey: KEY }).identify(identity()), { name: 'RelayError', status: 404 })
  t.equal(refusing.asked(), 1)

  const later = await stub(t, response => { response.writeHead(429, { 'retry-after': '3600' }).end() })
  await t.rejects(createRelayClient({ url: later.url, apiKey: KEY }).identify(identity()), { name: 'RelayError', status: 429 })
  t.equal(later.asked(), 1, 'an hour is too long to wait')
})

interface Container {
  name: string
  restartPolicy?: string
  env: { name: string, value?: string }[]
  volumeMounts: { name: string, mountPath: string, readOnly: boolean }[]
  startupProbe: { exec: { command: string[] } }
  livenessProbe: { exec: { command: string[] } }
}

t.test('the relay of the sidecar example starts with its variables, is alive by its probe, and wants the key', async t => {
  const { spec } = parse(readFileSync('examples/sidecar/pod.yaml', 'utf8'))
  const [sidecar] = spec.initContainers as [Container]
  t.match(sidecar, {
    restartPolicy: 'Always',
    volumeMounts: [{ mountPath: '/run/secrets/identify-relay', readOnly: true }],
    securityContext: { runAsNonRoot: true, allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: { drop: ['ALL'] } }
  })
  const known = new Set([...Object.keys(Environment.properties), ...SECRETS.map(name => `${name}_FILE`)])
  for (const { name } of sidecar.env) t.ok(known.has(name), `${name} is a variable of the relay`)

  // The Secret, as the manifest mounts it.
  const directory = t.testdir({ token: `${TOKEN}\n`, 'api-keys': `your-app:${KEY}` })
  const mount = sidecar.volumeMounts[0]?.mountPath
  const env: Env = { PORT: String(await freePort()) }
  for (const { name, value = '' } of sidecar.env) {
    const isFile = name.endsWith('_FILE')
    if (isFile) t.equal(dirname(value), mount, `${name} is in the volume`)
    env[name] = isFile ? join(directory, basename(value)) : value
  }
  const sandbox = await startSandbox(t)
  // The variable without _FILE, which startServer sets, must be empty.
  const relay = await startServer(t, sandbox.url, { ...env, MIXPANEL_TOKEN: '' })
  t.equal(new URL(relay.url).hostname, '127.0.0.1')
  for (const { exec: { command: [node, ...args] } } of [sidecar.startupProbe, sidecar.livenessProbe]) {
    t.equal(node, 'node')
    t.equal(args[0], SERVER)
    t.equal(spawnSync('env', withoutCoverage(env, ...args)).status, 0, 'the probe succeeds')
    t.equal(spawnSync('env', withoutCoverage({ ...env, PORT: '9' }, ...args)).status, 1, 'and fails without a relay')
  }
  t.equal((await relay.post()).status, 401)
  t.equal(await createRelayClient({ url: relay.url, apiKey: KEY }).identify(identity()), 'accepted')
})
