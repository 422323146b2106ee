import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { identity, setPerformanceNow, startRelay } from './helper.ts'
import { createBreaker } from '#src/mixpanel/breaker.js'
import { readConfig } from '#src/config.js'
import { createDelivery } from '#src/mixpanel/delivery.js'
import { identifyEvent } from '#src/identity/event.js'
import type { Mixpanel } from '#src/mixpanel/client.js'
import type { Answer } from '#src/mixpanel/answer.js'

type Relay = Awaited<ReturnType<typeof startRelay>>

/** The identified ids that Mixpanel received, a list for each request. */
const arrived = ({ sandbox }: Relay) => sandbox.requests.map(({ body }) => {
  const data = JSON.parse(new URLSearchParams(body).get('data') ?? '')
  return (Array.isArray(data) ? data : [data]).map(event => event.properties.$identified_id as string)
})

t.test('a thousand concurrent identities are each sent once, in at most 60 requests', async t => {
  const relay = await startRelay(t)
  const identities = Array.from({ length: 1000 }, () => identity())
  const answers = await Promise.all(identities.map(one => relay.post(one)))
  t.same(new Set(answers.map(answer => answer.statusCode)), new Set([200]))
  const got = arrived(relay)
  t.same(got.flat().sort(), identities.map(one => one.identified_id).sort())
  t.ok(got.length <= 60, `at most 60 requests, and there were ${got.length}`)
  t.ok(got.every(batch => batch.length <= 50), 'no array exceeds MAX_BATCH')
})

t.test('a single identity is sent at once, as an object', async t => {
  const relay = await startRelay(t)
  for (let count = 0; count < 3; count++) await relay.post(identity())
  t.same(arrived(relay).map(batch => batch.length), [1, 1, 1])
  t.match(relay.sandbox.requests[0]?.body, /^data=%7B/)
})

t.test('MAX_BATCH=1 and strict=1 send an identity in a request of its own', async t => {
  const single = await startRelay(t, { env: { MAX_BATCH: '1' } })
  await Promise.all(Array.from({ length: 100 }, () => single.post(identity())))
  t.equal(single.sandbox.requests.length, 100)
  const relay = await startRelay(t)
  await Promise.all(Array.from({ length: 40 }, (_, index) => relay.post(identity(), { query: index % 4 === 0 ? '?strict=1' : '' })))
  for (const { body } of relay.sandbox.requests.filter(({ body }) => body.endsWith('&strict=1'))) t.match(body, /^data=%7B/)
  t.equal(relay.sandbox.requests.filter(({ body }) => body.endsWith('&strict=1')).length, 10)
  t.equal(arrived(relay).flat().length, 40)
})

t.test('after a 0 for an array only the refused events get 422, each with Mixpanel\'s reason', async t => {
  for (const env of [{}, { MIXPANEL_STRICT: '1' }, { MIXPANEL_ENDPOINT: 'import' }]) {
    const relay = await startRelay(t, { env })
    const refused = new Set(['bad-3', 'bad-77', 'bad-78', 'bad-150', 'bad-299'])
    // The sandbox refuses events that are too old, so these get a time long ago.
    const { toEvent } = relay.relay
    relay.relay.toEvent = one => {
      const event = toEvent(one)
      return refused.has(one.identified_id) ? { ...event, json: event.json.replace(/"time":\d+/, '"time":1') } : event
    }
    const answers = await Promise.all(Array.from({ length: 300 }, (_, index) => {
      const id = refused.has(`bad-${index}`) ? `bad-${index}` : `good-${index}`
      return relay.post(identity({ identified_id: id })).then(answer => ({ id, answer }))
    }))
    for (const { id, answer } of answers) {
      if (!refused.has(id)) t.equal(answer.statusCode, 200, id)
      else t.match(answer.json(), { status: 422, code: 'refused_by_mixpanel', detail: /time/ }, id)
    }
    const got = new Set(relay.sandbox.ledger.rows().map(row => row.properties.$identified_id))
    t.equal(got.size, 295)
    t.same([...refused].filter(id => got.has(id)), [], 'no refused event is stored')
    const { length } = relay.sandbox.requests
    t.ok(length <= 150, `${JSON.stringify(env)}: at most 150 requests, and there were ${length}`)
    if (env.MIXPANEL_STRICT) t.ok(length <= 20, `failed_records need no bisecting: at most 20 requests, and there were ${length}`)
  }
})

t.test('bisecting on a slow Mixpanel keeps the deadline and leaves the breaker closed', async t => {
  const relay = await startRelay(t, { env: { DEADLINE_MS: '1000', MIXPANEL_TIMEOUT_MS: '1000' } })
  const codes = async (count = 40) => new Set((await Promise.all(Array.from({ length: count }, () => relay.post(identity()))))
    .map(answer => answer.json().code))
  // The array is refused after 600 ms, which leaves 400 ms to bisect it.
  relay.sandbox.faults.add({ name: 'slow_zero', ms: 600, times: 10_000 })
  t.same(await codes(), new Set(['mixpanel_timed_out']))
  relay.sandbox.faults.clear()
  t.same(await codes(), new Set([undefined]), 'the breaker is closed')
  relay.sandbox.faults.add({ name: 'slow_zero', ms: 50, times: 10_000 })
  t.same(await codes(), new Set(['refused_by_mixpanel']))
  // Four hundred single events are many more than the slots: some get their reason, the last ones get no slot in time.
  relay.sandbox.faults.clear()
  relay.sandbox.faults.add({ name: 'slow_zero', ms: 220, times: 10_000 })
  t.same(await codes(400), new Set(['refused_by_mixpanel', 'mixpanel_timed_out']))
  t.ok(relay.logged().some(line => String(line.cause).startsWith('never sent')))
  relay.sandbox.faults.clear()
  await sleep(300)
  t.same(await codes(), new Set([undefined]))
})

t.test('failed_records are ignored unless Mixpanel imported the other events', async t => {
  const relay = await startRelay(t, { env: { MIXPANEL_STRICT: '1' } })
  relay.sandbox.faults.add({ name: 'names_one_takes_none' })
  const answers = await Promise.all(Array.from({ length: 10 }, () => relay.post(identity())))
  t.same(new Set(answers.map(answer => answer.statusCode)), new Set([200]))
  t.equal(relay.sandbox.ledger.rows().length, 10, 'all events were sent again and stored')
})

t.test('failed_records with an index outside the array are ignored', async t => {
  const config = readConfig({ MIXPANEL_TOKEN: 'x' }, () => '')
  for (const index of [7, -1]) {
    const sent: number[] = []
    const mixpanel = {
      encode: (events: unknown[]) => events,
      async send (events: unknown[]): Promise<Answer> {
        sent.push(events.length)
        return events.length === 3 ? { code: 'refused_by_mixpanel', taken: 'no', records: new Map([[index, 'bad']]), imported: 2 } : { code: 'accepted', taken: 'yes' }
      }
    } as unknown as Mixpanel
    const { deliver } = createDelivery(config, mixpanel, { debug () {}, info () {}, warn () {}, error () {} })
    const items = Array.from({ length: 3 }, () => ({ event: identifyEvent(identity(), 0), isStrict: false, deadline: performance.now() + 1000 }))
    t.match(await deliver(items), items.map(() => ({ code: 'accepted', sent: { attempts: 2, events: 3 } })))
    t.same(sent, [3, 1, 1, 1], 'each event was sent again by itself')
  }
})

t.test('an array that gets 413 is halved', async t => {
  const relay = await startRelay(t)
  relay.sandbox.faults.add({ name: 'too_large', times: 3 })
  const answers = await Promise.all(Array.from({ length: 40 }, () => relay.post(identity())))
  t.same(new Set(answers.map(answer => answer.statusCode)), new Set([200]))
  t.equal(new Set(arrived(relay).flat()).size, 40)
})

t.test('a failed array is retried with the same bytes', async t => {
  const relay = await startRelay(t)
  relay.sandbox.faults.add({ name: 'reset_after' })
  const answers = await Promise.all(Array.from({ length: 30 }, () => relay.post(identity())))
  t.same(new Set(answers.map(answer => answer.statusCode)), new Set([200]))
  const bodies = relay.sandbox.requests.map(({ body }) => body)
  t.equal(bodies.length, new Set(bodies).size + 1)
  t.equal(relay.sandbox.ledger.deduplicated().length, 30)
})

t.test('an identity is sent and logged although its caller has disconnected', async t => {
  const relay = await startRelay(t)
  const url = await relay.app.listen({ host: '127.0.0.1', port: 0 })
  relay.sandbox.faults.add({ name: 'wait', ms: 400, times: 99 })
  const send = (signal: AbortSignal | null) => fetch(`${url}/identify`, {
    method: 'POST', body: JSON.stringify(identity()), signal
  }).then(answer => answer.status, () => 'disconnected')
  const statuses = await Promise.all(Array.from({ length: 10 }, (_, index) => send(index % 2 ? AbortSignal.timeout(200) : null)))
  t.same(statuses, Array.from({ length: 10 }, (_, index) => index % 2 ? 'disconnected' : 200))
  while (relay.relay.state().in_flight > 0) await sleep(20)
  t.equal(arrived(relay).flat().length, 10, 'every identity was sent')
  await sleep(50)
  t.equal(relay.logged().filter(line => line.msg === 'request completed' && line.insert_id !== undefined).length, 10, 'every request was logged')
})

t.test('close waits for identities in flight', async t => {
  const relay = await startRelay(t)
  relay.sandbox.faults.add({ name: 'edge_down' })
  const verdict = relay.relay.identify(relay.relay.toEvent(identity()))
  await sleep(30)
  await relay.app.close()
  t.match(await verdict, { code: 'accepted', taken: 'yes' })
})

t.test('while Mixpanel hangs every identity is answered within DEADLINE_MS, and the breaker closes after recovery', async t => {
  const relay = await startRelay(t, { env: { MAX_IN_FLIGHT: '100', MIXPANEL_TIMEOUT_MS: '300', DEADLINE_MS: '1000', MAX_BATCH: '2' } })
  relay.sandbox.faults.add({ name: 'hang', times: 1000 })
  const answers = await Promise.all(Array.from({ length: 200 }, () => relay.post(identity())))
  const codes = answers.map(answer => answer.json().code)
  t.equal(codes.filter(code => code === 'overloaded').length, 100, 'MAX_IN_FLIGHT bounds the identities in flight')
  t.same(codes.filter(code => !['overloaded', 'mixpanel_timed_out', 'mixpanel_unavailable'].includes(code)), [])
  // One in between may be a probe.
  let refused = await relay.post(identity())
  if (refused.statusCode === 504) refused = await relay.post(identity())
  t.match(refused.json(), { status: 503, code: 'mixpanel_unavailable', retryable: true })
  t.match(refused.headers['retry-after'], /^\d+$/)
  t.match((await relay.inject({ url: '/readyz?verbose' })).json(), { status: 'ready', parts: { mixpanel: 'unavailable' } })
  const asked = relay.sandbox.requests.length
  const since = performance.now()
  await Promise.all(Array.from({ length: 50 }, () => relay.post(identity())))
  const halfSeconds = Math.ceil((performance.now() - since) / 500)
  t.ok(relay.sandbox.requests.length <= asked + halfSeconds, 'while the breaker is open Mixpanel gets at most one probe in half a second')
  relay.sandbox.faults.clear()
  let status = 0
  for (let tries = 0; status !== 200 && tries < 100; tries++) {
    await sleep(100)
    status = (await relay.post(identity())).statusCode
  }
  t.equal(status, 200)
  t.same(new Set((await Promise.all(Array.from({ length: 50 }, () => relay.post(identity())))).map(answer => answer.statusCode)), new Set([200]))
})

t.test('an identity that gets no slot in time is 504 and is never sent', async t => {
  const relay = await startRelay(t, { env: { DEADLINE_MS: '1500' } })
  relay.sandbox.faults.add({ name: 'wait', ms: 1400, times: 6 })
  const slow = Array.from({ length: 6 }, () => relay.post(identity(), { query: '?strict=1' }))
  const late = await Promise.all(Array.from({ length: 10 }, () => relay.post(identity())))
  for (const answer of late) t.match(answer.json(), { status: 504, code: 'mixpanel_timed_out', retryable: true })
  t.equal(relay.logged().filter(line => String(line.cause).startsWith('never sent')).length, 10)
  for (const answer of await Promise.all(slow)) t.equal(answer.statusCode, 200)
  t.equal(relay.sandbox.requests.length, 6)
})

t.test('an outage costs Mixpanel at most 1.2 requests an identity', async t => {
  const relay = await startRelay(t, { env: { MAX_BATCH: '1' } })
  relay.sandbox.faults.add({ name: 'edge_down', times: 10_000 })
  const started = Date.now()
  for (let round = 0; round < 20; round++) await Promise.all(Array.from({ length: 50 }, () => relay.post(identity())))
  const probes = 1 + Math.ceil(Math.log2((Date.now() - started) / 1000 + 1))
  const { length } = relay.sandbox.requests
  t.ok(length <= 1.2 * 1000 + probes, `1000 identities cause at most 1200 requests and the probes, and caused ${length}`)
})

t.test('an exception while encoding or sending rejects its own callers and leaves the breaker as it was', async t => {
  const config = readConfig({ MIXPANEL_TOKEN: 'x', MAX_BATCH: '1' }, () => '')
  const state = { bug: '' }
  const mixpanel = {
    encode (events: unknown[]) {
      if (state.bug === 'encode') throw new RangeError('Invalid string length')
      return events
    },
    async send (): Promise<Answer> {
      if (state.bug === 'send') throw new Error('a bug')
      return state.bug === 'down' ? { code: 'mixpanel_unreachable', taken: 'unknown', cause: 'status 503', isTransient: true } : { code: 'accepted', taken: 'yes' }
    }
  } as unknown as Mixpanel
  const { deliver, isOpen } = createDelivery(config, mixpanel, { debug () {}, info () {}, warn () {}, error () {} })
  const item = () => [{ event: identifyEvent(identity(), 0), isStrict: false, deadline: performance.now() + 60 }]
  // The breaker admits a probe after a second.
  const clock = { ahead: 0 }
  const now = performance.now.bind(performance)
  setPerformanceNow(t, () => now() + clock.ahead)
  for (const bug of ['encode', 'send']) {
    state.bug = 'down'
    for (let count = 0; count < 5; count++) await deliver(item())
    t.equal(isOpen(), true)
    clock.ahead += 1001
    state.bug = bug
    await t.rejects(deliver(item()), 'the probe rejects')
    state.bug = ''
    t.match(await deliver(item()), [{ code: 'accepted' }], `${bug}: the next probe is admitted`)
  }
})

t.test('the breaker opens after five failures, admits one probe at a time, and closes after a success', async t => {
  const restore = setPerformanceNow(t, () => now)
  let now = 0
  // The longest pauses.
  t.capture(Math, 'random', () => 0)
  const breaker = createBreaker()
  for (let failure = 0; failure < 5; failure++) {
    t.equal(breaker.isOpen(), false)
    t.equal(breaker.admits(), true)
    breaker.record(false)
  }
  for (const seconds of [1, 2, 4, 8, 16, 30, 30]) {
    t.equal(breaker.isOpen(), true)
    t.equal(breaker.admits(), false)
    t.equal(breaker.retryAfter(), seconds)
    now += seconds * 1000
    t.equal(breaker.admits(), true, `after ${seconds} s a probe is admitted`)
    t.equal(breaker.admits(), false, 'a second probe is not admitted')
    breaker.record(false)
  }
  now += 30_000
  t.equal(breaker.admits(), true)
  breaker.record(true)
  t.equal(breaker.isOpen(), false)
  t.equal(breaker.admits(), true)
  restore()
})

t.test('breakers that open at the same time probe at different times, after half a pause at the earliest', async t => {
  let now = 0
  const restore = setPerformanceNow(t, () => now)
  const breakers = Array.from({ length: 100 }, createBreaker)
  const probes = () => breakers.filter(breaker => breaker.admits()).length
  for (const breaker of breakers) for (let failure = 0; failure < 5; failure++) breaker.record(false)
  now = 500
  t.equal(probes(), 0)
  now = 750
  const first = probes()
  t.ok(first > 10 && first < 90, `after three quarters of a pause some have probed, and ${first} of 100 had`)
  now = 1000
  t.equal(probes(), 100 - first, 'after a whole pause all have probed')
  restore()
})
