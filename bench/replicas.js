// Replicas of the relay in front of one rate-limited Mixpanel: npm run bench:replicas
//   [-- --replicas 1,3,10,30] [--only 'outage'] [--seed 1]
// A simulation on a virtual clock. The policies are the relay's own: createRelay with its batcher, slots, retries,
// breaker, forwarder and pauses, once for each replica. Mixpanel, the network and the stores are models. The CPU time of
// a replica is not modelled, so one replica may take more than a real one could. The same seed gives the same figures.
import { advanceTo, reset } from './virtual-time.js'
import { parseArgs } from 'node:util'
import { tableOf } from './table.js'

const { readConfig } = await import('../dist/config.js')
const { interpretBody, interpretStatus } = await import('../dist/mixpanel/answer.js')
const { groupCalls } = await import('../dist/outbox/grouped.js')
const { createRelay } = await import('../dist/relay/relay.js')

const { values } = parseArgs({
  options: {
    replicas: { type: 'string', default: '1,3,10,30' },
    only: { type: 'string', default: '' },
    seed: { type: 'string', default: '1' }
  }
})

/** Events a second, as Mixpanel documents; a second's worth may come at once. */
const LIMIT = 30_000
/** The way to Mixpanel and back takes this long, plus at most as much again of JITTER_MS. */
const LATENCY_MS = 40
const JITTER_MS = 20
/** One call of the store. */
const STORE_MS = { file: 2, redis: 1 }
/** DEADLINE_MS plus 5 s, as src/outbox/open.ts sets it. */
const LEASE_MS = 15_000
const WARM_MS = 5000
const STEADY_MS = 15_000

/** `rate`: identities a second of all callers. For `troubleMs` Mixpanel is down, or with `burst` that many come a second. */
const SCENARIOS = {
  'steady, two thirds of the limit, OUTBOX=off': { rate: 20_000, outbox: 'off' },
  'steady, 1.5 times the limit, OUTBOX=off': { rate: 45_000, outbox: 'off' },
  'outage of 60 s at 10,000 a second, an outbox for each': { rate: 10_000, outbox: 'file', troubleMs: 60_000 },
  'outage of 75 s at 10,000 a second, an outbox for each': { rate: 10_000, outbox: 'file', troubleMs: 75_000 },
  'outage of 60 s at 10,000 a second, an outbox for each, 429 with Retry-After: 30': { rate: 10_000, outbox: 'file', troubleMs: 60_000, retryAfter: '30' },
  'outage of 60 s at 2,000 a second, OUTBOX=redis': { rate: 2000, outbox: 'redis', troubleMs: 60_000 },
  'burst of 20 s at 45,000 a second, 10,000 otherwise, an outbox for each': { rate: 10_000, outbox: 'file', troubleMs: 20_000, burst: 45_000 }
}

const silent = { debug () {}, info () {}, warn () {}, error () {} }
const sleep = ms => new Promise(resolve => setTimeout(resolve, ms))

/** Mixpanel: a token bucket for events, 503 while it is down, and counts of what came and what it said. */
function createUpstream ({ retryAfter }) {
  let tokens = LIMIT
  let at = 0
  /** Requests by tenths of a second. */
  const requests = []
  const upstream = {
    isDown: false,
    limited: 0,
    requests,
    accepted: [],
    firstAt: [],
    /** A client of one replica. */
    clientOf: replica => ({
      encode: events => events.length,
      async send (count) {
        await sleep(LATENCY_MS / 2 + Math.random() * JITTER_MS / 2)
        const { status, body } = answer(replica, count)
        await sleep(LATENCY_MS / 2 + Math.random() * JITTER_MS / 2)
        return interpretStatus(status, retryAfter) ?? interpretBody(status, body)
      }
    })
  }

  function answer (replica, count) {
    const now = performance.now()
    const slot = Math.floor(now / 100)
    requests[slot] = (requests[slot] ?? 0) + 1
    if (upstream.isDown) return { status: 503 }
    tokens = Math.min(LIMIT, tokens + (now - at) / 1000 * LIMIT)
    at = now
    if (tokens < count) {
      upstream.limited++
      return { status: 429 }
    }
    tokens -= count
    upstream.accepted[replica] = (upstream.accepted[replica] ?? 0) + count
    upstream.firstAt[replica] ??= now
    return { status: 200, body: '1' }
  }
  return upstream
}

/** The entries of one outbox, and the lease of the replica that delivers. */
const createStore = () => ({ entries: [], head: 0, waiting: 0, queued: new Map(), lease: { owner: undefined, until: 0 } })

/** An outbox of one replica on a store in memory. `isShared`: under a lease. */
function createOutbox (store, replica, ms, isShared) {
  const groups = groupCalls({
    maxGroup: isShared ? 100 : 1000,
    ...!isShared && { maxStores: 1 },
    async store (events) {
      await sleep(ms)
      for (const { event } of events) {
        store.entries.push({ id: String(store.entries.length), event })
        store.queued.set(event.anonKey, (store.queued.get(event.anonKey) ?? 0) + 1)
      }
      store.waiting += events.length
      return { results: events.map(() => 'stored') }
    },
    async lookUp (anonKeys) {
      await sleep(ms)
      return anonKeys.map(key => store.queued.has(key))
    }
  }, silent)

  return {
    put: groups.put,
    has: async anonKey => !isShared && store.waiting === 0 ? 'no' : groups.has(anonKey),
    async next (count, after = '-1') {
      await sleep(ms)
      const { lease } = store
      if (isShared && lease.owner !== replica && lease.until > performance.now()) return []
      store.lease = { owner: replica, until: performance.now() + LEASE_MS }
      const found = []
      for (let id = Math.max(Number(after) + 1, store.head); id < store.entries.length && found.length < count; id++) {
        if (store.entries[id] !== undefined) found.push(store.entries[id])
      }
      return found
    },
    async ack (entries) {
      await sleep(ms)
      for (const { id, event: { anonKey } } of entries) {
        store.entries[id] = undefined
        const rest = store.queued.get(anonKey) - 1
        if (rest === 0) store.queued.delete(anonKey)
        else store.queued.set(anonKey, rest)
      }
      store.waiting -= entries.length
      while (store.head < store.entries.length && store.entries[store.head] === undefined) store.head++
    },
    async deadLetter () { throw new Error('a dead letter') },
    counts: () => ({ waiting: store.waiting, dead: 0, bytes: 0, paused: false })
  }
}

/** Replicas in front of an upstream, and their callers. */
function createFleet (count, scenario, upstream) {
  const isShared = scenario.outbox === 'redis'
  const shared = createStore()
  const stores = []
  const codes = {}
  let rate = scenario.rate
  let made = 0
  const relays = Array.from({ length: count }, (_, replica) => {
    const config = readConfig({ MIXPANEL_TOKEN: 'x' }, () => '')
    const store = isShared ? shared : createStore()
    stores.push(store)
    const outbox = scenario.outbox === 'off' ? undefined : createOutbox(store, replica, STORE_MS[scenario.outbox], isShared)
    const relay = createRelay(config, upstream.clientOf(replica), silent, outbox)
    relay.start()
    return relay
  })

  function post (relay) {
    const anon = `5f0c8a1e-6a0b-4d53-9d3c-${(made++).toString(16).padStart(12, '0')}`
    relay.identify(relay.toEvent({ identified_id: `user-${made}`, anon_id: anon }), { isTrusted: true })
      .then(({ code }) => { codes[code] = (codes[code] ?? 0) + 1 })
  }

  /** Each millisecond a replica gets its share of the load, on average. */
  function load () {
    const mean = rate / count / 1000
    for (const relay of relays) for (let rest = mean; rest > 0; rest--) if (rest >= 1 || Math.random() < rest) post(relay)
    setTimeout(load, 1)
  }

  return {
    codes,
    setRate (next) { rate = next },
    waiting: () => isShared ? shared.waiting : stores.reduce((sum, { waiting }) => sum + waiting, 0),
    start: load,
    stop: () => relays.forEach(relay => { relay.stop() })
  }
}

/** Jain's index: 1 if all are equal, 1/n if one has all. */
function fairness (list, count) {
  const all = Array.from({ length: count }, (_, index) => list[index] ?? 0)
  const sum = all.reduce((total, one) => total + one, 0)
  return sum ** 2 / (count * all.reduce((total, one) => total + one ** 2, 0))
}

const total = list => list.reduce((sum, one) => sum + (one ?? 0), 0)
const copy = ({ limited, accepted, requests }) => ({ limited, accepted: [...accepted], requests: total(requests) })

/** What came between two copies. */
function between (before, after, count, ms) {
  const accepted = Array.from({ length: count }, (_, index) => (after.accepted[index] ?? 0) - (before.accepted[index] ?? 0))
  const events = total(accepted)
  const seconds = ms / 1000
  return {
    goodput: (events / seconds).toFixed(0),
    share: `${(events / seconds / LIMIT * 100).toFixed(0)} %`,
    limited: ((after.limited - before.limited) / events * 1000).toFixed(2),
    jain: fairness(accepted, count).toFixed(3),
    requests: ((after.requests - before.requests) / events * 1000).toFixed(0)
  }
}

const STEADY = ['replicas', 'accepted/s', 'of the limit', '429 per 1000', 'Jain', 'requests per 1000', 'answers to callers']

async function steady (count, scenario) {
  const upstream = createUpstream(scenario)
  const fleet = createFleet(count, scenario, upstream)
  fleet.start()
  await advanceTo(WARM_MS)
  const before = copy(upstream)
  const codes = { ...fleet.codes }
  await advanceTo(WARM_MS + STEADY_MS)
  const { goodput, share, limited, jain, requests } = between(before, copy(upstream), count, STEADY_MS)
  const answers = Object.entries(fleet.codes).map(([code, sum]) => [code, sum - (codes[code] ?? 0)]).filter(([, sum]) => sum > 0)
  const all = total(answers.map(([, sum]) => sum))
  const shares = answers.map(([code, sum]) => `${code} ${(sum / all * 100).toFixed(0)} %`).join(', ')
  return [String(count), goodput, share, limited, jain, requests, shares]
}

const RECOVERY = ['replicas', 'meanwhile: peak/100 ms', 'resumed, s', 'herd: peak/100 ms', '× mean', 'empty, s', 'accepted/s', 'of the limit', '429 per 1000', 'Jain']

async function recovery (count, scenario) {
  const { rate, burst = rate, troubleMs } = scenario
  const upstream = createUpstream(scenario)
  const fleet = createFleet(count, scenario, upstream)
  fleet.start()
  await advanceTo(WARM_MS)
  upstream.isDown = burst === rate
  fleet.setRate(burst)
  await advanceTo(WARM_MS + troubleMs)
  upstream.isDown = false
  fleet.setRate(rate)
  upstream.firstAt = []
  const recovered = performance.now()
  const before = copy(upstream)
  // What a caller sends meanwhile is queued for some milliseconds now and then.
  const most = rate / 100
  do await advanceTo(performance.now() + 100)
  while (fleet.waiting() > most && performance.now() < recovered + 600_000)
  const ms = performance.now() - recovered
  const { goodput, share, limited, jain } = between(before, copy(upstream), count, ms)
  const slots = (from, to) => Array.from({ length: Math.ceil((to - from) / 100) }, (_, index) => upstream.requests[Math.floor(from / 100) + index] ?? 0)
  // In an outage the first failures open the breakers; what comes after 5 s are probes.
  const meanwhile = Math.max(...slots(WARM_MS + 5000, recovered))
  const first = Math.min(...upstream.firstAt.filter(at => at !== undefined))
  const resumed = [first, Math.max(...upstream.firstAt.filter(at => at !== undefined))].map(at => ((at - recovered) / 1000).toFixed(1))
  const herd = slots(first, first + Math.min(10_000, ms))
  const peak = Math.max(...herd)
  const isEmpty = fleet.waiting() <= most
  fleet.stop()
  return [String(count), String(meanwhile), resumed.join('–'), String(peak), (peak / (total(herd) / herd.length)).toFixed(1),
    isEmpty ? (ms / 1000).toFixed(1) : `${fleet.waiting()} left`, goodput, share, limited, jain]
}

console.log(`limit ${LIMIT} events/s, ${LATENCY_MS}–${LATENCY_MS + JITTER_MS} ms away`)
for (const [title, scenario] of Object.entries(SCENARIOS)) {
  if (!new RegExp(values.only).test(title)) continue
  const rows = []
  for (const count of values.replicas.split(',').map(Number)) {
    reset(Number(values.seed))
    rows.push(await (scenario.troubleMs === undefined ? steady : recovery)(count, scenario))
  }
  console.log(`\n${title}\n\n${tableOf(scenario.troubleMs === undefined ? STEADY : RECOVERY, rows)}`)
}
