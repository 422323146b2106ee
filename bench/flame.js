// Where the CPU time of an identity goes: npm run bench:flame [-- --callers 64 --seconds 2 --rounds 3]
// Draws docs/flame.svg, and prints a table of the relay beside bare Fastify. Both servers take turns, with and
// without the profiler. The shares are those of the samples; the microseconds are these shares of the CPU time without it.
import { writeFileSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { requestOf } from './callers.js'
import { BARE, OURS, contestants, launch } from './contestants.js'
import { CREDENTIALS } from './credentials.js'
import { flamePicture } from './flame-picture.js'
import { openProfiler } from './inspector.js'
import { PHASES, phasesOf } from './phases.js'
import { isUp, start, stop, takeSecondCore } from './processes.js'
import { sharesOf, stacksOf, treeOf } from './profile.js'
import { openUpstream } from './scenes.js'
import { openSlots } from './slots.js'
import { median } from './statistics.js'
import { tableOf } from './table.js'

const { values } = parseArgs({
  options: {
    callers: { type: 'string', default: '64' },
    seconds: { type: 'string', default: '2' },
    rounds: { type: 'string', default: '3' }
  }
})
const [callers, seconds, rounds] = [values.callers, values.seconds, values.rounds].map(Number)
const INTERVAL_US = 200
const WARM_UP_MS = 3000
const PICTURE = new URL('../docs/flame.svg', import.meta.url)

/**
 * Starts a contestant and warms it up. `round()` loads it twice, with the profiler the second time. `end()` resolves with
 * { stacks, each, profiled }: all stacks, and the CPU µs of one identity without and with the profiler.
 */
async function open (name, port) {
  const [[node, ...args], env] = launch(contestants[name], port)
  const inspector = port + 1
  const command = [node, `--inspect=127.0.0.1:${inspector}`, '--inspect-publish-uid=http', ...args]
  const server = start(0, command, env)
  await isUp(server, port, requestOf('first', CREDENTIALS.key))
  const profiler = await openProfiler(inspector, INTERVAL_US)
  const load = await openSlots(server, port, callers, CREDENTIALS.key)

  async function costInSlot (ms) {
    const { cpu, answered } = await load.slot(ms)
    return cpu / answered
  }

  // V8 knows the inlined functions only of code that it compiles under the profiler, so the warm-up has it as well.
  await profiler.start()
  await load.slot(WARM_UP_MS)
  await profiler.stop()

  const [without, under, stacks] = [[], [], []]
  return {
    async round () {
      without.push(await costInSlot(seconds * 1000))
      await profiler.start()
      under.push(await costInSlot(seconds * 1000))
      stacks.push(...stacksOf(await profiler.stop()))
    },
    async end () {
      load.close()
      profiler.close()
      await stop(server)
      return { stacks, each: median(without), profiled: median(under) }
    }
  }
}

takeSecondCore()
const upstream = await openUpstream({})
const servers = [await open(OURS, 18093), await open(BARE, 18095)]
for (let round = 0; round < rounds; round++) {
  for (const server of servers) await server.round()
}
const [ours, bare] = await Promise.all(servers.map(server => server.end()))
await upstream.close()

writeFileSync(PICTURE, flamePicture(treeOf(phasesOf(ours.stacks)), {
  title: `Where the CPU time of one identity goes: ${ours.each.toFixed(0)} µs, ${callers} callers`, each: ours.each, phases: PHASES
}))

const bareShares = new Map(sharesOf(bare.stacks))
const cells = (share, each) => [`${(share * 100).toFixed(1)} %`, (share * each).toFixed(1)]
const rows = sharesOf(ours.stacks).map(([part, share]) => [
  part, ...cells(share, ours.each), ...cells(bareShares.get(part), bare.each), (share * ours.each - bareShares.get(part) * bare.each).toFixed(1)
])
const all = ['all', ...cells(1, ours.each), ...cells(1, bare.each), (ours.each - bare.each).toFixed(1)]
console.log(`${tableOf(['', 'this relay', 'µs', 'bare Fastify', 'µs', 'difference µs'], [...rows, all])}

${callers} callers. Under the profiler an identity costs ${ours.profiled.toFixed(1)} µs, with bare Fastify ${bare.profiled.toFixed(1)} µs.
docs/flame.svg shows the relay.`)
