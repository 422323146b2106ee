// What an identity costs in memory while it waits for Mixpanel: npm run bench:memory [-- identities]
// A relay whose Mixpanel takes a minute holds 0, then half, then all of them. The difference of the last two counts, so
// what the first ones warm up does not. Once with a connection for each identity, once in batches of 1000.
import { spawn } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { openCallers } from './callers.js'

const [count = 4000] = process.argv.slice(2).map(Number)
const PORT = 18080
const UPSTREAM = 18081
const BATCH = 1000
const here = new URL('.', import.meta.url).pathname
const url = `http://127.0.0.1:${PORT}`

function start (script, env) {
  const child = spawn('node', [script], { cwd: here, env: { PATH: process.env.PATH, ...env }, stdio: ['ignore', 'ignore', 'inherit'] })
  process.on('exit', () => child.kill())
  return child
}

const partsOf = async () => (await (await fetch(`${url}/readyz?verbose`)).json()).parts
const until = async what => { while (!await what().catch(() => false)) await sleep(50) }
const memoryOf = pid => Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))[1])
const identity = () => ({ identified_id: `user-${randomUUID()}@example.com`, anon_id: randomUUID() })

/** Adds `more` identities to those in flight. */
const WAYS = {
  async 'a connection for each' (more) {
    const { sockets, send } = await openCallers({ port: PORT, connections: more, distinct: more, onAnswer () {} })
    sockets.forEach(send)
  },
  async 'batches of 1000' (more) {
    for (let left = more; left > 0; left -= BATCH) {
      const identities = Array.from({ length: Math.min(BATCH, left) }, identity)
      fetch(`${url}/identify/batch`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ identities }) }).catch(() => {})
    }
  }
}

for (const [title, add] of Object.entries(WAYS)) {
  const mixpanel = start('upstream.js', { PORT: String(UPSTREAM), LATENCY_MS: '60000' })
  const relay = start('../dist/server.js', {
    PORT: String(PORT),
    MIXPANEL_TOKEN: 'bench-token',
    MIXPANEL_URL: `http://127.0.0.1:${UPSTREAM}`,
    MIXPANEL_TIMEOUT_MS: '60000',
    DEADLINE_MS: '120000',
    MAX_IN_FLIGHT: String(2 * count),
    MAX_CONNECTIONS: '100000',
    RATE_LIMIT_MAX: '1000000000'
  })
  const over = [mixpanel, relay].map(child => new Promise(resolve => child.once('close', resolve)))
  await until(async () => (await partsOf()).in_flight === 0)
  const memory = []
  for (const target of [count / 2, count]) {
    await add(count / 2)
    await until(async () => (await partsOf()).in_flight >= target)
    await sleep(1000)
    memory.push(memoryOf(relay.pid))
  }
  console.log(`${title}: ${((memory[1] - memory[0]) / (count / 2)).toFixed(1)} KB each; ${(memory[1] / 1024).toFixed(0)} MB with ${count}`)
  for (const child of [mixpanel, relay]) child.kill('SIGKILL')
  await Promise.all(over)
}
process.exit()
