// The relay of this checkout against that of another one, which is built: npm run bench -- --compare <checkout>
//   [--pairs 12] [--slots 24] [--slot 250] [--callers 64] [--quick] [--auth key|token|new-token]
//   [--set NAME=VALUE], which sets a variable of this checkout alone
// Both relays run at the same time on core 0; the upstream and the callers have core 1. The load goes round the two in
// short slots, A B B A A B B A …, so a machine that changes its speed changes it for both. Two processes of one build
// differ by some per cent for life, so every pair is two fresh ones, and the pair is the sample.
import { existsSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { requestOf } from './callers.js'
import { UPSTREAM } from './contestants.js'
import { CREDENTIALS } from './credentials.js'
import { isFine, isUp, start, stop, takeSecondCore } from './processes.js'
import { openUpstream } from './scenes.js'
import { openSlots } from './slots.js'
import { meanOf, quantile } from './statistics.js'
import { tableOf } from './table.js'

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

const total = (list, key) => list.reduce((sum, one) => sum + one[key], 0)
const each = ({ cpu, answered }) => cpu / answered
const together = list => each({ cpu: total(list, 'cpu'), answered: total(list, 'answered') })

/** Two fresh relays: the slots of each, and the ratio of this checkout to the other one. */
async function measurePair (scripts, order, core, plan) {
  const { slots, slot, callers, auth } = plan
  const credentials = { mine: CREDENTIALS[auth], other: CREDENTIALS.none }
  const relays = {}
  const loads = {}
  try {
    for (const name of order) {
      const { env } = credentials[name]
      const variables = name === 'mine' ? plan.variables : {}
      relays[name] = start(core, [process.execPath, scripts[name]], { ...environment, PORT: String(PORTS[name]), ...env, ...variables })
      await isUp(relays[name], PORTS[name], requestOf('first', credentials[name]))
    }
    for (const name of order) loads[name] = await openSlots(relays[name], PORTS[name], callers, credentials[name])
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
    await stop(...Object.values(relays))
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
  const { mean, error } = meanOf(ratios)
  const [low, median, high] = [0.25, 0.5, 0.75].map(share => quantile(ratios, share).toFixed(3))
  console.log(`\nthis checkout / other: ${median} (quartiles ${low}–${high}; ` +
    `mean ${mean.toFixed(3)} ± ${error.toFixed(3)} over ${ratios.length} pairs)`)
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
  // The callers live in this process; the upstream, its child, shares their core.
  const core = takeSecondCore() ? 0 : undefined
  await openUpstream({})

  const pairs = []
  while (pairs.length < count) {
    const order = pairs.length % 2 === 0 ? ['mine', 'other'] : ['other', 'mine']
    const pair = await measurePair(scripts, order, core, plan)
    pairs.push(pair)
    const fast = Object.values(pair.taken).map(results => quantile(results.map(each), 0.25).toFixed(1))
    const [low, high] = pair.quartiles.map(value => value.toFixed(3))
    console.error(`pair ${pairs.length}/${count}: ${pair.ratio.toFixed(3)} (slots ${low}–${high}), CPU µs each ${fast.join(' and ')}`)
  }
  report(pairs)
  return 0
}
