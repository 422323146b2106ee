// What the servers are measured in. A field is a list of { name, contestant, node, bare, limit }; `bare` is the name of
// the one that it is compared with, `limit` its memory in MB. Every round starts fresh processes of all, because two
// processes of one build differ by some per cent for life. The load goes round them in short slots, forth and back, so a
// machine that changes its speed changes it for all of them.
import { setTimeout as sleep } from 'node:timers/promises'
import { requestOf } from './callers.js'
import { launch, UPSTREAM } from './contestants.js'
import { CREDENTIALS } from './credentials.js'
import { isUp, memory, start, stop } from './processes.js'
import { openSlots } from './slots.js'
import { quantile } from './statistics.js'

const FIRST_PORT = 18110
const WARM_MS = 2000
const first = requestOf('first', CREDENTIALS.key)

/** Starts upstream.js with its variables. Resolves with { count, close }. */
export async function openUpstream (env) {
  const child = start(undefined, [process.execPath, 'upstream.js'], { PORT: String(UPSTREAM), ...env })
  await isUp(child, UPSTREAM, 'GET /count HTTP/1.1\r\nhost: upstream\r\n\r\n')
  return {
    count: async () => (await (await fetch(`http://127.0.0.1:${UPSTREAM}/count`)).json()).requests,
    close: () => stop(child)
  }
}

/** Starts a server on a core, or on those of this process, and resolves with it when it has answered a request. */
export async function startServer (core, { contestant, node, limit }, port, env) {
  const child = start(core, ...launch(contestant, port, node, env), limit)
  await isUp(child, port, first)
  return child
}

/**
 * Measures a field with each number of callers. Returns a map of the names to { idle, busy, peak } in MB, a list by round,
 * and, by the number of callers, `slots`: a list by round of the slots of that process, with their upstream `requests`.
 */
export async function measure (field, { core, rounds, callers, turns, slotMs, env = {}, properties }) {
  const upstream = await openUpstream(env)
  const results = new Map(field.map(({ name }) => [name, { idle: [], busy: [], peak: [], slots: Object.fromEntries(callers.map(count => [count, []])) }]))
  for (let round = 0; round < rounds; round++) {
    const servers = []
    for (const [index, one] of field.entries()) {
      const port = FIRST_PORT + index
      const child = await startServer(core, one, port, one.name === one.bare ? env : {})
      await sleep(1000)
      const result = results.get(one.name)
      result.idle.push(memory(child.pid).now)
      const load = await openSlots(child, port, Math.max(...callers), { ...CREDENTIALS.key, properties })
      await load.slot(WARM_MS)
      for (const count of callers) result.slots[count].push([])
      servers.push({ ...one, child, load, result })
    }
    for (let turn = 0; turn < turns; turn++) {
      for (const count of callers) {
        for (const { load, result } of turn % 2 === 0 ? servers : servers.toReversed()) {
          const before = await upstream.count()
          const slot = await load.slot(slotMs, count)
          result.slots[count].at(-1).push({ ...slot, requests: await upstream.count() - before })
        }
      }
    }
    for (const { child, load, result } of servers) {
      const { now, peak } = memory(child.pid)
      result.busy.push(now)
      result.peak.push(peak)
      load.close()
    }
    await stop(...servers.map(({ child }) => child))
    console.error(`round ${round + 1}/${rounds} of ${callers.join(' and ')} callers`)
  }
  await upstream.close()
  return results
}

/** The connections of the requests that warm a server up. */
const WARMERS = 8

/**
 * Starts a fresh server, sends it `warmUp` requests that have no effect, and then 1000 identities by `callers`. Resolves
 * with the quantiles of the latencies of these, and how long the warm-up took, in ms.
 */
export async function coldStart (core, server, callers, warmUp) {
  const child = await startServer(core, server, FIRST_PORT, {})
  const since = performance.now()
  if (warmUp > 0) {
    const warmers = await openSlots(child, FIRST_PORT, WARMERS, { ...CREDENTIALS.key, path: '/identify?dry_run=1' })
    await warmers.slot(60_000, WARMERS, warmUp)
    warmers.close()
  }
  const warmUpMs = performance.now() - since
  const load = await openSlots(child, FIRST_PORT, callers, CREDENTIALS.key)
  const { latencies } = await load.slot(60_000, callers, 1000)
  load.close()
  await stop(child)
  return { p50: quantile(latencies, 0.5), p99: quantile(latencies, 0.99), warmUpMs }
}
