import { mock } from 'node:test'
import { t, type Test } from 'tap'
import { createBreaker } from '#src/mixpanel/breaker.js'
import { readConfig } from '#src/config.js'
import type { Delivery, OutgoingEvent } from '#src/mixpanel/delivery.js'
import { identifyEvent } from '#src/identity/event.js'
import { createForwarder } from '#src/relay/forwarder.js'
import type { Entry, Outbox } from '#src/outbox/outbox.js'
import { backoffMs, createPauses } from '#src/relay/pauses.js'
import { planRound, finalReason, createPass, isTooLong } from '#src/relay/plan.js'
import { createSuspects } from '#src/relay/suspects.js'
import type { Verdict } from '#src/identity/verdict.js'
import { identity, setPerformanceNow } from './helper.ts'

const down: Verdict = { code: 'mixpanel_unreachable', taken: 'unknown', cause: 'status 503' }
const accepted: Verdict = { code: 'accepted', taken: 'yes' }

const userOf = (event: OutgoingEvent['event']) => event.userId

/** A forwarder on a mocked clock, between an outbox in memory and a Mixpanel that is played by `answer`. */
function start (t: Test, count: number, answer: (items: OutgoingEvent[]) => Verdict[], env = {}, given: object[] = []) {
  mock.timers.enable({ apis: ['setTimeout', 'Date'], now: Date.now() })
  setPerformanceNow(t, () => Date.now())
  t.teardown(() => mock.timers.reset())
  let entries: Entry[] = Array.from({ length: count }, (_, index) =>
    ({ id: String(index), event: identifyEvent(identity({ identified_id: `user-${index}`, ...given[index] }), Date.now()) }))
  let nextId = count
  const arrays: string[][] = []
  const logged: string[] = []
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
    counts: () => ({ waiting: entries.length, dead: 0, bytes: 0, paused: false })
  } as unknown as Outbox
  const delivery = {
    async deliver (items: OutgoingEvent[]) {
      if (!breaker.admits()) return items.map(() => ({ code: 'mixpanel_unavailable', taken: 'no', retryAfter: breaker.retryAfter() }))
      arrays.push(items.map(({ event }) => userOf(event)))
      asked.push(Date.now())
      rounds.at(-1)?.arrays.push(items.length)
      const verdicts = answer(items)
      breaker.record(verdicts[0]!.taken !== 'unknown')
      return verdicts
    },
    isOpen: breaker.isOpen
  } as unknown as Delivery
  const log = (what: object, message: string) => { logged.push(message) }
  const forwarder = createForwarder(readConfig({ MIXPANEL_TOKEN: 'x', ...env }, () => ''), outbox, delivery, { debug () {}, info: log, warn: log, error: log })
  forwarder.start()
  const turn = async () => { for (let count = 0; count < 50; count++) await new Promise(resolve => setImmediate(resolve)) }
  return {
    forwarder,
    arrays,
    rounds,
    logged,
    store,
    asked,
    breaker,
    pending: () => entries.length,
    add () { entries.push({ id: String(nextId), event: identifyEvent(identity({ identified_id: `user-${nextId++}` }), Date.now()) }) },
    /** Moves the clock by `seconds`, in steps of `step` seconds. */
    async pass (seconds: number, step = 0.1) {
      await turn()
      for (let passed = 0; passed < seconds - step / 2; passed += step) {
        mock.timers.tick(step * 1000)
        await turn()
      }
    }
  }
}

t.test('the forwarder sends full arrays, six at a time, oldest first', async t => {
  const { arrays, rounds, pass, pending, forwarder } = start(t, 1000, items => items.map(() => accepted))
  await pass(0)
  t.equal(pending(), 0)
  t.same(arrays.map(array => array.length), Array.from({ length: 20 }, () => 50))
  t.same(rounds.map(round => round.arrays.length), [6, 6, 6, 2])
  t.same(arrays.flat(), Array.from({ length: 1000 }, (_, index) => `user-${index}`))
  await forwarder.stop()
})

t.test('in an outage the forwarder probes less and less often, and delivers everything soon after', async t => {
  const mixpanel = { isDown: true }
  const { asked, logged, pass, pending, forwarder } = start(t, 1000, items => items.map(() => mixpanel.isDown ? down : accepted))
  await pass(300, 1)
  t.equal(pending(), 1000)
  t.ok(asked.length < 30, `in five minutes there are fewer than 30 requests, and there were ${asked.length}`)
  const last = asked.slice(-5).map((at, index, list) => index === 0 ? 20_000 : at - list[index - 1]!)
  t.ok(last.every(ms => ms >= 2000 && ms <= 36_000), `the last pauses are at most half a minute, and were ${last.join()} ms`)
  forwarder.added()
  const before = asked.length
  await pass(0)
  t.equal(asked.length, before, 'a new event does not end the pause')
  mixpanel.isDown = false
  await pass(60, 0.5)
  t.equal(pending(), 0)
  t.same(logged, ['outbox delivery paused', 'outbox delivery resumed'])
  await forwarder.stop()
})

t.test('a success of a caller ends the pause of the forwarder', async t => {
  const mixpanel = { isDown: true }
  const { pass, pending, forwarder, breaker } = start(t, 1000, items => items.map(() => mixpanel.isDown ? down : accepted))
  await pass(120, 1)
  mixpanel.isDown = false
  for (let second = 0; second < 20; second++) {
    breaker.record(true)
    forwarder.recovered()
    await pass(1)
  }
  t.equal(pending(), 0)
  await forwarder.stop()
})

t.test('after a 429 the forwarder waits for Retry-After, or five seconds while others are accepted', async t => {
  // The shortest wait.
  t.capture(Math, 'random', () => 0)
  const { rounds, pass, forwarder } = start(t, 10, items => items.map(() => ({ code: 'mixpanel_rate_limited', taken: 'no', cause: 'status 429', retryAfter: 30 })))
  await pass(29, 0.5)
  t.equal(rounds.length, 1)
  await pass(2)
  t.equal(rounds.length, 2)
  await pass(3)
  forwarder.recovered()
  await pass(0)
  t.equal(rounds.length, 2)
  await pass(2)
  forwarder.recovered()
  await pass(0)
  t.equal(rounds.length, 3)
  await forwarder.stop()
})

t.test('after a 429 for one array the other arrays are settled, and no more are sent before Retry-After', async t => {
  const { arrays, pass, pending, forwarder } = start(t, 1000, items => items.map(({ event }) =>
    userOf(event) === 'user-70' ? { code: 'mixpanel_rate_limited', taken: 'no', cause: 'status 429', retryAfter: 30 } : accepted))
  await pass(29, 0.5)
  t.equal(arrays.length, 6)
  t.equal(pending(), 701)
  await forwarder.stop()
})

t.test('an event on which Mixpanel fails does not delay the others of its array', async t => {
  const failing = new Set(['user-7', 'user-8', 'user-60', 'user-199'])
  const fails = ({ event }: OutgoingEvent) => failing.has(userOf(event))
  const { arrays, pass, pending, forwarder } = start(t, 300, items => items.map(() => items.some(fails) ? down : accepted))
  await pass(0)
  t.equal(pending(), 4, 'the arrays that failed are divided until only failing events are left')
  t.ok(arrays.length < 60, `there are fewer than 60 requests, and there were ${arrays.length}`)
  await pass(68, 0.5)
  const count = (id: string) => arrays.filter(array => array.includes(id)).length
  t.ok(count('user-7') >= 9 && count('user-7') <= 13, `a failing event is tried less and less often, and was ${count('user-7')} times`)
  t.ok(count('user-0') <= 5, `${count('user-0')} requests carried a good event beside it`)
  await forwarder.stop()
})

t.test('an event that always fails does not delay later ones', async t => {
  const { pass, pending, forwarder, add, logged } = start(t, 1, items => items.map(({ event }) => userOf(event) === 'user-0' ? down : accepted))
  await pass(60, 0.5)
  for (let count = 0; count < 30; count++) {
    add()
    forwarder.added()
    await pass(1)
    t.equal(pending(), 1)
  }
  t.same(logged.slice(0, 1), ['outbox delivery paused'])
  await forwarder.stop()
})

t.test('events of one anonymous id are sent one at a time and in order, without delaying others', async t => {
  const anon = '5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11'
  const given = Array.from({ length: 900 }, (_, index) => index < 600
    ? { identified_id: `rival-${Math.floor(index / 3)}`, anon_id: anon }
    : { identified_id: `user-${index}` })
  const isRival = ({ event }: OutgoingEvent) => userOf(event).startsWith('rival')
  const { arrays, pass, pending, forwarder } = start(t, 900, items => items.map(item => isRival(item) ? { code: 'refused_by_mixpanel', taken: 'no' } : accepted), {}, given)
  await pass(5)
  t.equal(pending(), 0)
  const order = arrays.map(array => array.filter(id => id.startsWith('rival')))
  t.ok(order.every(ids => new Set(ids).size <= 1), 'no array has two of them')
  t.same(order.flat(), given.slice(0, 600).map(one => one.identified_id))
  t.ok(arrays.findIndex(array => array.includes('user-899')) < 20, 'other events do not wait for them')
  await forwarder.stop()
})

t.test('once an event of an anonymous id is accepted, the others of that id are sent in full arrays', async t => {
  const given = Array.from({ length: 2000 }, (_, index) => ({ identified_id: `rival-${index}`, anon_id: '5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11' }))
  const { arrays, pass, pending, forwarder } = start(t, 2000, items => items.map(() => accepted), {}, given)
  await pass(0)
  t.equal(pending(), 0)
  t.same(arrays[0], ['rival-0'])
  t.ok(arrays.length < 2000 / 50 + 10, `there are fewer than 50 arrays, and there were ${arrays.length}`)
  t.equal(new Set(arrays.flat()).size, arrays.flat().length, 'no event is sent twice')
  await forwarder.stop()
})

t.test('a deferred event holds back later events of its anonymous id', async t => {
  const sameAnonId = { anon_id: '5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11' }
  let isRefused = true
  const notAsked: Verdict = { code: 'mixpanel_unavailable', taken: 'no', retryAfter: 1 }
  const { arrays, pass, pending, forwarder } = start(t, 100, items => items.map(({ event }) => {
    if (userOf(event) !== 'user-1' || !isRefused) return accepted
    isRefused = false
    return notAsked
  }), { MAX_BATCH: '1' }, Array.from({ length: 100 }, (_, index) => index === 1 || index === 60 ? sameAnonId : {}))
  await pass(10)
  t.equal(pending(), 0)
  const order = arrays.flat().filter(id => id === 'user-1' || id === 'user-60')
  t.same(order, ['user-1', 'user-1', 'user-60'])
  await forwarder.stop()
})

t.test('while the outbox fails the forwarder waits, logs, and sends nothing twice', async t => {
  const { arrays, pass, pending, store, logged, forwarder } = start(t, 100, items => {
    store.isBroken = true
    return items.map(() => accepted)
  })
  await pass(3)
  t.equal(pending(), 100)
  store.isBroken = false
  await pass(2)
  t.equal(pending(), 0)
  t.same(arrays.map(array => array.length), [50, 50])
  t.ok(logged.includes('outbox delivery failed'), 'the failure is logged')
  await forwarder.stop()
})

t.test('the forwarder stops in the middle of a round that does not end', async t => {
  const never = new Promise<Verdict[]>(() => {})
  const { pass, forwarder, pending } = start(t, 10, () => never as unknown as Verdict[])
  await pass(1)
  const stopped = forwarder.stop()
  await pass(3)
  await stopped
  t.equal(pending(), 10)
})

t.test('the forwarder stops while the outbox fails', async t => {
  const { pass, forwarder, store } = start(t, 10, items => {
    store.isBroken = true
    forwarder.stop()
    return items.map(() => accepted)
  })
  await pass(5)
  t.ok(store.isBroken)
})

t.test('arrays respect MAX_BATCH, 1 MiB, and the endpoint of a replay', async t => {
  const single = start(t, 20, items => items.map(() => accepted), { MAX_BATCH: '1' })
  await single.pass(0)
  t.same(single.rounds.map(({ arrays }) => arrays.length), [6, 6, 6, 2])
  await single.forwarder.stop()
  const none = createSuspects()
  const entry = (text = '', more = {}): Entry => ({ id: '1', event: identifyEvent(identity({ properties: { text } }), 0), ...more })
  const large = Array.from({ length: 100 }, () => entry('x'.repeat(100_000)))
  const sizes = (entries: Entry[]) => planRound(entries, createPass(), none, readConfig({ MIXPANEL_TOKEN: 'x' }, () => '')).arrays.map(array => array.length)
  t.same(sizes(large), Array.from({ length: 6 }, () => 3))
  const mixed = [entry(), entry('', { endpoint: 'import' }), entry('', { endpoint: 'import' }), entry()]
  t.same(sizes(mixed), [1, 2, 1])
})

t.test('an accepted event ends a backoff after 5 to 10 s, at random', async t => {
  const clock = { now: 0, random: 0 }
  const restore = setPerformanceNow(t, () => clock.now)
  t.capture(Math, 'random', () => clock.random)
  const { backoff, recovered } = createPauses()
  for (const [random, ms] of [[0, 5000], [0.5, 7500], [0.9, 9500]] as const) {
    clock.random = random
    let isOver = false
    const pause = backoff(60_000).then(() => { isOver = true })
    clock.now += ms - 1
    recovered()
    await Promise.resolve()
    t.equal(isOver, false, `it does not end before ${ms} ms`)
    clock.now++
    recovered()
    await pause
  }
  restore()
})

t.test('the backoff is that of Mixpanel\'s documentation', async t => {
  for (const [failures, least] of [[1, 2], [2, 4], [3, 8], [5, 32], [6, 60], [60, 60]] as const) {
    const ms = backoffMs(failures)
    t.ok(ms >= least * 1000 + 1000 && ms <= least * 1000 + 5000, `${failures} failures: ${least} s and 1 to 5 s of jitter`)
  }
})

t.test('of an array that failed each entry travels in one of half the size, and alone with a backoff of its own', async t => {
  const suspects = createSuspects()
  suspects.failed(['a', 'b', 'c', 'd', 'e'])
  t.equal(suspects.limit('z'), 3, 'while nothing is accepted all arrays become smaller')
  suspects.accepted()
  t.equal(suspects.limit('a'), Infinity)
  suspects.failed(['a', 'b', 'c', 'd', 'e'])
  t.same(['a', 'e', 'z'].map(suspects.limit), [3, 3, Infinity])
  suspects.failed(['a', 'b'])
  t.same(['a', 'b', 'c'].map(suspects.limit), [1, 1, 3])
  t.equal(suspects.isCulprit('a'), false)
  suspects.failed(['a'])
  t.ok(suspects.isCulprit('a') && suspects.isPaused('a'))
  suspects.failed(['b'])
  suspects.failed(['b'])
  suspects.release()
  t.same(['a', 'b'].map(suspects.isCulprit), [false, true], 'what failed once may have failed because of an outage')
  t.equal(suspects.isPaused('b'), false)
  suspects.settled('b')
  t.equal(suspects.isCulprit('b'), false)
})

t.test('a pass remembers a hundred thousand anonymous ids; with more a new one begins', async t => {
  const pass = createPass()
  for (let count = 0; count < 100_000; count++) pass.deferred.add(String(count))
  t.equal(isTooLong(pass), false)
  pass.decided.add('one more')
  t.equal(isTooLong(pass), true)
})

t.test('ten thousand suspects are remembered', async t => {
  const suspects = createSuspects()
  suspects.accepted()
  for (let count = 0; count < 10_500; count++) suspects.failed([`key ${count}`])
  t.same(['key 499', 'key 500'].map(suspects.isCulprit), [false, true])
  suspects.failed(['key 500'])
  suspects.failed(['a new key'])
  t.same(['key 500', 'key 501'].map(suspects.isCulprit), [true, false], 'the key that failed the longest ago is forgotten')
})

t.test('a final verdict has a reason for the dead letter', async t => {
  const entry: Entry = { id: '1', event: identifyEvent(identity(), 0) }
  t.equal(finalReason(entry, { code: 'refused_by_mixpanel', taken: 'no' })?.reason, 'refused by Mixpanel, without a reason')
  t.equal(finalReason(entry, { code: 'mixpanel_rejected_credentials', taken: 'no', cause: 'status 401' }), undefined, 'the operator can correct the credentials, so the event is kept')
})
