// The outbox in figures: npm run bench:outbox [-- seconds of outage] [identities that wait]. 0 seconds: no outage.
import { spawn, spawnSync } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs'
import { randomUUID } from 'node:crypto'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

const [seconds = 60, backlog = 100_000] = process.argv.slice(2).map(Number)
const RATE = 500
const PORT = 18080
const UPSTREAM = 18081
const REDIS = 18083
const TICKS_PER_SECOND = Number(spawnSync('getconf', ['CLK_TCK']).stdout)
const here = new URL('.', import.meta.url).pathname
const url = `http://127.0.0.1:${PORT}`

const children = []
process.on('exit', () => { for (const child of children) child.kill() })
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(1))

function start (script, env, output = 'ignore', command = 'node') {
  const child = spawn(command, script, { cwd: here, env: { PATH: process.env.PATH, ...env }, stdio: ['ignore', output, 'inherit'] })
  children.push(child)
  child.over = new Promise(resolve => child.once('close', resolve))
  return child
}

const relay = (store, env) => start(['../dist/server.js'], {
  PORT: String(PORT),
  MIXPANEL_TOKEN: 'bench-token',
  MIXPANEL_URL: `http://127.0.0.1:${UPSTREAM}`,
  RATE_LIMIT_MAX: '1000000000',
  OUTBOX: store,
  ...store === 'redis' && { REDIS_URL: `redis://127.0.0.1:${REDIS}` },
  ...env
})

async function end (child, signal) {
  child.kill(signal)
  return child.over
}

const identity = () => ({ identified_id: `user-${randomUUID()}@example.com`, anon_id: randomUUID() })
const post = (path, body, headers) => fetch(`${url}${path}`, {
  method: 'POST', headers: { 'content-type': 'application/json', ...headers }, body: JSON.stringify(body)
}).then(async answer => { await answer.arrayBuffer(); return answer.status }, () => 0)
const waiting = async () => (await (await fetch(`${url}/readyz?verbose`)).json()).parts.outbox.waiting
const upstream = async path => (await fetch(`http://127.0.0.1:${UPSTREAM}${path}`)).text()
const until = async what => { while (!await what()) await sleep(20) }
const serves = server => until(async () => {
  if (server.exitCode !== null) throw new Error('the relay has exited')
  return await post('/identify', identity()) === 200
})
const figure = (what, value, goal, isReached) => console.log(`${isReached ? 'reached' : 'MISSED '}  ${what}: ${value} (goal ${goal})`)

const megabytes = (bytes, count) => `${(bytes / count).toFixed(0)} MB`
const sizeOf = directory => readdirSync(directory, { recursive: true, withFileTypes: true })
  .filter(entry => entry.isFile()).reduce((sum, { parentPath, name }) => sum + statSync(join(parentPath, name)).size, 0)

async function startUpstream (latency) {
  const mixpanel = start(['upstream.js'], { PORT: String(UPSTREAM), LATENCY_MS: String(latency) })
  await until(() => upstream('/count').then(() => true, () => false))
  return mixpanel
}

/** CPU seconds of a process. */
function cpuOf ({ pid }) {
  const [, , , , , , , , , , , user, system] = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1].split(' ')
  return (Number(user) + Number(system)) / TICKS_PER_SECOND
}

async function measureOutage (directory) {
  const mixpanel = await startUpstream(50)
  console.log(`an outage of ${seconds} s, ${RATE} identities a second`)
  const server = relay(`file:${directory}`)
  await serves(server)
  const before = JSON.parse(await upstream('/count')).identities
  await upstream('/down')
  const load = start(['load.js', JSON.stringify({ port: PORT, connections: 50, seconds, rate: RATE, distinct: seconds * RATE + 1000 })], {}, 'pipe')
  let printed = ''
  load.stdout.on('data', chunk => { printed += chunk })
  await load.over
  const told = JSON.parse(printed)
  const kept = await waiting()
  await upstream('/up')
  const healed = performance.now()
  await until(async () => await waiting() === 0)
  const emptied = (performance.now() - healed) / 1000
  const arrived = JSON.parse(await upstream('/count')).identities - before
  const answers = Object.values(told.statuses).reduce((sum, count) => sum + count, 0)
  console.log(`${JSON.stringify(told.statuses)}, p99 ${told.refusedP99.toFixed(1)} ms; ${kept} waited, ${arrived} arrived`)
  figure('202, median', `${told.refusedP50.toFixed(1)} ms`, 'within 100 ms', told.refusedP50 <= 100)
  figure('all were told 202', `${told.statuses[202]} of ${answers}`, 'all', told.statuses[202] === answers)
  figure('all arrived', `${arrived} of ${answers}`, 'all', arrived >= answers)
  figure('empty after it heals', `${emptied.toFixed(1)} s`, 'within 60 s', emptied <= 60)
  await end(server, 'SIGTERM')
  await end(mixpanel, 'SIGTERM')
}

/** Fills an outbox, kills the relay and lets another one deliver to a Mixpanel that is `latency` ms away. `sizes`: of the store. */
async function measureBacklog (store, [latency, env], sizes) {
  const mixpanel = await startUpstream(latency)
  console.log(`\n${backlog} identities wait, OUTBOX=${store.replace(/:.*/, '')}, Mixpanel is ${latency} ms away ${Object.entries(env).join().replace(',', '=')}`)
  await upstream('/down')
  let server = relay(store, env)
  await until(async () => await waiting().catch(() => -1) === 0)
  const filled = performance.now()
  // A busy disk may reject a few writes.
  for (let left = backlog; left > 0; left = backlog - await waiting()) {
    const status = await post('/identify/batch', { identities: Array.from({ length: Math.min(500, left) }, identity) }, { prefer: 'respond-async' })
    if (status !== 202 && status !== 207) throw new Error(`told ${status}`)
  }
  console.log(`queued ${(backlog / ((performance.now() - filled) / 1000)).toFixed(0)} a second; per million: ${await sizes()}`)
  await end(server, 'SIGKILL')
  await upstream('/up')
  const since = performance.now()
  server = relay(store, env)
  await serves(server)
  const first = (performance.now() - since) / 1000
  // With Redis the lease of the killed relay must expire first.
  const size = await waiting()
  await until(async () => size === 0 || await waiting() < size)
  const [left, from, cpu, { requests }] = [await waiting(), performance.now(), cpuOf(server), JSON.parse(await upstream('/count'))]
  await until(async () => await waiting() === 0)
  const rate = left / ((performance.now() - from) / 1000)
  const sent = JSON.parse(await upstream('/count')).requests - requests
  console.log(`CPU of the relay ${((cpuOf(server) - cpu) / left * 1e6).toFixed(0)} µs each, ${(sent / left * 1000).toFixed(1)} requests per 1000`)
  const [, peak] = /VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${server.pid}/status`, 'utf8'))
  figure('start to the first 200', `${first.toFixed(2)} s`, 'under 2 s', first < 2)
  figure('delivered', `${rate.toFixed(0)} a second`, 'at least 2000', rate >= 2000)
  figure('memory', `${(Number(peak) / 1024).toFixed(0)} MB`, 'under 250 MB', Number(peak) / 1024 < 250)
  await end(server, 'SIGTERM')
  await end(mixpanel, 'SIGTERM')
}

const folder = () => mkdtempSync(join(tmpdir(), 'bench-outbox-'))
/** How far Mixpanel is away, and the relay's variables. */
const RUNS = [[50, {}], [0, {}], [50, { MAX_BATCH: '300' }]]

if (seconds > 0) {
  const directory = folder()
  await measureOutage(directory)
  rmSync(directory, { recursive: true })
}

for (const run of RUNS) {
  const directory = folder()
  await measureBacklog(`file:${directory}`, run, async () => `disk ${megabytes(sizeOf(directory), backlog)}`)
  rmSync(directory, { recursive: true })
}

const hasRedis = spawnSync('redis-server', ['--version']).status === 0
if (!hasRedis) console.log('\nredis-server is not installed here: OUTBOX=redis is left out')
for (const run of hasRedis ? RUNS : []) {
  const directory = folder()
  const redis = start(['--port', String(REDIS), '--bind', '127.0.0.1', '--dir', directory, '--save', '', '--appendonly', 'yes',
    '--appendfsync', 'always', '--maxmemory-policy', 'noeviction'], {}, 'ignore', 'redis-server')
  const ask = (...args) => spawnSync('redis-cli', ['-p', String(REDIS), ...args], { encoding: 'utf8' }).stdout
  await until(async () => ask('ping').startsWith('PONG'))
  const used = () => Number(/used_memory:(\d+)/.exec(ask('info', 'memory'))[1])
  const empty = used()
  await measureBacklog('redis', run, async () =>
    `memory of Redis ${megabytes(used() - empty, backlog)}, its append-only file ${megabytes(sizeOf(directory), backlog)}`)
  await end(redis, 'SIGTERM')
  rmSync(directory, { recursive: true })
}
