// What it costs a new process to load all of undici in place of its pool alone: npm run bench:imports
// Fresh processes in turn, A B A B …; the medians of the time to load and of the memory afterwards.
import { spawnSync } from 'node:child_process'
import { tableOf } from './table.js'

const ROUNDS = 15
const CANDIDATES = {
  "import('undici')": "await import('undici')",
  'undici/lib/dispatcher/pool.js': "createRequire(import.meta.url)('undici/lib/dispatcher/pool.js')"
}
const MEASURE = work => `import { createRequire } from 'node:module'
const since = performance.now()
${work === '' ? '' : `void (${work})`}
const ms = performance.now() - since
void createRequire
console.log(JSON.stringify({ ms, mb: process.memoryUsage().rss / 1e6 }))`

/** One fresh process: milliseconds and megabytes. */
function measure (work) {
  const { stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', MEASURE(work)], { encoding: 'utf8' })
  if (stdout === '') throw new Error(stderr)
  return JSON.parse(stdout)
}

const median = list => list.toSorted((a, b) => a - b)[Math.floor(list.length / 2)]

const taken = { nothing: [], ...Object.fromEntries(Object.keys(CANDIDATES).map(name => [name, []])) }
for (let round = 0; round < ROUNDS; round++) {
  for (const name of Object.keys(taken)) taken[name].push(measure(CANDIDATES[name] ?? ''))
}
const rows = Object.entries(taken).map(([name, results]) =>
  [name, median(results.map(({ ms }) => ms)).toFixed(1), median(results.map(({ mb }) => mb)).toFixed(1)])
console.log(`Node ${process.version}, medians of ${ROUNDS} processes each\n`)
console.log(tableOf(['loaded', 'ms', 'RSS MB'], rows))
