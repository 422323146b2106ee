import { createServer } from 'node:http'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createHash } from 'node:crypto'
import type { AddressInfo } from 'node:net'
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { Readable } from 'node:stream'
import { createGzip } from 'node:zlib'
import { t, type Test } from 'tap'
import { temporary } from '../helper.ts'
import { SERVER, withoutCoverage } from '../processes.ts'

const ROWS = 1_000_000
/** Every thousandth row but one is refused, and every thousandth row stands in the export twice. */
const isRefused = (row: number) => row % 1000 === 7
const idOf = (row: number) => createHash('md5').update(String(row)).digest('hex')
const DAY = '2026-03-02'

function * rows () {
  let text = ''
  for (let row = 0; row < ROWS; row++) {
    const line = `${JSON.stringify({
      event: '$identify',
      properties: {
        time: 1772452800 + row % 3600,
distinct_id: `user-${row}`,
$identified_id: `user-${row}`,
$anon_id: `2c93fdf3-4fbf-4fec-baaf-${String(row).padStart(12, '0')}`,
        $insert_id: idOf(row),
mp_processing_time_ms: 1772452800000,
$city: 'Berlin',
$region: 'Berlin',
mp_country_code: 'DE',
...isRefused(row) && { $failure_reason: 'errManyIDs' }
      }
    })}\n`
    text += row % 1000 === 8 || isRefused(row) ? line + line : line
    if (text.length > 65_536) {
      yield text
      text = ''
    }
  }
  yield text
}

/** Runs verify against an export of a million rows. `cutAfter` breaks the connection after so many ms. */
async function verifyMillion (t: Test, { isGzip = true, cutAfter = 0, log = '' } = {}) {
  const server = createServer((request, response) => {
    const lines = Readable.from(rows())
    if (cutAfter > 0) setTimeout(() => response.socket?.destroy(), cutAfter)
    if (!isGzip) return lines.pipe(response)
    response.writeHead(200, { 'content-encoding': 'gzip' })
    lines.pipe(createGzip({ level: 1 })).pipe(response)
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => server.close())
  const env = {
    MIXPANEL_TOKEN: 'x', MIXPANEL_DATA_URL: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, MIXPANEL_SERVICE_ACCOUNT: 'me:secret', MIXPANEL_PROJECT_ID: '1'
  }
  const sent: string[] = []
  if (log !== '') {
    const file = join(temporary(t), 'relay.log')
    writeFileSync(file, log)
    sent.push('--sent', file)
  }
  const child = spawn('env', withoutCoverage(env, SERVER, 'verify', '--from', DAY, '--to', DAY, ...sent))
  let out = ''
  let said = ''
  let peak = 0
  child.stdout.on('data', chunk => { out += String(chunk) })
  child.stderr.on('data', chunk => { said += String(chunk) })
  const timer = setInterval(() => {
    try {
      // A process that has ended has no such line.
      peak = Math.max(peak, Number(/VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${child.pid}/status`, 'utf8'))?.[1] ?? 0) / 1024)
    } catch {}
  }, 100)
  const since = performance.now()
  const [code] = await once(child, 'close')
  clearInterval(timer)
  await sleep(0)
  return { code, found: out.trim().split('\n').filter(line => line !== '').map(line => JSON.parse(line)), said, peak, seconds: (performance.now() - since) / 1000 }
}

t.test('verify finds exactly the planted failures among a million rows, in less than 150 MB', async t => {
  const lost = { time: Date.parse(`${DAY}T12:00:00Z`), status: 200, insert_id: 'f'.repeat(32) }
  const log = [...Array(1000).keys()].map(row => JSON.stringify({ ...lost, insert_id: idOf(row * 999) })).join('\n')
  const { code, found, said, peak, seconds } = await verifyMillion(t, { log: `${log}\n${JSON.stringify(lost)}\n` })
  t.comment(`peak ${peak.toFixed()} MB, ${seconds.toFixed(1)} s: ${said.trim()}`)
  t.equal(code, 2)
  const expected = [...Array(ROWS).keys()].filter(isRefused).map(row => `user-${row}`)
  t.same(found.filter(({ verdict }) => verdict === 'refused').map(({ identified_id: id }) => id), expected)
  t.same(found.filter(({ verdict }) => verdict === 'not_seen').map(({ insert_id: id }) => id), [lost.insert_id])
  t.ok(peak > 20 && peak < 150, `the peak of ${peak.toFixed()} MB is less than 150 MB`)
  t.match(said, new RegExp(`refused: 1000, merged: 0, no_failure: ${ROWS - 1000}, not_seen: 1`))
})

t.test('an export that breaks off in the middle is exit 1 and a sentence', async t => {
  for (const isGzip of [true, false]) {
    const { code, said } = await verifyMillion(t, { isGzip, cutAfter: 3000 })
    t.equal(code, 1)
    t.match(said, /^It cannot be told what merged: the export broke off \(.+\)\.\n$/)
  }
})
