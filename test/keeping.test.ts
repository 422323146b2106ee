import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { identifyEvent, parseEvent } from '../src/identity/event.ts'
import { runAdminCommand } from '../src/commands/admin.ts'
import { createKeyedMutex } from '../src/concurrency/keyed-mutex.ts'
import { identity, startRelay } from './helper.ts'
import { violations, type Call } from './delivery-check.ts'

type Relay = Awaited<ReturnType<typeof startRelay>>

const DAY = 24 * 3600 * 1000
const outage = { name: 'edge_down' as const, times: 1_000_000 }
const keeping = (t: Parameters<typeof startRelay>[0], env = {}, options = {}) =>
  startRelay(t, { OUTBOX: `file:${t.testdir({})}/outbox`, ...env }, options)

async function emptied ({ outbox }: Relay) {
  while (outbox.counts().waiting > 0) await sleep(20)
}

async function lines (relay: Relay, ...order: string[]): Promise<string[]> {
  let text = ''
  for await (const chunk of runAdminCommand(relay.outbox, relay.config, order)) text += chunk
  return text.split('\n').filter(line => line !== '')
}

t.test('out of reach: 202, on disk, and delivered later exactly as accepted', async t => {
  const relay = await keeping(t)
  relay.sandbox.faults.add(outage)
  const one = identity({ properties: { plan: 'pro' } })
  const answer = await relay.post(one)
  t.equal(answer.statusCode, 202)
  t.same(answer.json(), { status: 'queued' })
  t.notOk('preference-applied' in answer.headers)
  const [entry] = await relay.outbox.waiting(10)
  const stored = parseEvent(entry!.event).properties
  t.match(stored, { $identified_id: one.identified_id, plan: 'pro' })
  t.notOk('token' in stored)
  t.match(relay.logged().find(line => line.status === 202), { cause: 'mixpanel_unreachable', insert_id: stored.$insert_id })
  t.match((await relay.inject({ url: '/readyz?verbose' })).json(), { status: 'ready', parts: { outbox: { waiting: 1, dead: 0 } } })
  relay.sandbox.faults.clear()
  await emptied(relay)
  const { outcome, properties } = relay.sandbox.ledger.rows()[0]!
  t.equal(outcome, 'merged')
  t.same(properties, stored)
  t.equal((await relay.post(identity())).statusCode, 200)
})

t.test('every failure that may pass is kept; what Mixpanel refuses, or its credentials, is not', async t => {
  const relay = await keeping(t, { MIXPANEL_TIMEOUT_MS: '200', DEADLINE_MS: '600' })
  for (const [name, status, cause] of [
    ['rate_limited', 202, 'mixpanel_rate_limited'], ['hang', 202, 'mixpanel_timed_out'], ['html', 202, 'mixpanel_misanswered'],
    ['refused', 422, undefined], ['unauthorized', 502, undefined], ['redirect', 502, undefined]
  ] as const) {
    relay.sandbox.faults.add({ name, times: 1000 })
    t.equal((await relay.post(identity())).statusCode, status, name)
    if (cause !== undefined) t.equal(relay.logged().filter(line => line.msg === 'request completed').at(-1)?.cause, cause)
    relay.sandbox.faults.clear()
  }
})

t.test('Prefer: respond-async does not wait for Mixpanel; without an outbox it is ignored', async t => {
  const relay = await keeping(t)
  relay.sandbox.faults.add({ name: 'hang', times: 1 })
  for (const prefer of ['respond-async', 'wait=5, Respond-Async; x=1']) {
    const answer = await relay.post(identity(), { headers: { prefer } })
    t.equal(answer.statusCode, 202)
    t.equal(answer.headers['preference-applied'], 'respond-async')
  }
  const off = await startRelay(t)
  for (const prefer of ['respond-async', 'respond-asynchronously']) {
    const answer = await off.post(identity(), { headers: { prefer } })
    t.equal(answer.statusCode, 200)
    t.notOk('preference-applied' in answer.headers)
  }
  t.equal((await keeping(t).then(other => other.post(identity(), { headers: { prefer: 'respond-asynchronously' } }))).statusCode, 200)
})

t.test('/identify/batch: 202 where all are at least queued, else 207', async t => {
  const relay = await keeping(t)
  const batch = (identities: unknown[], headers = {}) => relay.inject({ method: 'POST', url: '/identify/batch', payload: { identities }, headers })
  const later = await batch([identity(), identity()], { prefer: 'respond-async' })
  t.equal(later.statusCode, 202)
  t.equal(later.headers['preference-applied'], 'respond-async')
  t.same(later.json().results, [{ index: 0, status: 'queued' }, { index: 1, status: 'queued' }])
  await emptied(relay)
  t.equal((await batch([identity()])).statusCode, 200)
  const mixed = await batch([identity(), identity({ anon_id: 'x' })], { prefer: 'respond-async' })
  t.equal(mixed.statusCode, 207)
  t.match(mixed.json().results, [{ status: 'queued' }, { status: 'failed', problem: { code: 'invalid_request' } }])
  t.match(relay.logged().find(line => line.status === 207), { identities: 2, queued: 1, failed: 1 })
})

t.test('the first claim of an anonymous id stays the first', async t => {
  const relay = await keeping(t, { MIXPANEL_TIMEOUT_MS: '300', DEADLINE_MS: '600' })
  const anon = randomUUID()
  const calls: Call[] = []
  const claim = async (id: string, written: string, headers = {}) => {
    const one = { identified_id: id, anon_id: written, properties: {} }
    const { statusCode: status } = await relay.post(one, { headers })
    calls.push({ identity: one, status })
    return status
  }
  relay.sandbox.faults.add({ name: 'hang', times: 2 })
  const first = claim('first', anon)
  await sleep(50)
  const others = [claim('second', `$device:${anon}`), claim('third', anon.toUpperCase()), claim('fourth', anon, { prefer: 'respond-async' })]
  t.equal(await first, 202, 'it was not answered in time')
  t.same(await Promise.all(others), [202, 202, 202], 'they follow it, though Mixpanel answers again')
  t.same(relay.logged().filter(line => line.status === 202).map(line => line.cause), ['mixpanel_timed_out', 'an earlier claim waits', 'an earlier claim waits', 'respond-async'])
  await emptied(relay)
  const arrived = relay.sandbox.ledger.rows().map(row => row.properties.$identified_id)
  t.equal(arrived[0], 'first')
  t.same(new Set(arrived), new Set(['first', 'second', 'third', 'fourth']))
  t.same(violations(calls, relay.sandbox.ledger.rows()), [])
  const requests = relay.sandbox.requests.filter(({ body }) => body.includes('first'))
  t.ok(requests.every(({ body }) => body.split('%22%24anon_id').length <= 2), 'nobody in one array with it')
})

t.test('who waits for an earlier claim has his own time', async t => {
  const relay = await keeping(t, { DEADLINE_MS: '1000' })
  for (const [ms, status] of [[300, 422], [700, 202]] as const) {
    const anon = randomUUID()
    relay.sandbox.faults.add({ name: 'wait', ms })
    const first = relay.post(identity({ anon_id: anon }))
    await sleep(50)
    relay.sandbox.faults.add({ name: 'refused', times: 2 })
    const second = relay.post(identity({ anon_id: anon }))
    t.equal((await first).statusCode, 200)
    t.equal((await second).statusCode, status)
    relay.sandbox.faults.clear()
  }
  t.equal(relay.logged().find(line => line.status === 202)?.cause, 'late')
})

t.test('dead letters: refused, too old, too large; operators list, replay and drop them', async t => {
  const relay = await keeping(t)
  relay.sandbox.faults.add(outage)
  const [refused, large] = [identity(), identity()]
  for (const one of [refused, large]) await relay.post(one)
  const old = identifyEvent(identity(), Date.now() - 5 * DAY)
  t.equal(await relay.outbox.put(old), 'stored')
  const waiting = (await lines(relay, 'list')).map(line => JSON.parse(line))
  t.match(waiting, [{ identified_id: refused.identified_id, anon_id: refused.anon_id }, { identified_id: large.identified_id }, { accepted: /^20/ }])
  relay.sandbox.faults.clear()
  relay.sandbox.faults.add({ name: 'refused', times: 12 }, { name: 'too_large', times: 12 })
  await emptied(relay)
  const dead = (await lines(relay, 'dead')).map(line => JSON.parse(line))
  t.same(dead.map(letter => letter.reason).sort(), ['event, invalid', 'event, invalid', 'older than 4.5 days'].sort())
  t.same(await lines(relay, 'drop', '0'), ['0 dropped.', '1 unknown: see outbox dead.'])
  t.ok(relay.logged().some(line => line.level === 40 && line.msg === 'identities dead-lettered'))
  relay.sandbox.faults.clear()

  const letterOf = (insertId: string) => dead.find(letter => letter.insert_id === insertId)
  t.same(await lines(relay, 'replay', String(letterOf(old.insertId).id), '999'),
    ['1 wait again, 1 of them for /import, too old for /track.', '1 unknown: see outbox dead.'])
  await emptied(relay)
  t.match(relay.sandbox.ledger.rows().at(-1), { endpoint: 'import', properties: { $insert_id: old.insertId, time: old.time } })
  const [one, other] = dead.filter(letter => letter.insert_id !== old.insertId)
  t.same(await lines(relay, 'drop', String(one.id)), ['1 dropped.'])
  t.same(await lines(relay, 'replay', 'all'), ['1 wait again.'])
  await emptied(relay)
  t.equal(relay.sandbox.ledger.rows().at(-1)?.properties.$identified_id, other.identified_id)
  t.same(await lines(relay, 'dead'), [])
  t.same(await lines(relay, 'drop', 'all'), ['0 dropped.'])
  for (const order of [[], ['delete'], ['replay'], ['drop'], ['list', 'all'], ['drop', 'all', '17'], ['replay', '1', 'all']]) await t.rejects(lines(relay, ...order), { message: /^outbox.*[?.]$/ })
})

t.test('many dead letters', async t => {
  const relay = await keeping(t)
  relay.sandbox.faults.add({ name: 'refused', times: 10_000 })
  const old = Array.from({ length: 1200 }, () => identifyEvent(identity(), Date.now() - 5 * DAY))
  await Promise.all(old.map(event => relay.outbox.put(event)))
  relay.relay.identify(old[0]!, { isAsync: true })
  await emptied(relay)
  t.same(await lines(relay, 'drop', '--all'), ['1201 dropped.'])
  t.same(relay.outbox.counts(), { waiting: 0, dead: 0 })
})

t.test('a lone one that is too large dies; a replay whose credentials are rejected does not hold up the rest', async t => {
  const relay = await keeping(t)
  relay.sandbox.faults.add({ name: 'too_large', times: 2 })
  const answer = await relay.post(identity(), { headers: { prefer: 'respond-async' } })
  t.equal(answer.statusCode, 202)
  await emptied(relay)
  t.match((await relay.outbox.dead(1))[0], { reason: 'too large for Mixpanel' })
  relay.sandbox.faults.clear()
  const [letter] = await relay.outbox.dead(1)
  relay.sandbox.faults.add({ name: 'unauthorized' })
  await relay.outbox.replay([{ id: letter!.id, endpoint: 'import' }])
  await emptied(relay)
  t.match((await relay.outbox.dead(1))[0], { reason: '/import rejected the credentials of this relay' })
})

t.test('a full outbox, or one out of reach: 503 at once; but never where Mixpanel may have it', async t => {
  const relay = await keeping(t, { MAX_IN_FLIGHT: '3', DEADLINE_MS: '500' })
  for (const [result, detail] of [
    ['rejected', /^The outbox is full, or cannot write: it was not kept/], ['unknown', /^The outbox did not answer in time, and may have kept it/]
  ] as const) {
    relay.outbox.put = async () => result
    const answer = await relay.post(identity(), { headers: { prefer: 'respond-async' } })
    t.match(answer.json(), { status: 503, code: 'overloaded', retryable: true, detail })
    t.equal(answer.headers['retry-after'], '1')
  }
  relay.outbox.put = async () => 'rejected'
  for (const [name, status, code] of [
    ['rate_limited', 503, 'overloaded'], ['edge_down', 502, 'mixpanel_unreachable'], ['reset', 502, 'mixpanel_unreachable'], ['hang', 504, 'mixpanel_timed_out']
  ] as const) {
    relay.sandbox.faults.add({ name, times: 10 })
    t.match((await relay.post(identity())).json(), { status, code }, name)
    relay.sandbox.faults.clear()
    t.equal((await relay.post(identity())).statusCode, 200)
  }
  relay.sandbox.app.server.close()
  relay.sandbox.app.server.closeAllConnections()
  t.match((await relay.post(identity())).json(), { status: 503, code: 'overloaded' }, 'nobody listens: it cannot have it')
  relay.sandbox.app.server.listen(Number(new URL(relay.sandbox.url).port), '127.0.0.1')
  while ((await relay.post(identity())).statusCode !== 200) await sleep(50)
  relay.outbox.has = async () => 'unknown'
  t.match((await relay.post(identity())).json(), { status: 503, code: 'overloaded', detail: /out of reach/ })
  relay.outbox.has = async () => 'no'
  relay.sandbox.faults.add({ name: 'wait', ms: 300, times: 10 })
  const answers = await Promise.all(Array.from({ length: 5 }, () => relay.post(identity())))
  t.same(answers.map(({ statusCode }) => statusCode), [200, 200, 200, 503, 503])
})

t.test('time is up: whoever still waits for Mixpanel is kept', async t => {
  const relay = await keeping(t)
  relay.sandbox.faults.add({ name: 'hang', times: 1000 })
  const anon = randomUUID()
  const waiting = Promise.all(Array.from({ length: 20 }, (_, index) => relay.post(identity(index < 3 ? { anon_id: anon } : {}))))
  await sleep(200)
  relay.relay.stopWaiting()
  t.not(await Promise.race([waiting, sleep(2000, 'late')]), 'late', 'Mixpanel is not waited for')
  t.same(new Set((await waiting).map(({ statusCode }) => statusCode)), new Set([202]))
  t.equal(relay.outbox.counts().waiting, 20)
  relay.outbox.put = async () => 'rejected'
  t.match((await relay.post(identity())).json(), { status: 503, code: 'overloaded' }, 'nor by those who come later')
  const off = await startRelay(t)
  off.relay.stopWaiting()
})

t.test('a claim is one anonymous id, however it is written', async t => {
  const anon = randomUUID()
  const claims = [anon, `$device:${anon}`, anon.toUpperCase()].map(written => identifyEvent({ identified_id: 'u', anon_id: written }, 0).anonKey)
  t.equal(new Set(claims).size, 1)
})

t.test('the order: one of each claim at a time, and a bug is told to its own caller alone', async t => {
  const order = createKeyedMutex<string>(result => result === 'taken')
  await order.idle()
  const log: string[] = []
  const work = (name: string, result: string, ms = 20) => async () => {
    log.push(`${name} begins`)
    await sleep(ms)
    log.push(`${name} ends`)
    if (result === 'bug') throw new Error('a bug')
    return result
  }
  const bug = order.run('x', work('a', 'bug'))
  const rest = [order.run('x', work('b', 'no')), order.run('x', work('c', 'taken')), order.run('x', work('d', 'no')), order.run('x', work('e', 'no'))]
  const other = order.run('y', work('z', 'no', 1))
  t.equal(order.inFlight(), 6)
  await t.rejects(bug, { message: 'a bug' })
  await order.idle()
  t.same(await Promise.all([...rest, other]), ['no', 'taken', 'no', 'no', 'no'])
  t.same(log, ['a begins', 'z begins', 'z ends', 'a ends', 'b begins', 'b ends', 'c begins', 'c ends', 'd begins', 'e begins', 'd ends', 'e ends'])
})
