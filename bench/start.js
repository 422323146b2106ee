// What a start costs, and what a relay that has nothing to do takes: npm run bench:start [-- --node PATH --node PATH …]
// Fresh processes in turn, A B A B …, on core 0; medians, and of the ratios to the bare Fastify of the same round.
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { requestOf } from './callers.js'
import { BARE, contestants, launch, OURS } from './contestants.js'
import { CREDENTIALS } from './credentials.js'
import { isUp, memory, start, stop, takeSecondCore, usage } from './processes.js'
import { openUpstream } from './scenes.js'
import { median } from './statistics.js'
import { tableOf } from './table.js'

const ROUNDS = 15
const PORT = 18080
const IDLE_MS = 1000

const { values: { node: nodes } } = parseArgs({ options: { node: { type: 'string', multiple: true, default: [process.execPath] } } })

const BUNDLED = 'this relay, as in the image'

function launched (name, node) {
  const [command, env] = launch(contestants[name === BUNDLED ? OURS : name], PORT, node)
  return [name === BUNDLED ? command.map(part => part.replace('../dist/', '../bundle/')) : command, env]
}

/** Starts one process. Resolves with ms to the first 200, the ms of CPU until then, and the MB when it is idle. */
async function measure (name, node) {
  const since = performance.now()
  const child = start(0, ...launched(name, node))
  await isUp(child, PORT, requestOf('first', CREDENTIALS.key))
  const result = { ms: performance.now() - since, cpu: usage(child.pid).cpu / 1000 }
  await sleep(IDLE_MS)
  result.rss = memory(child.pid).now
  await stop(child)
  return result
}

takeSecondCore()
await openUpstream({})

const rows = []
for (const node of nodes) {
  const results = { [BARE]: [], [OURS]: [], [BUNDLED]: [] }
  for (let round = 0; round < ROUNDS; round++) {
    for (const name of Object.keys(results)) results[name].push(await measure(name, node))
  }
  for (const [name, list] of Object.entries(results)) {
    const of = key => median(list.map(result => result[key])).toFixed(0)
    const ratio = key => median(list.map((result, round) => result[key] / results[BARE][round][key])).toFixed(2)
    rows.push([`${name}, ${node}`, of('ms'), ratio('ms'), of('cpu'), ratio('cpu'), of('rss'), ratio('rss')])
  }
}
console.log(`medians of ${ROUNDS} processes each; everything is on\n`)
console.log(tableOf(['', 'ms to the first 200', '× bare', 'CPU ms', '× bare', 'idle RSS MB', '× bare'], rows))
process.exit()
