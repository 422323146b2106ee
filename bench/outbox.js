// The outbox in figures: node bench/outbox.js [seconds of outage] [identities that wait].
import { spawn } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { randomUUID } from 'node:crypto'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

const [seconds = 60, backlog = 100_000] = process.argv.slice(2).map(Number)
const RATE = 500
const PORT = 18080
const UPSTREAM = 18081
const here = new URL('.', import.meta.url).pathname
const url = `http://127.0.0.1:${PORT}`

function start (script, env, output = 'ignore') {
  const child = spawn('node', script, { cwd: here, env: { PATH: process.env.PATH, ...env }, stdio: ['ignore', output, 'inherit'] })
  child.over = new Promise(resolve => child.once('close', resolve))
  return child
}

const relay = directory => start(['../dist/server.js'], {
  PORT: String(PORT),
  MIXPANEL_TOKEN: 'bench-token',
  MIXPANEL_URL: `http://127.0.0.1:${UPSTREAM}`,
  RATE_LIMIT_MAX: '1000000000',
  OUTBOX: `file:${directory}`
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
const figure = (what, value, goal, isReached) => console.log(`${isReached ? 'reached' : 'MISSED '}  ${what}: ${value} (goal ${goal})`)

const directory = mkdtempSync(join(tmpdir(), 'bench-outbox-'))
const mixpanel = start(['upstream.js'], { PORT: String(UPSTREAM), LATENCY_MS: '50' })
await until(() => upstream('/count').then(() => true, () => false))

console.log(`an outage of ${seconds} s, ${RATE} identities a second`)
let server = relay(directory)
await until(async () => await post('/identify', identity()) === 200)
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

console.log(`\n${backlog} identities wait`)
await upstream('/down')
for (let count = 0; count < backlog; count += 2000) {
  const status = await post('/identify/batch', { identities: Array.from({ length: Math.min(2000, backlog - count) }, identity) }, { prefer: 'respond-async' })
  if (status !== 202) throw new Error(`told ${status}`)
}
await end(server, 'SIGKILL')
await upstream('/up')
const since = performance.now()
server = relay(directory)
await until(async () => await post('/identify', identity()) === 200)
const first = (performance.now() - since) / 1000
const left = await waiting()
const from = performance.now()
await until(async () => await waiting() === 0)
const rate = left / ((performance.now() - from) / 1000)
const [, peak] = /VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${server.pid}/status`, 'utf8'))
figure('start to the first 200', `${first.toFixed(2)} s`, 'under 2 s', first < 2)
figure('drained, 50 ms away', `${rate.toFixed(0)} a second`, 'at least 2000', rate >= 2000)
figure('memory', `${(Number(peak) / 1024).toFixed(0)} MB`, 'under 250 MB', Number(peak) / 1024 < 250)

await end(server, 'SIGTERM')
await end(mixpanel, 'SIGTERM')
rmSync(directory, { recursive: true })
