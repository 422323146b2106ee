import { randomUUID } from 'node:crypto'
import { t } from 'tap'
import { identifyEvent, type PendingEvent } from '#src/identity/event.js'
import type { Verdict } from '#src/identity/verdict.js'
import { createMergeGuard, type MergeGuard } from '#src/relay/merge-guard.js'
import { identity, setPerformanceNow, silent, startRelay, startRelayWithOutbox } from './helper.ts'

const ACCEPTED: Verdict = { code: 'accepted', taken: 'yes' }
const REFUSED: Verdict = { code: 'refused_by_mixpanel', taken: 'no' }
const UNKNOWN: Verdict = { code: 'mixpanel_timed_out', taken: 'unknown' }
const event = (user: string, anon = randomUUID() as string): PendingEvent => identifyEvent({ identified_id: user, anon_id: anon }, Date.now())
const guardOf = (settings: object, log = silent, maxPairs?: number) => createMergeGuard({
  MERGE_GUARD_WINDOW_MS: 1000, MERGE_GUARD: 'refuse', ...settings
} as Parameters<typeof createMergeGuard>[0], log, { maxPairs }) as NonNullable<MergeGuard>
const code = async (guard: NonNullable<MergeGuard>, one: PendingEvent, verdict = ACCEPTED) => (await guard.run(one, async () => verdict)).code

t.test('without bounds there is no guard', async t => {
  t.equal(guardOf({}), undefined)
})

t.test('the literal user_id bug and the shared kiosk are 409 before they do harm', async t => {
  const { post, sandbox, logged } = await startRelay(t, { env: { MAX_ANON_PER_USER: '3', MAX_USERS_PER_ANON: '2' } })
  const claim = async (user: string, anon: string = randomUUID()) => (await post({ identified_id: user, anon_id: anon })).statusCode
  t.same([await claim('user_id'), await claim('user_id'), await claim('user_id'), await claim('user_id')], [200, 200, 200, 409])
  const kiosk = randomUUID()
  t.same([await claim('a', kiosk), await claim('b', `$device:${kiosk.toUpperCase()}`), await claim('c', kiosk)], [200, 200, 409], 'the spelling of an anonymous id makes no difference')
  t.same([await claim('a', kiosk), await claim('b', kiosk)], [200, 200], 'a repeat of a known pair is not suspicious')
  const refused = await post({ identified_id: 'user_id', anon_id: randomUUID() })
  t.match(refused.json(), { status: 409, code: 'suspicious_identity', retryable: false, detail: /MAX_ANON_PER_USER/ })
  t.match((await post({ identified_id: 'd', anon_id: kiosk })).json(), { detail: /MAX_USERS_PER_ANON/ })
  t.match(logged().findLast(line => line.status === 409), { code: 'suspicious_identity', cause: 'MAX_USERS_PER_ANON', insert_id: /^[0-9a-f]{32}$/ })
  t.equal(sandbox.requests.length, 7, 'nothing suspicious was sent')
  t.equal((await post({ identified_id: 'user_id', anon_id: randomUUID() }, { query: '?dry_run=1' })).statusCode, 200, 'a dry run claims nothing')
})

t.test('concurrent identities cannot pass the bound together, in a batch or alone', async t => {
  const { inject, post, sandbox } = await startRelay(t, { env: { MAX_ANON_PER_USER: '5' } })
  const alone = await Promise.all(Array.from({ length: 50 }, () => post(identity({ identified_id: 'a' }))))
  t.equal(alone.filter(answer => answer.statusCode === 200).length, 5)
  t.equal(alone.filter(answer => answer.statusCode === 409).length, 45)
  const { results } = (await inject({ method: 'POST', url: '/identify/batch', payload: { identities: Array.from({ length: 50 }, () => identity({ identified_id: 'b' })) } })).json()
  t.same(results.map(({ problem }: { problem?: { code: string } }) => problem?.code), [...Array(5).fill(undefined), ...Array(45).fill('suspicious_identity')])
  t.equal(sandbox.ledger.rows().length, 10)
})

t.test('what Mixpanel refused is given back, what it may have is not', async t => {
  const guard = guardOf({ MAX_ANON_PER_USER: 1 })
  t.equal(await code(guard, event('a'), REFUSED), 'refused_by_mixpanel')
  t.equal(await code(guard, event('a'), UNKNOWN), 'mixpanel_timed_out')
  t.equal(await code(guard, event('a')), 'suspicious_identity', 'the outcome of the earlier one is unknown')
  await t.rejects(guard.run(event('b'), async () => { throw new Error('a bug') }), { message: 'a bug' })
  t.equal(await code(guard, event('b')), 'accepted')
})

t.test('an event that does not merge is none of the guard\'s business', async t => {
  const guard = guardOf({ MAX_ANON_PER_USER: 1 })
  const { anonKey, ...ordinary } = event('a')
  t.type(anonKey, 'string')
  for (let count = 0; count < 3; count++) t.equal(await code(guard, ordinary as ReturnType<typeof event>), 'accepted')
})

t.test('each bound holds alone', async t => {
  const anon = randomUUID()
  const users = guardOf({ MAX_USERS_PER_ANON: 1 })
  t.same([await code(users, event('a', anon)), await code(users, event('b', anon)), await code(users, event('a'))], ['accepted', 'suspicious_identity', 'accepted'])
  const anons = guardOf({ MAX_ANON_PER_USER: 1 })
  t.same([await code(anons, event('a', anon)), await code(anons, event('b', anon)), await code(anons, event('a'))], ['accepted', 'accepted', 'suspicious_identity'])
})

t.test('a pair that is in flight twice stays if one of the two was taken', async t => {
  const guard = guardOf({ MAX_ANON_PER_USER: 1 })
  const pair = event('a')
  const finish: ((verdict: Verdict) => void)[] = []
  const wait = () => guard.run(pair, () => new Promise<Verdict>(resolve => finish.push(resolve)))
  const both = [wait(), wait()]
  finish[0]?.(ACCEPTED)
  await both[0]
  finish[1]?.(REFUSED)
  await both[1]
  t.equal(await code(guard, event('a')), 'suspicious_identity')
  const refused = guardOf({ MAX_ANON_PER_USER: 1 })
  t.equal(await code(refused, pair, REFUSED), 'refused_by_mixpanel')
  t.equal(await code(refused, event('a')), 'accepted')
})

t.test('the window slides with each use of a pair', async t => {
  let now = 0
  setPerformanceNow(t, () => now)
  const guard = guardOf({ MAX_ANON_PER_USER: 2 })
  const [first, second, third] = [event('a'), event('a'), event('a')]
  await code(guard, first)
  await code(guard, second)
  now = 900
  t.equal(await code(guard, third), 'suspicious_identity')
  t.equal(await code(guard, first), 'accepted', 'a repeat renews the pair')
  now = 1100
  t.equal(await code(guard, third), 'accepted', 'the second pair is forgotten')
  t.equal(await code(guard, event('a')), 'suspicious_identity', 'the first is not')
  now = 5000
  t.same([await code(guard, event('a')), await code(guard, event('a')), await code(guard, event('a'))], ['accepted', 'accepted', 'suspicious_identity'])
})

t.test('memory is bounded: beyond it the oldest pair is forgotten, even one in flight', async t => {
  const guard = guardOf({ MAX_ANON_PER_USER: 1 }, silent, 10)
  let finish = (_: Verdict) => {}
  const oldest = guard.run(event('oldest'), () => new Promise(resolve => { finish = resolve }))
  for (let user = 0; user < 10; user++) await code(guard, event(`user-${user}`))
  t.equal(await code(guard, event('user-9')), 'suspicious_identity')
  finish(REFUSED)
  t.equal((await oldest).code, 'refused_by_mixpanel')
  const kept = guardOf({ MAX_ANON_PER_USER: 1 }, silent, 10)
  for (let user = 0; user < 11; user++) await code(kept, event(`user-${user}`))
  t.equal(await code(kept, event('user-1')), 'suspicious_identity')
  t.equal(await code(kept, event('user-0')), 'accepted', 'the oldest was forgotten')
})

t.test('MERGE_GUARD=warn logs and sends', async t => {
  const { post, logged, sandbox } = await startRelay(t, { env: { MAX_ANON_PER_USER: '1', MERGE_GUARD: 'warn' } })
  for (let count = 0; count < 3; count++) t.equal((await post(identity({ identified_id: 'user-1' }))).statusCode, 200)
  const warnings = logged().filter(line => line.msg === 'suspicious identity')
  t.match(warnings, [{ level: 40, rule: 'MAX_ANON_PER_USER', insert_id: /^[0-9a-f]{32}$/ }, {}])
  t.equal(warnings.length, 2)
  t.notMatch(JSON.stringify(warnings), /user-1/, 'no id is logged')
  t.equal(sandbox.requests.length, 3)
})

t.test('an identity that the outbox may have stored counts, and one that it has refused does not', async t => {
  const relay = await startRelayWithOutbox(t, { env: { MAX_ANON_PER_USER: '1' } })
  const status = async () => (await relay.post(identity({ identified_id: 'a' }), { headers: { prefer: 'respond-async' } })).statusCode
  relay.outbox.put = async () => 'rejected'
  t.same([await status(), await status()], [503, 503])
  relay.outbox.put = async () => 'unknown'
  t.same([await status(), await status()], [503, 409])
})

t.test('an identity that is queued counts', async t => {
  const { post } = await startRelayWithOutbox(t, { env: { MAX_ANON_PER_USER: '1' } })
  t.equal((await post(identity({ identified_id: 'a' }), { headers: { prefer: 'respond-async' } })).statusCode, 202)
  t.equal((await post(identity({ identified_id: 'a' }), { headers: { prefer: 'respond-async' } })).statusCode, 409)
})
