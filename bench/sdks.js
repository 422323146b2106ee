// CPU per event: batches of 50 events, as the JavaScript SDK sends them, against single identities of the same relay.
//   node bench/sdks.js [rounds]
// The two take turns in one process, so a machine that changes its speed changes it for both.
import { spawn } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'

const [rounds = 8] = process.argv.slice(2).map(Number)
const PORT = 18084
const UPSTREAM = 18081
const here = new URL('.', import.meta.url).pathname
const BATCH = 50
const CALLERS = 16
const EVENTS = 8000

const start = (script, env) => spawn(process.execPath, [script], { cwd: here, env: { PATH: process.env.PATH, ...env }, stdio: ['ignore', 'ignore', 'inherit'] })
const upstream = start('upstream.js', { PORT: String(UPSTREAM) })
const relay = start('../dist/server.js', {
  PORT: String(PORT), MIXPANEL_TOKEN: 'bench-token', MIXPANEL_URL: `http://127.0.0.1:${UPSTREAM}`, RATE_LIMIT_MAX: '1000000000', COMPAT: 'events'
})
const url = `http://127.0.0.1:${PORT}`
while (!(await fetch(`${url}/livez`).catch(() => undefined))?.ok) await sleep(50)

/** Ticks of CPU that the relay has used. */
function cpu () {
  const [, , , , , , , , , , , user, system] = readFileSync(`/proc/${relay.pid}/stat`, 'utf8').split(') ')[1].split(' ')
  return Number(user) + Number(system)
}

const sdkEvent = () => ({
  event: 'Click',
  properties: {
    $os: 'Linux',
    $browser: 'Chrome',
    $current_url: 'https://app.example.com/a/page?with=a&query=1',
    $browser_version: 130,
    $screen_height: 1080,
    $screen_width: 1920,
    mp_lib: 'web',
    $lib_version: '2.83.0',
    $insert_id: randomUUID().slice(0, 16),
    time: Date.now() / 1000,
    distinct_id: `$device:${randomUUID()}`,
    $device_id: randomUUID(),
    $initial_referrer: '$direct',
    $initial_referring_domain: '$direct',
    button: 'buy',
    price: 9.99,
    token: '0123456789abcdef'
  }
})
const batchBody = () => new URLSearchParams({ data: Buffer.from(JSON.stringify(Array.from({ length: BATCH }, sdkEvent))).toString('base64') }).toString()
const identityBody = () => JSON.stringify({ identified_id: `user-${randomUUID()}`, anon_id: randomUUID() })

/** Resolves with the ticks that so many requests cost. */
async function measure (path, type, bodies) {
  const before = cpu()
  let next = 0
  await Promise.all(Array.from({ length: CALLERS }, async () => {
    while (next < bodies.length) {
      const answer = await fetch(url + path, { method: 'POST', headers: { 'content-type': type }, body: bodies[next++] })
      if (answer.status !== 200) throw new Error(`${path} ${answer.status}`)
      await answer.text()
    }
  }))
  return cpu() - before
}

const ratios = []
const sums = [0, 0]
for (let round = 0; round <= rounds; round++) {
  const batches = await measure('/track/?verbose=1&ip=1', 'application/x-www-form-urlencoded', Array.from({ length: EVENTS / BATCH }, batchBody))
  const singles = await measure('/identify', 'application/json', Array.from({ length: EVENTS }, identityBody))
  // The first round warms up.
  if (round === 0) continue
  ratios.push(batches / singles)
  sums[0] += batches
  sums[1] += singles
}
const us = ticks => (ticks * 10_000 / (rounds * EVENTS)).toFixed(1)
const median = ratios.sort((a, b) => a - b)[rounds >> 1].toFixed(2)
console.log(`an event of a batch of ${BATCH}: ${us(sums[0])} µs, a single identity: ${us(sums[1])} µs, median ratio ${median}`)
relay.kill()
upstream.kill()
