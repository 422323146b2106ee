// The relay of this checkout against that of another one, which is built: npm run bench -- --compare <checkout>
//   [--pairs 12] [--slots 24] [--slot 250] [--callers 64] [--quick] [--auth key|token|new-token]
//   [--set NAME=VALUE], which sets a variable of this checkout alone
// Both relays run at the same time on core 0; the upstream and the callers have core 1. The load goes round the two in
// short slots, A B B A A B B A …, so a machine that changes its speed changes it for both. Two processes of one build
// differ by some per cent for life, so every pair is two fresh ones, and the pair is the sample.
import { spawn, spawnSync } from 'node:child_process'
import { existsSync, readFileSync, readdirSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { openCallers } from './callers.js'
import { CREDENTIALS } from './credentials.js'
import { tableOf } from './table.js'

const UPSTREAM = 18081
const PORTS = { mine: 18080, other: 18082 }
const WARM_MS = 2000
const here = new URL('.', import.meta.url).pathname

const number = value => ({ type: 'string', default: String(value) })
const OPTIONS = {
  compare: { type: 'string' },
  pairs: { type: 'string' },
  slots: number(24),
  slot: number(250),
  callers: number(64),
  quick: { type: 'boolean', default: false },
  auth: { type: 'string', default: 'none' },
  set: { type: 'string', multiple: true, default: [] }
}

// Only what every checkout knows.
const environment = {
  PATH: process.env.PATH,
  MIXPANEL_TOKEN: 'bench-token',
  MIXPANEL_URL: `http://127.0.0.1:${UPSTREAM}`,
  RATE_LIMIT_MAX: '1000000000',
  CORS_ORIGINS: 'https://app.example.com'
}

const children = new Set()

/** A child on that core, or on those of this process; its output goes to a pipe that is read. */
function start (core, script, env) {
  const [command, ...args] = [...core === undefined ? [] : ['taskset', '-c', String(core)], process.execPath, script]
  const child = spawn(command, args, { cwd: here, env: { ...environment, ...env }, stdio: ['ignore', 'pipe', 'inherit'] })
  child.stdout.resume()
  children.add(child)
  child.over = new Promise(resolve => child.once('close', resolve)).then(() => children.delete(child))
  return child
}

/** Resolves once the child answers 200. */
async function isUp (child, url, options) {
  for (const since = performance.now(); performance.now() - since < 20_000; await sleep(10)) {
    if (child.exitCode !== null) break
    const answer = await fetch(url, options).catch(() => undefined)
    await answer?.text()
    if (answer?.status === 200) return
  }
  throw new Error(`${child.spawnargs.at(-1)} does not answer 200`)
}

// schedstat has nanoseconds for each thread, but not every kernel has schedstat. stat has ticks of 10 ms, too coarse for
// a slot, good enough for the sum of all slots.
const isFine = existsSync('/proc/self/schedstat')
const TICK_US = isFine ? 0 : 1e6 / Number(spawnSync('getconf', ['CLK_TCK']).stdout)

/** Microseconds that the threads of a process have run, and that they have waited for a core that another had. */
function usage (pid) {
  if (!isFine) {
    const [, , , , , , , , , , , user, system] = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1].split(' ')
    return { cpu: (Number(user) + Number(system)) * TICK_US, waited: 0 }
  }
  const sum = { cpu: 0, waited: 0 }
  for (const thread of readdirSync(`/proc/${pid}/task`)) {
    const [cpu, waited] = readFileSync(`/proc/${pid}/task/${thread}/schedstat`, 'utf8').split(' ')
    sum.cpu += Number(cpu) / 1000
    sum.waited += Number(waited) / 1000
  }
  return sum
}

/** The callers of one relay. `slot(ms)` loads it for so long and resolves with what it answered and used. */
async function callersOf ({ pid }, port, connections, { credentialOf, distinct }) {
  let isOver, answered, underWay, end, fail, broken
  const { sockets, send } = await openCallers({ port, connections, credentialOf, distinct, onAnswer, onError })

  function onError (error) {
    broken = new Error(`the relay on port ${port}: ${error.message}`)
    fail?.(broken)
  }

  function onAnswer (socket, status) {
    if (status !== '200') onError(new Error(`answered ${status}`))
    answered++
    if (!isOver) send(socket)
    else if (--underWay === 0) end()
  }

  return {
    async slot (ms) {
      if (broken) throw broken
      const before = usage(pid)
      isOver = false
      answered = 0
      underWay = sockets.length
      const done = new Promise((resolve, reject) => { [end, fail] = [resolve, reject] })
      setTimeout(() => { isOver = true }, ms)
      sockets.forEach(send)
      await done
      // The relay may have something left to do after its last answer.
      await sleep(5)
      const after = usage(pid)
      return { answered, cpu: after.cpu - before.cpu, waited: after.waited - before.waited }
    },
    close: () => { for (const socket of sockets) socket.destroy() }
  }
}

function quantile (list, share) {
  const sorted = list.toSorted((a, b) => a - b)
  const at = (sorted.length - 1) * share
  const [low, high] = [sorted[Math.floor(at)], sorted[Math.ceil(at)]]
  return low + (high - low) * (at - Math.floor(at))
}

const total = (list, key) => list.reduce((sum, one) => sum + one[key], 0)
const each = ({ cpu, answered }) => cpu / answered
const together = list => each({ cpu: total(list, 'cpu'), answered: total(list, 'answered') })

/** Two fresh relays: the slots of each, and the ratio of this checkout to the other one. */
async function measurePair (scripts, order, isPinned, { slots, slot, callers, auth, variables }) {
  const credentials = { mine: CREDENTIALS[auth], other: CREDENTIALS.none }
  const relays = {}
  const loads = {}
  try {
    for (const name of order) {
      relays[name] = start(isPinned ? 0 : undefined, scripts[name], { PORT: String(PORTS[name]), ...credentials[name].env, ...name === 'mine' && variables })
      await isUp(relays[name], `http://127.0.0.1:${PORTS[name]}/identify`, {
        method: 'POST',
        headers: { 'content-type': 'application/json', authorization: `Bearer ${credentials[name].credentialOf?.('first')}` },
        body: JSON.stringify({ identified_id: 'first', anon_id: '5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11' })
      })
    }
    for (const name of order) loads[name] = await callersOf(relays[name], PORTS[name], callers, credentials[name])
    const taken = { mine: [], other: [] }
    // The first turns only warm them up.
    for (let turn = -Math.ceil(WARM_MS / slot); turn < slots; turn++) {
      for (const name of turn % 2 === 0 ? order : order.toReversed()) {
        const result = await loads[name].slot(slot)
        if (turn >= 0) taken[name].push(result)
      }
    }
    const ratios = isFine
      ? taken.mine.map((result, turn) => each(result) / each(taken.other[turn]))
      : [together(taken.mine) / together(taken.other)]
    return { taken, ratio: quantile(ratios, 0.5), quartiles: [quantile(ratios, 0.25), quantile(ratios, 0.75)] }
  } finally {
    for (const load of Object.values(loads)) load.close()
    for (const relay of Object.values(relays)) relay.kill()
    await Promise.all(Object.values(relays).map(relay => relay.over))
  }
}

function report (pairs) {
  const head = ['', 'CPU µs each, fast state', 'median', 'waited for a core, of CPU', 'identities']
  const rows = Object.entries({ mine: 'this checkout', other: 'other' }).map(([name, title]) => {
    const results = pairs.flatMap(({ taken }) => taken[name])
    const cost = results.map(each)
    const waited = isFine ? `${(total(results, 'waited') / total(results, 'cpu') * 100).toFixed(1)} %` : '?'
    return [title, quantile(cost, 0.25).toFixed(1), quantile(cost, 0.5).toFixed(1), waited, String(total(results, 'answered'))]
  })
  console.log(tableOf(head, rows))

  const ratios = pairs.map(({ ratio }) => ratio)
  const mean = ratios.reduce((sum, ratio) => sum + ratio, 0) / ratios.length
  const deviation = Math.sqrt(ratios.reduce((sum, ratio) => sum + (ratio - mean) ** 2, 0) / (ratios.length - 1))
  const [low, median, high] = [0.25, 0.5, 0.75].map(share => quantile(ratios, share).toFixed(3))
  console.log(`\nthis checkout / other: ${median} (quartiles ${low}–${high}; ` +
    `mean ${mean.toFixed(3)} ± ${(2 * deviation / Math.sqrt(ratios.length)).toFixed(3)} over ${ratios.length} pairs)`)
}

/** Resolves with the exit code. */
export async function compare (args) {
  const { values } = parseArgs({ args, options: OPTIONS })
  const { auth } = values
  const variables = Object.fromEntries(values.set.map(text => [text.slice(0, text.indexOf('=')), text.slice(text.indexOf('=') + 1)]))
  const plan = { auth, variables, ...Object.fromEntries(['slots', 'slot', 'callers'].map(name => [name, Number(values[name])])) }
  if (!(auth in CREDENTIALS)) {
    console.error(`--auth must be one of ${Object.keys(CREDENTIALS).join(', ')}`)
    return 1
  }
  const count = Math.max(2, Number(values.pairs ?? (values.quick ? 4 : 12)))
  const checkout = resolve(process.env.INIT_CWD ?? '.', values.compare)
  const scripts = { mine: join(here, '../dist/server.js'), other: join(checkout, 'dist/server.js') }
  for (const script of Object.values(scripts)) {
    if (!existsSync(script)) {
      console.error(`${script} is missing: build that checkout first (npm ci && npm run build).`)
      return 1
    }
  }
  process.on('exit', () => { for (const child of children) child.kill() })
  for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(1))

  // The callers live in this process, so it moves to core 1; the upstream, its child, goes with it.
  const isPinned = spawnSync('taskset', ['-acp', '1', String(process.pid)]).status === 0
  if (!isPinned) console.error('no taskset or no second core: the relays and the load share all cores')
  if (!isFine) console.error('no /proc/PID/schedstat: CPU in ticks, summed over the slots')
  const upstream = start(undefined, 'upstream.js', { PORT: String(UPSTREAM) })
  await isUp(upstream, `http://127.0.0.1:${UPSTREAM}/count`)

  const pairs = []
  while (pairs.length < count) {
    const order = pairs.length % 2 === 0 ? ['mine', 'other'] : ['other', 'mine']
    const pair = await measurePair(scripts, order, isPinned, plan)
    pairs.push(pair)
    const fast = Object.values(pair.taken).map(results => quantile(results.map(each), 0.25).toFixed(1))
    const [low, high] = pair.quartiles.map(value => value.toFixed(3))
    console.error(`pair ${pairs.length}/${count}: ${pair.ratio.toFixed(3)} (slots ${low}–${high}), CPU µs each ${fast.join(' and ')}`)
  }
  report(pairs)
  return 0
}
