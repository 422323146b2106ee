import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { identity, startRelay } from './helper.ts'
import { createBatcher } from '../src/concurrency/batcher.ts'
import { createBreaker } from '../src/mixpanel/breaker.ts'
import { readConfig } from '../src/config.ts'
import { createDelivery } from '../src/mixpanel/delivery.ts'
import { identifyEvent } from '../src/identity/event.ts'
import type { Mixpanel } from '../src/mixpanel/client.ts'
import type { Verdict } from '../src/identity/verdict.ts'

type Relay = Awaited<ReturnType<typeof startRelay>>

/** The identified ids that Mixpanel got, a list for each request. */
const arrived = ({ sandbox }: Relay) => sandbox.requests.map(({ body }) => {
  const data = JSON.parse(new URLSearchParams(body).get('data') ?? '')
  return (Array.isArray(data) ? data : [data]).map(event => event.properties.$identified_id as string)
})

t.test('a thousand at once: every one 200, each at Mixpanel exactly once, in few requests', async t => {
  const relay = await startRelay(t)
  const identities = Array.from({ length: 1000 }, () => identity())
  const answers = await Promise.all(identities.map(one => relay.post(one)))
  t.same(new Set(answers.map(answer => answer.statusCode)), new Set([200]))
  const got = arrived(relay)
  t.same(got.flat().sort(), identities.map(one => one.identified_id).sort())
  t.ok(got.length <= 60, `${got.length} requests`)
  t.ok(got.every(batch => batch.length <= 50))
})

t.test('a lone identity travels at once, as an object', async t => {
  const relay = await startRelay(t)
  for (let count = 0; count < 3; count++) await relay.post(identity())
  t.same(arrived(relay).map(batch => batch.length), [1, 1, 1])
  t.match(relay.sandbox.requests[0]?.body, /^data=%7B/)
})

t.test('MAX_BATCH=1 never merges, strict=1 never shares', async t => {
  const single = await startRelay(t, { MAX_BATCH: '1' })
  await Promise.all(Array.from({ length: 100 }, () => single.post(identity())))
  t.equal(single.sandbox.requests.length, 100)
  const relay = await startRelay(t)
  await Promise.all(Array.from({ length: 40 }, (_, index) => relay.post(identity(), { query: index % 4 === 0 ? '?strict=1' : '' })))
  for (const { body } of relay.sandbox.requests.filter(({ body }) => body.endsWith('&strict=1'))) t.match(body, /^data=%7B/)
  t.equal(relay.sandbox.requests.filter(({ body }) => body.endsWith('&strict=1')).length, 10)
  t.equal(arrived(relay).flat().length, 40)
})

t.test('a 0 for many condemns only the guilty, each with Mixpanel\'s reason', async t => {
  for (const env of [{}, { MIXPANEL_STRICT: '1' }, { MIXPANEL_ENDPOINT: 'import' }]) {
    const relay = await startRelay(t, env)
    const guilty = new Set(['bad-3', 'bad-77', 'bad-78', 'bad-150', 'bad-299'])
    // The stand-in refuses by time; the clock is turned back when these are accepted.
    const accept = relay.relay.toEvent
    relay.relay.toEvent = one => {
      const event = accept(one)
      return guilty.has(one.identified_id) ? { ...event, json: event.json.replace(/"time":\d+/, '"time":1') } : event
    }
    const answers = await Promise.all(Array.from({ length: 300 }, (_, index) => {
      const id = guilty.has(`bad-${index}`) ? `bad-${index}` : `good-${index}`
      return relay.post(identity({ identified_id: id })).then(answer => ({ id, answer }))
    }))
    for (const { id, answer } of answers) {
      if (!guilty.has(id)) t.equal(answer.statusCode, 200, id)
      else t.match(answer.json(), { status: 422, code: 'refused_by_mixpanel', detail: /time/ }, id)
    }
    const got = new Set(relay.sandbox.ledger.rows().map(row => row.properties.$identified_id))
    t.equal(got.size, 295)
    t.same([...guilty].filter(id => got.has(id)), [])
    t.ok(relay.sandbox.requests.length <= 150, `${JSON.stringify(env)}: ${relay.sandbox.requests.length} requests`)
    if (env.MIXPANEL_STRICT) t.ok(relay.sandbox.requests.length <= 20, 'per-record answers need no search')
  }
})

t.test('a search on a slow Mixpanel neither condemns it nor overruns it', async t => {
  const relay = await startRelay(t, { DEADLINE_MS: '1000', MIXPANEL_TIMEOUT_MS: '1000' })
  const codes = async (count = 40) => new Set((await Promise.all(Array.from({ length: count }, () => relay.post(identity()))))
    .map(answer => answer.json().code))
  // The array is refused after 600 ms, and for the search 400 are left.
  relay.sandbox.faults.add({ name: 'slow_zero', ms: 600, times: 10_000 })
  t.same(await codes(), new Set(['mixpanel_timed_out']))
  relay.sandbox.faults.clear()
  t.same(await codes(), new Set([undefined]), 'the breaker is closed')
  relay.sandbox.faults.add({ name: 'slow_zero', ms: 50, times: 10_000 })
  t.same(await codes(), new Set(['refused_by_mixpanel']))
  // Four hundred who stand alone are many more than may be under way: some get their reason, the last ones no turn.
  relay.sandbox.faults.clear()
  relay.sandbox.faults.add({ name: 'slow_zero', ms: 220, times: 10_000 })
  t.same(await codes(400), new Set(['refused_by_mixpanel', 'mixpanel_timed_out']))
  t.ok(relay.logged().some(line => line.cause === 'never sent'))
  relay.sandbox.faults.clear()
  await sleep(300)
  t.same(await codes(), new Set([undefined]))
})

t.test('records are believed only if Mixpanel took the others', async t => {
  const relay = await startRelay(t, { MIXPANEL_STRICT: '1' })
  relay.sandbox.faults.add({ name: 'names_one_takes_none' })
  const answers = await Promise.all(Array.from({ length: 10 }, () => relay.post(identity())))
  t.same(new Set(answers.map(answer => answer.statusCode)), new Set([200]))
  t.equal(relay.sandbox.ledger.rows().length, 10, 'they were sent again, and taken')
})

t.test('413 for an array: it is halved', async t => {
  const relay = await startRelay(t)
  relay.sandbox.faults.add({ name: 'too_large', times: 3 })
  const answers = await Promise.all(Array.from({ length: 40 }, () => relay.post(identity())))
  t.same(new Set(answers.map(answer => answer.statusCode)), new Set([200]))
  t.equal(new Set(arrived(relay).flat()).size, 40)
})

t.test('one failure of a batch is healed by the very same bytes', async t => {
  const relay = await startRelay(t)
  relay.sandbox.faults.add({ name: 'reset_after' })
  const answers = await Promise.all(Array.from({ length: 30 }, () => relay.post(identity())))
  t.same(new Set(answers.map(answer => answer.statusCode)), new Set([200]))
  const bodies = relay.sandbox.requests.map(({ body }) => body)
  t.equal(bodies.length, new Set(bodies).size + 1)
  t.equal(relay.sandbox.ledger.deduplicated().length, 30)
})

t.test('a caller who goes away harms nobody, is sent, logged, and not waited for twice', async t => {
  const relay = await startRelay(t)
  const url = await relay.app.listen({ host: '127.0.0.1', port: 0 })
  relay.sandbox.faults.add({ name: 'wait', ms: 400, times: 99 })
  const send = (signal: AbortSignal | null) => fetch(`${url}/identify`, {
    method: 'POST', body: JSON.stringify(identity()), signal
  }).then(answer => answer.status, () => 'gone')
  const statuses = await Promise.all(Array.from({ length: 10 }, (_, index) => send(index % 2 ? AbortSignal.timeout(200) : null)))
  t.same(statuses, Array.from({ length: 10 }, (_, index) => index % 2 ? 'gone' : 200))
  await sleep(1000)
  t.equal(arrived(relay).flat().length, 10)
  t.equal(relay.logged().filter(line => line.msg === 'request completed' && line.insert_id !== undefined).length, 10)
  t.equal(relay.relay.state().in_flight, 0)
})

t.test('close waits for what is accepted, its caller gone or not', async t => {
  const relay = await startRelay(t)
  relay.sandbox.faults.add({ name: 'edge_down' })
  const verdict = relay.relay.identify(relay.relay.toEvent(identity()))
  await sleep(30)
  await relay.app.close()
  t.same(await verdict, { code: 'accepted' })
})

t.test('Mixpanel hangs: all are answered within their deadline, the rest at once, and it heals by itself', async t => {
  const relay = await startRelay(t, { MAX_IN_FLIGHT: '100', MIXPANEL_TIMEOUT_MS: '300', DEADLINE_MS: '1000', MAX_BATCH: '2' })
  relay.sandbox.faults.add({ name: 'hang', times: 1000 })
  const answers = await Promise.all(Array.from({ length: 200 }, () => relay.post(identity())))
  const codes = answers.map(answer => answer.json().code)
  t.equal(codes.filter(code => code === 'overloaded').length, 100)
  t.same(codes.filter(code => !['overloaded', 'mixpanel_timed_out', 'mixpanel_unavailable'].includes(code)), [])
  const refused = await relay.post(identity())
  t.match(refused.json(), { status: 503, code: 'mixpanel_unavailable', retryable: true })
  t.match(refused.headers['retry-after'], /^\d+$/)
  t.match((await relay.inject({ url: '/readyz?verbose' })).json(), { status: 'ready', parts: { mixpanel: 'unavailable' } })
  const asked = relay.sandbox.requests.length
  await Promise.all(Array.from({ length: 50 }, () => relay.post(identity())))
  t.ok(relay.sandbox.requests.length <= asked + 1, 'it is left alone but for probes')
  relay.sandbox.faults.clear()
  let status = 0
  for (let tries = 0; status !== 200 && tries < 100; tries++) {
    await sleep(100)
    status = (await relay.post(identity())).statusCode
  }
  t.equal(status, 200)
  t.same(new Set((await Promise.all(Array.from({ length: 50 }, () => relay.post(identity())))).map(answer => answer.statusCode)), new Set([200]))
})

t.test('who waits in vain for his turn is told by the deadline, and never sent', async t => {
  const relay = await startRelay(t, { DEADLINE_MS: '3000' })
  relay.sandbox.faults.add({ name: 'wait', ms: 2800, times: 6 })
  const slow = Array.from({ length: 6 }, () => relay.post(identity(), { query: '?strict=1' }))
  const late = await Promise.all(Array.from({ length: 10 }, () => relay.post(identity())))
  for (const answer of late) t.match(answer.json(), { status: 504, code: 'mixpanel_timed_out', retryable: true })
  t.equal(relay.logged().filter(line => line.cause === 'never sent').length, 10)
  for (const answer of await Promise.all(slow)) t.equal(answer.statusCode, 200)
  t.equal(relay.sandbox.requests.length, 6)
})

t.test('an outage costs Mixpanel little', async t => {
  const relay = await startRelay(t, { MAX_BATCH: '1' })
  relay.sandbox.faults.add({ name: 'edge_down', times: 10_000 })
  const started = Date.now()
  for (let round = 0; round < 20; round++) await Promise.all(Array.from({ length: 50 }, () => relay.post(identity())))
  const probes = 1 + Math.ceil(Math.log2((Date.now() - started) / 1000 + 1))
  t.ok(relay.sandbox.requests.length <= 1.2 * 1000 + probes, `${relay.sandbox.requests.length} requests for 1000 callers`)
})

t.test('/identify/batch: a verdict for each', async t => {
  const relay = await startRelay(t)
  const batch = (identities: unknown, type = 'application/json') => relay.inject({
    method: 'POST', url: '/identify/batch', payload: JSON.stringify({ identities }), headers: { 'content-type': type }
  })
  const good = await batch(Array.from({ length: 2000 }, () => identity()))
  t.equal(good.statusCode, 200)
  t.same(good.json().results[1999], { index: 1999, status: 'accepted' })
  t.equal(good.json().results.length, 2000)
  t.equal(relay.sandbox.ledger.rows().length, 2000)
  t.ok(relay.sandbox.requests.length <= 60)

  relay.sandbox.requests.length = 0
  const mixed = await batch([identity(), identity({ identified_id: 'null', token: 'x' }), 7, identity({ anon_id: undefined }), identity()])
  t.equal(mixed.statusCode, 207)
  t.match(mixed.json().results, [
    { index: 0, status: 'accepted' },
    { index: 1, status: 'failed', problem: { status: 400, code: 'invalid_request', errors: [{ pointer: '/token' }, { pointer: '/identified_id' }] } },
    { index: 2, status: 'failed', problem: { code: 'invalid_request', errors: [{ pointer: '', detail: 'must be object' }] } },
    { index: 3, status: 'failed', problem: { code: 'invalid_request', retryable: false, errors: [{ pointer: '/anon_id', detail: 'is required' }] } },
    { index: 4, status: 'accepted' }
  ])
  t.equal(arrived(relay).flat().length, 2, 'invalid ones are not sent')
  relay.sandbox.faults.add({ name: 'rate_limited', retry_after: '7' })
  const limited = await batch([identity()])
  t.match(limited.json().results[0].problem, { status: 503, code: 'mixpanel_rate_limited', retryable: true })
  t.equal(limited.headers['retry-after'], '7')
  const sent = relay.sandbox.requests.length
  for (const query of ['?dry_run=1', '?strict=1', '?x=1']) {
    const answer = await relay.inject({ method: 'POST', url: `/identify/batch${query}`, payload: { identities: [identity()] } })
    t.match(answer.json(), { status: 400, errors: [{ pointer: '', detail: /query parameter \w+ is not a known field/ }] })
  }
  t.equal(relay.sandbox.requests.length, sent, 'a merge cannot be undone: what is not understood is not sent')
  t.match((await relay.inject({ method: 'POST', url: '/identify/batch', payload: { identities: [], x: 1 } })).json().errors,
    [{ pointer: '/x' }, { pointer: '/identities' }])

  for (const [body, pointer] of [[[], '/identities'], [Array(2001).fill(identity()), '/identities'], ['x', '/identities'], [undefined, '/identities']] as const) {
    t.match((await batch(body)).json(), { status: 400, code: 'invalid_request', errors: [{ pointer }] })
  }
  t.match((await relay.inject({ method: 'POST', url: '/identify/batch', payload: { identities: [identity()], more: 1 } })).json(), { errors: [{ pointer: '/more' }] })
  t.equal((await batch([identity()], 'text/plain')).statusCode, 200)
  t.equal((await batch([identity({ properties: { a: 'x'.repeat(4_200_000) } })])).statusCode, 413)
  t.match(relay.logged().find(line => line.route === '/identify/batch' && line.status === 207), { identities: 5, failed: 3 })
  const small = await startRelay(t, { MAX_IN_FLIGHT: '3' })
  const over = (await small.inject({ method: 'POST', url: '/identify/batch', payload: { identities: Array.from({ length: 5 }, () => identity()) } })).json()
  t.same(over.results.map((result: { problem?: { code: string } }) => result.problem?.code ?? 'accepted'), ['accepted', 'accepted', 'accepted', 'overloaded', 'overloaded'])
})

t.test('the batcher: order, bounds, lateness, a send that throws', async t => {
  const sent: number[][] = []
  const batcher = createBatcher<number, string>({
    send: async items => {
      sent.push(items)
      await sleep(30)
      if (items.includes(13)) throw new Error('a bug')
      return items.map(item => `result ${item}`)
    },
    maxBatch: 3,
    freeSends: 1,
    maxSends: 1,
    maxItems: 8,
    late: { afterMs: 50, result: 'late' },
    isAlone: item => item >= 100
  })
  await batcher.idle()
  const results = [1, 2, 100, 3, 4, 5, 6, 7].map(item => batcher.add(item))
  t.equal(batcher.add(8), undefined, 'a ninth does not fit')
  t.equal(batcher.inFlight(), 8)
  await sleep(10)
  t.equal(batcher.add(9), undefined, 'nor while it sends')
  t.same(await Promise.all(results), ['result 1', 'result 2', 'result 100', 'late', 'late', 'late', 'late', 'late'])
  t.same(sent, [[1, 2], [100]])
  const bug = [batcher.add(13), batcher.add(14)]
  const idle = batcher.idle()
  await sleep(10)
  const later = batcher.add(15)
  for (const result of bug) await t.rejects(result as Promise<string>, { message: 'a bug' })
  await idle
  t.equal(await later, 'result 15')
  t.equal(batcher.inFlight(), 0)
})

t.test('the batcher: bytes', async t => {
  const sent: number[][] = []
  const batcher = createBatcher<number, number>({
    send: async items => {
      sent.push(items)
      await sleep(20)
      return items
    },
    maxBatch: 100,
    bytesOf: item => item,
    maxBytes: 10,
    freeSends: 1,
    late: { afterMs: 1000, result: -1 }
  })
  const items = [4, 4, 4, 10, 30, 1, 9, 1]
  t.same(await Promise.all(items.map(item => batcher.add(item))), items)
  t.same(sent, [[4, 4], [4], [10], [30], [1, 9], [1]])
  await batcher.add(5)
  t.same(sent.at(-1), [5], 'nothing is left in the count')
})

t.test('what is thrown while encoding or sending reaches its own callers, and leaves the breaker as it was', async t => {
  const config = readConfig({ MIXPANEL_TOKEN: 'x', MAX_BATCH: '1' }, () => '')
  const state = { bug: '' }
  const mixpanel = {
    encode (events: unknown[]) {
      if (state.bug === 'encode') throw new RangeError('Invalid string length')
      return events
    },
    async send (): Promise<Verdict> {
      if (state.bug === 'send') throw new Error('a bug')
      return state.bug === 'down' ? { code: 'mixpanel_unreachable', cause: 'status 503', isTransient: true } : { code: 'accepted' }
    }
  } as unknown as Mixpanel
  const { deliver, isOpen } = createDelivery(config, mixpanel, { debug () {}, info () {}, warn () {}, error () {} })
  const item = () => [{ event: identifyEvent(identity(), 0), isStrict: false, deadline: performance.now() + 60 }]
  for (const bug of ['encode', 'send']) {
    state.bug = 'down'
    for (let count = 0; count < 5; count++) await deliver(item())
    t.equal(isOpen(), true)
    await sleep(1050)
    state.bug = bug
    await t.rejects(deliver(item()), 'the probe')
    state.bug = ''
    t.same(await deliver(item()), [{ code: 'accepted' }], `${bug}: another may probe`)
  }
})

t.test('names beyond count are refused at once, and hold up nobody', async t => {
  const { inject, sandbox } = await startRelay(t)
  const many = (count: number, prefix: string) => Object.fromEntries(Array.from({ length: count }, (_, index) => [`${prefix}${index}`, 1]))
  const answer = await inject({
    method: 'POST',
    url: '/identify/batch',
    payload: { identities: [identity(many(90, 'x')), identity(many(99, 'x')), identity({ properties: many(5000, 'mp_') }), identity({ properties: many(200, 'x') }), identity({ properties: [] }), identity({ properties: null })] }
  })
  t.equal(answer.statusCode, 207)
  const results: { status: string, problem?: { code: string, errors: { pointer: string, detail: string }[] } }[] = answer.json().results
  t.equal(results[0]?.problem?.errors.length, 90, 'each of a hundred is named')
  t.same(results[1]?.problem?.errors, [{ pointer: '', detail: 'must not have more than 100 fields' }])
  t.same(results[2]?.problem?.errors, [{ pointer: '/properties', detail: 'must not have more than 200 properties' }])
  t.same(results[3], { index: 3, status: 'accepted' })
  t.same(results[4]?.problem?.errors, [{ pointer: '/properties', detail: 'must be object' }])
  t.same(results[5]?.problem?.errors, [{ pointer: '/properties', detail: 'must be object' }])
  t.equal(sandbox.requests.length, 1)
  for (const [count, detail] of [[200, 'must not have more than 100 fields'], [10_000, 'must not have other fields than identities']] as const) {
    const wide = await inject({ method: 'POST', url: '/identify/batch', payload: { identities: [identity()], ...many(count, 'x') } })
    t.match(wide.json(), { status: 400, errors: [{ pointer: '', detail }] })
  }
})

t.test('records that are not in the array condemn nobody, and acquit nobody', async t => {
  const config = readConfig({ MIXPANEL_TOKEN: 'x' }, () => '')
  for (const index of [7, -1]) {
    const sent: number[] = []
    const mixpanel = {
      encode: (events: unknown[]) => events,
      async send (events: unknown[]): Promise<Verdict> {
        sent.push(events.length)
        return events.length === 3 ? { code: 'refused_by_mixpanel', records: new Map([[index, 'bad']]), imported: 2 } : { code: 'accepted' }
      }
    } as unknown as Mixpanel
    const { deliver } = createDelivery(config, mixpanel, { debug () {}, info () {}, warn () {}, error () {} })
    const items = Array.from({ length: 3 }, () => ({ event: identifyEvent(identity(), 0), isStrict: false, deadline: performance.now() + 1000 }))
    t.same(await deliver(items), items.map(() => ({ code: 'accepted' })))
    t.same(sent, [3, 1, 1, 1], 'each of them was asked for')
  }
})

t.test('the breaker: five failures open it, probes go one at a time, a success closes it', async t => {
  const clock = t.capture(performance, 'now', () => now)
  let now = 0
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
    t.equal(breaker.admits(), true, 'a probe')
    t.equal(breaker.admits(), false, 'only one')
    breaker.record(false)
  }
  now += 30_000
  t.equal(breaker.admits(), true)
  breaker.record(true)
  t.equal(breaker.isOpen(), false)
  t.equal(breaker.admits(), true)
  clock.restore()
})
