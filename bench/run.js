// Peers side by side: node bench/run.js [seconds per measurement] [rounds]. Every round measures each contestant once,
// one after the other, each a fresh process; the table has the medians, the ratios are to bare Fastify.
// With --compare <checkout> it is compare.js that runs instead.
import { spawn, spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, readdirSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { compare } from './compare.js'
import { picture } from './picture.js'
import { tableOf } from './table.js'

if (process.argv.includes('--compare')) process.exit(await compare(process.argv.slice(2)))

const [seconds = 4, rounds = 5] = process.argv.slice(2).map(Number)
const CALLERS = { 0: 256, 50: 500 }
const PORT = 18080
const UPSTREAM = 18081
const here = new URL('.', import.meta.url).pathname
const TICKS_PER_SECOND = Number(spawnSync('getconf', ['CLK_TCK']).stdout)

const environment = {
  PATH: process.env.PATH,
  PORT: String(PORT),
  MIXPANEL_TOKEN: 'bench-token',
  MIXPANEL_URL: `http://127.0.0.1:${UPSTREAM}`
}
// Everything on; the limit is counted, but nobody reaches it.
const relay = { args: ['../dist/server.js'], env: { RATE_LIMIT_MAX: '1000000000', CORS_ORIGINS: 'https://app.example.com' } }
const contestants = {
  'bare Fastify, no relay': { args: ['contestants/bare.js'], waits: true },
  'this relay': relay,
  // Another checkout of it, built: BASELINE=/path/to/it npm run bench
  ...process.env.BASELINE && { 'this relay, baseline': { ...relay, args: [join(process.env.BASELINE, 'dist/server.js')] } },
  'this relay, OUTBOX=file': { ...relay, env: { ...relay.env, OUTBOX: `file:${mkdtempSync(join(tmpdir(), 'bench-outbox-'))}` } },
  'this relay, MAX_BATCH=1': { ...relay, env: { ...relay.env, MAX_BATCH: '1' } },
  'official SDK behind Fastify': { args: ['contestants/sdk.js'] },
  'Express + axios': { args: ['contestants/express.js'] },
  'nginx as a plain proxy': nginx()
}

/** Its configuration, or undefined where it is not installed. */
function nginx () {
  const found = ['/usr/sbin/nginx', '/usr/bin/nginx'].find(path => spawnSync(path, ['-v']).status === 0)
  if (found === undefined) {
    console.log('nginx is not installed here: left out')
    return undefined
  }
  const folder = mkdtempSync(join(tmpdir(), 'bench-nginx-'))
  writeFileSync(join(folder, 'nginx.conf'), `daemon off; worker_processes 1; pid ${folder}/pid; error_log /dev/null;
    events { worker_connections 4096; }
    http { access_log ${folder}/access.log; client_body_temp_path ${folder}/body; proxy_temp_path ${folder}/proxy;
      fastcgi_temp_path ${folder}/f; uwsgi_temp_path ${folder}/u; scgi_temp_path ${folder}/s;
      upstream mixpanel { server 127.0.0.1:${UPSTREAM}; keepalive 512; }
      server { listen 127.0.0.1:${PORT}; keepalive_requests 100000000;
        location / { proxy_pass http://mixpanel/track; proxy_http_version 1.1; proxy_set_header Connection ""; } } }`)
  return { command: found, args: ['-p', folder, '-c', join(folder, 'nginx.conf')] }
}

function start (command, args, env) {
  return spawn(command, args, { cwd: here, env: { ...environment, ...env }, stdio: ['ignore', 'ignore', 'inherit'] })
}

/** Resolves with the milliseconds from `since` to the first 200. */
async function firstAnswer (url, since, body) {
  for (;;) {
    const answer = await fetch(url, {
      method: body ? 'POST' : 'GET', body, headers: body ? { 'content-type': 'application/json' } : {}
    }).catch(() => undefined)
    await answer?.text()
    if (answer?.status === 200) return performance.now() - since
    await sleep(5)
  }
}

/** CPU seconds and peak memory (MB) of a process and its children. */
function usage (pid) {
  const children = readdirSync('/proc').filter(name => /^\d+$/.test(name)).filter(name => {
    try {
      return readFileSync(`/proc/${name}/stat`, 'utf8').split(') ')[1].split(' ')[1] === String(pid)
    } catch {
      return false
    }
  })
  return [pid, ...children].reduce((sum, id) => {
    const [, , , , , , , , , , , user, system] = readFileSync(`/proc/${id}/stat`, 'utf8').split(') ')[1].split(' ')
    const [, peak] = /VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${id}/status`, 'utf8'))
    return { cpu: sum.cpu + (Number(user) + Number(system)) / TICKS_PER_SECOND, mb: sum.mb + Number(peak) / 1024 }
  }, { cpu: 0, mb: 0 })
}

function load (options) {
  return new Promise((resolve, reject) => {
    let output = ''
    const child = spawn('node', ['load.js', JSON.stringify({ port: PORT, ...options })], { cwd: here, stdio: ['ignore', 'pipe', 'inherit'] })
    child.stdout.on('data', chunk => { output += chunk })
    child.on('close', code => code === 0 ? resolve(JSON.parse(output)) : reject(new Error(`load.js: ${code}`)))
  })
}

const counted = async () => (await fetch(`http://127.0.0.1:${UPSTREAM}/count`)).json()

/** Lets a contestant run once before an upstream and measures it; `measure` does the loading. */
async function withContestant (contestant, upstreamEnv, measure) {
  const upstream = start('node', ['upstream.js'], { PORT: String(UPSTREAM), ...upstreamEnv })
  await firstAnswer(`http://127.0.0.1:${UPSTREAM}/count`, 0)
  const since = performance.now()
  const server = start(contestant.command ?? 'node', contestant.args, { ...contestant.env, ...contestant.waits && upstreamEnv })
  const body = JSON.stringify({ identified_id: 'first', anon_id: '5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11' })
  try {
    const startMs = await firstAnswer(`http://127.0.0.1:${PORT}/identify`, since, body)
    return { startMs, ...await measure(server.pid) }
  } finally {
    server.kill()
    upstream.kill()
    await Promise.all([server, upstream].map(child => child.exitCode ?? new Promise(resolve => child.once('close', resolve))))
  }
}

async function saturate (pid, latency) {
  const options = { connections: CALLERS[latency] }
  await load({ ...options, seconds: 2 })
  const before = { ...usage(pid), ...await counted() }
  const result = await load({ ...options, seconds })
  const after = { ...usage(pid), ...await counted() }
  const answered = Object.values(result.statuses).reduce((sum, count) => sum + count, 0)
  const failed = answered - (result.statuses[200] ?? 0)
  if (failed > 0) throw new Error(`${failed} of ${answered} were not answered 200`)
  return {
    rate: result.ok,
    cpu: (after.cpu - before.cpu) / answered * 1e6,
    p50: result.p50,
    p99: result.p99,
    mb: after.mb,
    requests: (after.requests - before.requests) / answered * 1000,
    generator: result.generatorCpu
  }
}

const median = list => list.sort((a, b) => a - b)[Math.floor(list.length / 2)]
const medians = list => Object.fromEntries(Object.keys(list[0]).map(key => [key, median(list.map(one => one[key]))]))
// ONLY='bare|relay' measures those, and compares nothing else.
const only = new RegExp(process.env.ONLY ?? '')
const names = Object.keys(contestants).filter(name => contestants[name] !== undefined && only.test(name))

function table (results) {
  const bare = results['bare Fastify, no relay']
  const head = ['', 'identities/s', 'CPU µs each', '× bare', 'p50 ms', 'p99 ms', 'memory MB', 'upstream per 1000', 'start ms', 'generator CPU']
  const rows = names.map(name => {
    const { rate, cpu, p50, p99, mb, requests, startMs, generator } = results[name]
    return [name, rate.toFixed(0), cpu.toFixed(1), (cpu / bare.cpu).toFixed(2), p50.toFixed(1), p99.toFixed(1), mb.toFixed(0),
      requests.toFixed(0), startMs.toFixed(0), generator.toFixed(2)]
  })
  return tableOf(head, rows)
}

const tables = {}
for (const latency of [0, 50]) {
  const runs = Object.fromEntries(names.map(name => [name, []]))
  for (let round = 0; round < rounds; round++) {
    for (const name of names) {
      runs[name].push(await withContestant(contestants[name], { LATENCY_MS: String(latency) }, pid => saturate(pid, latency)))
    }
  }
  tables[latency] = Object.fromEntries(names.map(name => [name, medians(runs[name])]))
  console.log(`\nupstream latency ${latency} ms, ${CALLERS[latency]} callers, medians of ${rounds} rounds of ${seconds} s\n`)
  console.log(table(tables[latency]))
}

if (process.env.ONLY !== undefined) process.exit()

// Overload: an upstream that serves 8 requests of 50 ms at a time, arrays of at most 5: 800 identities a second.
const small = { ...relay, env: { ...relay.env, MAX_BATCH: '5', MAX_IN_FLIGHT: '150' } }
const narrow = { LATENCY_MS: '50', CONCURRENCY: '8' }
const overload = await withContestant(small, narrow, async pid => {
  await load({ connections: 100, seconds: 2 })
  const capacity = await load({ connections: 120, seconds })
  const before = usage(pid)
  const four = await load({ connections: 1000, seconds: seconds * 2, rate: capacity.ok * 4 })
  return { capacity, four, mb: [before.mb, usage(pid).mb] }
})
const { capacity, four, mb } = overload
console.log(`
4 × overload (an upstream that takes 8 requests at a time, MAX_BATCH=5, MAX_IN_FLIGHT=150)
capacity ${capacity.ok.toFixed(0)}/s; offered ${(capacity.ok * 4).toFixed(0)}/s: accepted ${four.ok.toFixed(0)}/s, refused ${four.refused.toFixed(0)}/s
accepted p50 ${four.p50.toFixed(1)} ms, p99 ${four.p99.toFixed(1)} ms; refusals p50 ${four.refusedP50.toFixed(1)} ms, p99 ${four.refusedP99.toFixed(1)} ms; memory ${mb.map(value => value.toFixed(0)).join(' → ')} MB`)

const zero = tables[0]
const far = tables[50]
const [bare, ours] = [zero['bare Fastify, no relay'], zero['this relay']]
const figure = (what, value, goal, isReached) => console.log(`${isReached ? 'reached' : 'MISSED '}  ${what}: ${value} (goal ${goal})`)
const ratio = (what, key, other, goal, place = zero) => {
  const value = place['this relay'][key] / place[other][key]
  figure(what, value.toFixed(2), `at most ${goal}`, value <= goal)
}
console.log()
ratio('CPU to bare Fastify', 'cpu', 'bare Fastify, no relay', 1.5)
ratio('CPU to MAX_BATCH=1', 'cpu', 'this relay, MAX_BATCH=1', 0.5)
ratio('CPU to the official SDK', 'cpu', 'official SDK behind Fastify', 0.334)
ratio('CPU to Express + axios', 'cpu', 'Express + axios', 0.1)
ratio('memory to bare Fastify', 'mb', 'bare Fastify, no relay', 1.25)
ratio('start to bare Fastify', 'startMs', 'bare Fastify, no relay', 1.5)
const share = far['this relay'].rate / far['bare Fastify, no relay'].rate
figure('50 ms, 500 callers: rate to a Fastify route that only waits', share.toFixed(2), 'at least 0.95', share >= 0.95)
figure('50 ms: p99', `${far['this relay'].p99.toFixed(0)} ms`, 'at most 125', far['this relay'].p99 <= 125)
figure('50 ms: upstream requests per 1000', far['this relay'].requests.toFixed(0), 'at most 40', far['this relay'].requests <= 40)
figure('4 × overload: accepted', (four.ok / capacity.ok).toFixed(2), 'at least 0.90', four.ok / capacity.ok >= 0.9)
figure('generator CPU, of one core', bare.generator.toFixed(2), 'well below 1', bare.generator < 0.8 && ours.generator < 0.8)

writeFileSync(join(here, 'bench.svg'), picture(names.map(name => ({ name, cpu: zero[name].cpu, isOurs: name === 'this relay' }))))
console.log('\nbench/bench.svg shows the CPU time of each')
