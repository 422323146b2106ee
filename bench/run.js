// Peers side by side, with every feature on: npm run bench [-- --quick] [-- --node 20 --node 24 … --memory-limit 256]
// It prints tables, what of the goals is reached, and draws bench.svg from the same figures. With --node or
// --memory-limit (MB) it compares versions of Node in place of peers; with --compare <checkout> compare.js runs.
import { spawnSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { compare } from './compare.js'
import { BARE, contestants, EXPRESS, OURS, SDK } from './contestants.js'
import { overload } from './overload.js'
import { picture } from './picture.js'
import { isFine, takeSecondCore } from './processes.js'
import { coldStart, measure, openUpstream } from './scenes.js'
import { meanOf, median, quantile } from './statistics.js'
import { tableOf } from './table.js'

if (process.argv.includes('--compare')) process.exit(await compare(process.argv.slice(2)))

const { values: { quick, node: versions, 'memory-limit': limit } } = parseArgs({
  options: {
    quick: { type: 'boolean', default: false },
    node: { type: 'string', multiple: true, default: [] },
    'memory-limit': { type: 'string' }
  }
})
if (limit !== undefined && versions.length === 0) versions.push(process.versions.node)
const here = new URL('.', import.meta.url).pathname
const ROUNDS = quick ? 2 : 5
const COLD_ROUNDS = quick ? 3 : 9
const COLD_CALLERS = 64
const WARM_UP = 1000

/** The path of a version of Node, which npx fetches. */
function nodeOf (version) {
  if (version === process.versions.node) return process.execPath
  const { stdout } = spawnSync('npx', ['-y', '-p', `node@${version}`, 'node', '-p', 'process.execPath'], { cwd: '/', encoding: 'utf8' })
  return stdout.trim()
}

const peers = Object.entries(contestants).map(([name, contestant]) => ({ name, contestant, node: process.execPath, bare: BARE }))
const field = versions.length === 0
  ? peers
  : versions.flatMap(version => {
    const node = nodeOf(version)
    return [BARE, OURS, SDK].map(name => ({
      name: `${name}, Node ${version}`, contestant: contestants[name], node, bare: `${BARE}, Node ${version}`, limit
    }))
  })

const costOf = ({ cpu, answered }) => cpu / answered

/** The ratio of a figure to that of another server in the same slot: the mean over the processes, and 2 s.e. */
function ratioOf (results, name, other, count, figure) {
  return meanOf(results.get(name).slots[count].map((slots, round) =>
    median(slots.map((slot, turn) => figure(slot) / figure(results.get(other).slots[count][round][turn])))))
}

const withError = ({ mean, error }) => `${mean.toFixed(2)} ± ${error.toFixed(2)}`

/** The figures of one server over all slots: medians, and of the CPU the lower quartile, the fast state of the machine. */
function figuresOf (results, name, count) {
  const slots = results.get(name).slots[count].flat()
  const latencies = slots.flatMap(slot => slot.latencies)
  const answered = slots.reduce((sum, slot) => sum + slot.answered, 0)
  const costs = slots.map(costOf)
  return {
    rate: median(slots.map(({ rate }) => rate)),
    cpu: isFine ? quantile(costs, 0.25) : slots.reduce((sum, { cpu }) => sum + cpu, 0) / answered,
    p50: quantile(latencies, 0.5),
    p99: quantile(latencies, 0.99),
    requests: slots.reduce((sum, { requests }) => sum + requests, 0) / answered * 1000,
    idle: median(results.get(name).idle),
    busy: median(results.get(name).busy),
    peak: median(results.get(name).peak)
  }
}

function table (results, names, count) {
  const head = ['', 'identities/s', 'CPU µs each', '× bare', 'p50 ms', 'p99 ms', 'upstream per 1000', 'memory MB, idle', 'under load', 'peak']
  return tableOf(head, names.map(({ name, bare }) => {
    const { rate, cpu, p50, p99, requests, idle, busy, peak } = figuresOf(results, name, count)
    return [name, rate.toFixed(0), cpu.toFixed(1), withError(ratioOf(results, name, bare, count, costOf)), p50.toFixed(1),
      p99.toFixed(1), requests.toFixed(0), idle.toFixed(0), busy.toFixed(0), peak.toFixed(0)]
  }))
}

const core = takeSecondCore() ? 0 : undefined
const near = await measure(field, { core, rounds: ROUNDS, callers: [64, 256], turns: quick ? 6 : 10, slotMs: 250 })
for (const count of [64, 256]) {
  console.log(`\n${count} callers, an upstream that answers at once\n\n${table(near, field, count)}`)
}
if (versions.length > 0) process.exit()

const pair = field.filter(({ name }) => name === BARE || name === OURS)
const large = await measure(pair, { core, rounds: Math.min(3, ROUNDS), callers: [64], turns: 10, slotMs: 250, properties: 10 })
console.log(`\n64 callers, ten properties in each identity\n\n${table(large, pair, 64)}`)

const FAR_CALLERS = 500
const farField = field.filter(({ name }) => name !== EXPRESS)
const far = await measure(farField, {
  core, rounds: Math.min(3, ROUNDS), callers: [FAR_CALLERS], turns: 4, slotMs: 1500, env: { LATENCY_MS: '50' }
})
console.log(`\n${FAR_CALLERS} callers, an upstream that takes 50 ms; bare Fastify waits as long\n\n${table(far, farField, FAR_CALLERS)}`)

const upstream = await openUpstream({})
const cold = { [BARE]: [], [OURS]: [], [`${OURS}, warmed up`]: [] }
for (let round = 0; round < COLD_ROUNDS; round++) {
  for (const [name, list] of Object.entries(cold)) {
    const warmUp = name in contestants ? 0 : WARM_UP
    list.push(await coldStart(core, { contestant: contestants[name] ?? contestants[OURS], node: process.execPath }, COLD_CALLERS, warmUp))
  }
}
await upstream.close()
const coldRows = Object.entries(cold).map(([name, list]) =>
  [name, ...['p50', 'p99', 'warmUpMs'].map(key => median(list.map(one => one[key])).toFixed(1))])
console.log(`\nThe first 1000 identities of a new process, ${COLD_CALLERS} callers; warmed up by ${WARM_UP} requests without effect\n
${tableOf(['', 'p50 ms', 'p99 ms', 'warm-up ms'], coldRows)}`)

console.log(`\n${await overload(core)}\n`)

const goal = (what, value, limit, isAtMost = true) => {
  const isReached = isAtMost ? value <= limit : value >= limit
  console.log(`${isReached ? 'reached' : 'MISSED '}  ${what}: ${value.toFixed(2)} (goal: at ${isAtMost ? 'most' : 'least'} ${limit})`)
}
const memoryRatio = figuresOf(near, OURS, 256).busy / figuresOf(near, BARE, 256).busy
goal('CPU to bare Fastify, 256 callers', ratioOf(near, OURS, BARE, 256, costOf).mean, 1.6)
goal('CPU to bare Fastify, 64 callers', ratioOf(near, OURS, BARE, 64, costOf).mean, 1.75)
goal('CPU to the official SDK, 256 callers', ratioOf(near, OURS, SDK, 256, costOf).mean, 0.4)
goal('CPU to Express + axios, 256 callers', ratioOf(near, OURS, EXPRESS, 256, costOf).mean, 0.1)
goal('memory under load to bare Fastify', memoryRatio, 1.25)
goal('memory when idle, MB', figuresOf(near, OURS, 256).idle, 75)
goal('50 ms: rate to a route that only waits', ratioOf(far, OURS, BARE, FAR_CALLERS, ({ rate }) => rate).mean, 0.92, false)
goal('50 ms: upstream requests per 1000', figuresOf(far, OURS, FAR_CALLERS).requests, 25)

writeFileSync(join(here, 'bench.svg'), picture(field.map(({ name }) => ({ name, cpu: figuresOf(near, name, 256).cpu, isOurs: name === OURS }))))
console.log('\nbench/bench.svg shows the CPU time of each with 256 callers')
process.exit()
