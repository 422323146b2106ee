// Four times the load that a slow upstream takes: how many identities are still accepted, and how fast is a refusal.
import { spawn } from 'node:child_process'
import { contestants, OURS } from './contestants.js'
import { memory, stop } from './processes.js'
import { openUpstream, startServer } from './scenes.js'

const PORT = 18100
const SECONDS = 4

/** Runs load.js and resolves with what it prints. */
function load (options) {
  return new Promise((resolve, reject) => {
    let output = ''
    const child = spawn(process.execPath, ['load.js', JSON.stringify({ port: PORT, ...options })], {
      cwd: new URL('.', import.meta.url).pathname, stdio: ['ignore', 'pipe', 'inherit']
    })
    child.stdout.on('data', chunk => { output += chunk })
    child.on('close', code => code === 0 ? resolve(JSON.parse(output)) : reject(new Error(`load.js: ${code}`)))
  })
}

/** Resolves with a report. The upstream takes 8 requests of 50 ms at a time, with at most 5 events: 800 a second. */
export async function overload (core) {
  const upstream = await openUpstream({ LATENCY_MS: '50', CONCURRENCY: '8' })
  const server = { contestant: contestants[OURS], node: process.execPath }
  const child = await startServer(core, server, PORT, { MAX_BATCH: '5', MAX_IN_FLIGHT: '150', OUTBOX: 'off' })
  await load({ connections: 100, seconds: 2 })
  const capacity = await load({ connections: 120, seconds: SECONDS })
  const before = memory(child.pid).now
  const four = await load({ connections: 1000, seconds: 2 * SECONDS, rate: capacity.ok * 4 })
  const after = memory(child.pid).now
  await stop(child)
  await upstream.close()
  const share = (four.ok / capacity.ok).toFixed(2)
  const times = (p50, p99) => `p50 ${p50.toFixed(1)} ms, p99 ${p99.toFixed(1)} ms`
  return `Overload: an upstream that takes 8 requests at a time, MAX_BATCH=5, MAX_IN_FLIGHT=150, no outbox
capacity ${capacity.ok.toFixed(0)}/s; offered ${(capacity.ok * 4).toFixed(0)}/s: accepted ${four.ok.toFixed(0)}/s (${share} of the capacity)
accepted: ${times(four.p50, four.p99)}; refused: ${times(four.refusedP50, four.refusedP99)}; memory ${before.toFixed(0)} → ${after.toFixed(0)} MB`
}
