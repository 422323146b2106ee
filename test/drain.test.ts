import { mock } from 'node:test'
import { t, type Test } from 'tap'
import { createBreaker } from '../src/mixpanel/breaker.ts'
import { readConfig } from '../src/config.ts'
import type { Delivery, OutgoingEvent } from '../src/mixpanel/delivery.ts'
import { identifyEvent, parseEvent } from '../src/identity/event.ts'
import { createForwarder } from '../src/relay/forwarder.ts'
import type { Entry, Outbox } from '../src/outbox/outbox.ts'
import { backoffMs } from '../src/relay/pauses.ts'
import { planRound, finalReason, createPass } from '../src/relay/plan.ts'
import { createQuarantine } from '../src/relay/quarantine.ts'
import type { Verdict } from '../src/identity/verdict.ts'
import { identity } from './helper.ts'

const down: Verdict = { code: 'mixpanel_unreachable', cause: 'status 503', isTransient: true }
const accepted: Verdict = { code: 'accepted' }

const userOf = (event: OutgoingEvent['event']) => parseEvent(event).properties.$identified_id

/** A drain on a clock of the test's own, between an outbox in memory and a Mixpanel that `answer` plays. */
function start (t: Test, count: number, answer: (items: OutgoingEvent[]) => Verdict[], env = {}, given: object[] = []) {
  mock.timers.enable({ apis: ['setTimeout', 'Date'], now: Date.now() })
  t.capture(performance, 'now', () => Date.now())
  t.teardown(() => mock.timers.reset())
  let entries: Entry[] = Array.from({ length: count }, (_, index) =>
    ({ id: String(index), event: identifyEvent(identity({ identified_id: `user-${index}`, ...given[index] }), Date.now()) }))
  let nextId = count
  const arrays: string[][] = []
  const said: string[] = []
  const store = { isBroken: false }
  const rounds: { at: number, arrays: number[] }[] = []
  const breaker = createBreaker()
  const asked: number[] = []
  const outbox = {
    async next (most: number, after = '-1') {
      if (store.isBroken) throw new Error('the disk is gone')
      const taken = entries.filter(({ id }) => Number(id) > Number(after)).slice(0, most)
      if (taken.length > 0) rounds.push({ at: Date.now(), arrays: [] })
      return taken
    },
    async ack (done: Entry[]) {
      if (store.isBroken) throw new Error('the disk is gone')
      entries = entries.filter(entry => !done.includes(entry))
    },
    async deadLetter (letters: { entry: Entry }[]) { entries = entries.filter(entry => !letters.some(letter => letter.entry === entry)) },
    counts: () => ({ waiting: entries.length, dead: 0 })
  } as unknown as Outbox
  const delivery = {
    async deliver (items: OutgoingEvent[]) {
      if (!breaker.admits()) return items.map(() => ({ code: 'mixpanel_unavailable', retryAfter: breaker.retryAfter() }))
      arrays.push(items.map(({ event }) => userOf(event)))
      asked.push(Date.now())
      rounds.at(-1)?.arrays.push(items.length)
      const verdicts = answer(items)
      breaker.record(!('isTransient' in verdicts[0]!))
      return verdicts
    },
    isOpen: breaker.isOpen
  } as unknown as Delivery
  const say = (what: object, message: string) => { said.push(message) }
  const drain = createForwarder(readConfig({ MIXPANEL_TOKEN: 'x', ...env }, () => ''), outbox, delivery, { debug () {}, info: say, warn: say, error: say })
  drain.start()
  const turn = async () => { for (let count = 0; count < 50; count++) await new Promise(resolve => setImmediate(resolve)) }
  return {
    drain,
    arrays,
    rounds,
    said,
    store,
    asked,
    breaker,
    waiting: () => entries.length,
    add () { entries.push({ id: String(nextId), event: identifyEvent(identity({ identified_id: `user-${nextId++}` }), Date.now()) }) },
    /** Lets the clock run on. */
    async pass (seconds: number) {
      await turn()
      for (let tenth = 0; tenth < seconds * 10; tenth++) {
        mock.timers.tick(100)
        await turn()
      }
    }
  }
}

t.test('full arrays, six at a time, oldest first', async t => {
  const { arrays, rounds, pass, waiting, drain } = start(t, 1000, items => items.map(() => accepted))
  await pass(0)
  t.equal(waiting(), 0)
  t.same(arrays.map(array => array.length), Array.from({ length: 20 }, () => 50))
  t.same(rounds.map(round => round.arrays.length), [6, 6, 6, 2])
  t.same(arrays.flat(), Array.from({ length: 1000 }, (_, index) => `user-${index}`))
  await drain.stop()
})

t.test('an outage: ever fewer probes, one every half minute at last, and nobody waits for long when it is over', async t => {
  const mixpanel = { isDown: true }
  const { asked, said, pass, waiting, drain } = start(t, 1000, items => items.map(() => mixpanel.isDown ? down : accepted))
  await pass(300)
  t.equal(waiting(), 1000)
  t.ok(asked.length < 30, `${asked.length} requests in five minutes`)
  const last = asked.slice(-5).map((at, index, list) => index === 0 ? 20_000 : at - list[index - 1]!)
  t.ok(last.every(ms => ms >= 2000 && ms <= 36_000), last.join())
  drain.added()
  const before = asked.length
  await pass(0)
  t.equal(asked.length, before, 'what is added to an outage changes nothing')
  mixpanel.isDown = false
  await pass(60)
  t.equal(waiting(), 0)
  t.same(said, ['outbox delivery paused', 'outbox delivery resumed'])
  await drain.stop()
})

t.test('an outage that callers find to be over is over at once', async t => {
  const mixpanel = { isDown: true }
  const { pass, waiting, drain, breaker } = start(t, 1000, items => items.map(() => mixpanel.isDown ? down : accepted))
  await pass(120)
  mixpanel.isDown = false
  for (let second = 0; second < 20; second++) {
    breaker.record(true)
    drain.recovered()
    await pass(1)
  }
  t.equal(waiting(), 0)
  await drain.stop()
})

t.test('429: not before Mixpanel says; while others are taken it tries again after five seconds', async t => {
  const { rounds, pass, drain } = start(t, 10, items => items.map(() => ({ code: 'mixpanel_rate_limited', cause: 'status 429', retryAfter: 30 })))
  await pass(29)
  t.equal(rounds.length, 1)
  await pass(2)
  t.equal(rounds.length, 2)
  await pass(3)
  drain.recovered()
  await pass(0)
  t.equal(rounds.length, 2)
  await pass(2)
  drain.recovered()
  await pass(0)
  t.equal(rounds.length, 3)
  await drain.stop()
})

t.test('those on which Mixpanel fails hold up nobody', async t => {
  const poisonous = new Set(['user-7', 'user-8', 'user-60', 'user-199'])
  const isPoison = ({ event }: OutgoingEvent) => poisonous.has(userOf(event))
  const { arrays, pass, waiting, drain } = start(t, 300, items => items.map(() => items.some(isPoison) ? down : accepted))
  await pass(0)
  t.equal(waiting(), 150, 'the other arrays are not touched by it')
  await pass(8)
  t.equal(waiting(), 4, 'those who were in one with them are sent alone')
  await pass(60)
  const count = (id: string) => arrays.filter(array => array.includes(id)).length
  t.ok(count('user-7') >= 3 && count('user-7') <= 6, 'and they ever more seldom')
  t.equal(count('user-0'), 2)
  await drain.stop()
})

t.test('one that fails for ever delays nobody who comes later', async t => {
  const { pass, waiting, drain, add, said } = start(t, 1, items => items.map(({ event }) => userOf(event) === 'user-0' ? down : accepted))
  await pass(60)
  for (let count = 0; count < 30; count++) {
    add()
    drain.added()
    await pass(1)
    t.equal(waiting(), 1)
  }
  t.same(said.slice(0, 1), ['outbox delivery paused'])
  await drain.stop()
})

t.test('one claim, many users: one at a time, in order, and nobody else waits for them; the same pair travels together', async t => {
  const anon = '5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11'
  const given = Array.from({ length: 900 }, (_, index) => index < 600
    ? { identified_id: `claimant-${Math.floor(index / 3)}`, anon_id: anon }
    : { identified_id: `user-${index}` })
  const isClaimant = ({ event }: OutgoingEvent) => userOf(event).startsWith('claimant')
  const { arrays, pass, waiting, drain } = start(t, 900, items => items.map(item => isClaimant(item) ? { code: 'refused_by_mixpanel' } : accepted), {}, given)
  await pass(5)
  t.equal(waiting(), 0)
  const order = arrays.map(array => array.filter(id => id.startsWith('claimant')))
  t.ok(order.every(ids => new Set(ids).size <= 1), 'never two of them in one array')
  t.same(order.flat(), given.slice(0, 600).map(one => one.identified_id))
  t.ok(arrays.findIndex(array => array.includes('user-899')) < 20, 'the last one is not behind them')
  await drain.stop()
})

t.test('one claim, many users: when the first is accepted the rest goes in full arrays', async t => {
  const given = Array.from({ length: 2000 }, (_, index) => ({ identified_id: `claimant-${index}`, anon_id: '5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11' }))
  const { arrays, pass, waiting, drain } = start(t, 2000, items => items.map(() => accepted), {}, given)
  await pass(0)
  t.equal(waiting(), 0)
  t.same(arrays[0], ['claimant-0'])
  t.ok(arrays.length < 2000 / 50 + 10, `${arrays.length} arrays`)
  t.equal(new Set(arrays.flat()).size, arrays.flat().length, 'nobody twice')
  await drain.stop()
})

t.test('who stays behind holds back whoever claims the same later', async t => {
  const claim = { anon_id: '5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11' }
  let isRefused = true
  const unasked: Verdict = { code: 'mixpanel_unavailable', retryAfter: 1 }
  const { arrays, pass, waiting, drain } = start(t, 100, items => items.map(({ event }) => {
    if (userOf(event) !== 'user-1' || !isRefused) return accepted
    isRefused = false
    return unasked
  }), { MAX_BATCH: '1' }, Array.from({ length: 100 }, (_, index) => index === 1 || index === 60 ? claim : {}))
  await pass(10)
  t.equal(waiting(), 0)
  const order = arrays.flat().filter(id => id === 'user-1' || id === 'user-60')
  t.same(order, ['user-1', 'user-1', 'user-60'])
  await drain.stop()
})

t.test('429 for one array: the others are settled, and nothing more is sent before Mixpanel says', async t => {
  const { arrays, pass, waiting, drain } = start(t, 1000, items => items.map(({ event }) =>
    userOf(event) === 'user-70' ? { code: 'mixpanel_rate_limited', cause: 'status 429', retryAfter: 30 } : accepted))
  await pass(29)
  t.equal(arrays.length, 6)
  t.equal(waiting(), 701)
  await drain.stop()
})

t.test('the store fails: it waits, says so, and sends nothing twice', async t => {
  const { arrays, pass, waiting, store, said, drain } = start(t, 100, items => {
    store.isBroken = true
    return items.map(() => accepted)
  })
  await pass(3)
  t.equal(waiting(), 100)
  store.isBroken = false
  await pass(2)
  t.equal(waiting(), 0)
  t.same(arrays.map(array => array.length), [50, 50])
  t.ok(said.includes('outbox delivery failed'))
  await drain.stop()
})

t.test('it stops in the middle of a round that does not end', async t => {
  const never = new Promise<Verdict[]>(() => {})
  const { pass, drain, waiting } = start(t, 10, () => never as unknown as Verdict[])
  await pass(1)
  const stopped = drain.stop()
  await pass(3)
  await stopped
  t.equal(waiting(), 10)
})

t.test('it stops while the store fails', async t => {
  const { pass, drain, store } = start(t, 10, items => {
    store.isBroken = true
    drain.stop()
    return items.map(() => accepted)
  })
  await pass(5)
  t.ok(store.isBroken)
})

t.test('MAX_BATCH=1 never merges; large events make small arrays; what is replayed goes by its own endpoint', async t => {
  const single = start(t, 20, items => items.map(() => accepted), { MAX_BATCH: '1' })
  await single.pass(0)
  t.same(single.rounds.map(({ arrays }) => arrays.length), [6, 6, 6, 2])
  await single.drain.stop()
  const none = createQuarantine()
  const entry = (text = '', more = {}): Entry => ({ id: '1', event: identifyEvent(identity({ properties: { text } }), 0), ...more })
  const large = Array.from({ length: 100 }, () => entry('x'.repeat(100_000)))
  const sizes = (entries: Entry[]) => planRound(entries, createPass(), none, readConfig({ MIXPANEL_TOKEN: 'x' }, () => '')).arrays.map(array => array.length)
  t.same(sizes(large), Array.from({ length: 6 }, () => 3))
  const mixed = [entry(), entry('', { endpoint: 'import' }), entry('', { endpoint: 'import' }), entry()]
  t.same(sizes(mixed), [1, 2, 1])
})

t.test('the backoff of Mixpanel\'s documentation', async t => {
  for (const [failures, least] of [[1, 2], [2, 4], [3, 8], [5, 32], [6, 60], [60, 60]] as const) {
    const ms = backoffMs(failures)
    t.ok(ms >= least * 1000 + 1000 && ms <= least * 1000 + 5000)
  }
})

t.test('a thousand suspects are remembered', async t => {
  const suspects = createQuarantine()
  for (let count = 0; count < 1500; count++) suspects.failed(`claim ${count}`)
  t.equal(suspects.has('claim 499'), false)
  t.equal(suspects.has('claim 500'), true)
  suspects.failed('claim 500')
  suspects.failed('claim 1500')
  t.equal(suspects.has('claim 501'), false, 'the one on which it failed the longest ago is forgotten')
  t.equal(suspects.isPaused('claim 500'), true)
  suspects.release()
  t.equal(suspects.isPaused('claim 500'), false)
  t.equal(suspects.has('claim 500'), true)
  suspects.settled('claim 500')
  t.equal(suspects.has('claim 500'), false)
})

t.test('why an entry will never be delivered', async t => {
  const entry: Entry = { id: '1', event: identifyEvent(identity(), 0) }
  t.equal(finalReason(entry, { code: 'refused_by_mixpanel' }), 'refused by Mixpanel, without a reason')
  t.equal(finalReason(entry, { code: 'mixpanel_rejected_credentials', cause: 'status 401' }), undefined, 'its operator will mend it')
})
