import { randomUUID } from 'node:crypto'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { readConfig } from '#src/config.js'
import { identifyEvent, parseEvent } from '#src/identity/event.js'
import type { Outbox } from '#src/outbox/outbox.js'
import { createDeadLetterExpiry } from '#src/relay/dead-letter-expiry.js'
import { emptied, identity, silent, startRelay, startRelayWithOutbox, temporary } from './helper.ts'
import { violations, type Call } from './delivery-check.ts'

const outage = { name: 'edge_down' as const, times: 1_000_000 }

t.test('while Mixpanel is unreachable an identity gets 202, is on disk, and is delivered later unchanged', async t => {
  const relay = await startRelayWithOutbox(t)
  relay.sandbox.faults.add(outage)
  const one = identity({ properties: { plan: 'pro' } })
  const answer = await relay.post(one)
  t.equal(answer.statusCode, 202)
  t.same(answer.json(), { status: 'queued' })
  t.notOk('preference-applied' in answer.headers)
  const [entry] = await relay.outbox.waiting(10)
  const stored = parseEvent(entry!.event!).properties
  t.match(stored, { $identified_id: one.identified_id, plan: 'pro' })
  t.notOk('token' in stored, 'the outbox does not hold the token')
  t.match(relay.logged().find(line => line.status === 202), { cause: 'mixpanel_unreachable', insert_id: stored.$insert_id })
  t.match((await relay.inject({ url: '/readyz?verbose' })).json(), { status: 'ready', parts: { outbox: { waiting: 1, dead: 0 } } })
  relay.sandbox.faults.clear()
  await emptied(relay)
  const { outcome, properties } = relay.sandbox.ledger.rows()[0]!
  t.equal(outcome, 'merged')
  t.same(properties, stored, 'the delivered event is the stored one')
  t.equal((await relay.post(identity())).statusCode, 200)
})

t.test('a failure that may pass is stored; a refusal and rejected credentials are not', async t => {
  const relay = await startRelayWithOutbox(t, { env: { MIXPANEL_TIMEOUT_MS: '200', DEADLINE_MS: '600' } })
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

t.test('Prefer: respond-async answers without asking Mixpanel, and is ignored without an outbox', async t => {
  const relay = await startRelayWithOutbox(t)
  relay.sandbox.faults.add({ name: 'hang', times: 1 })
  for (const prefer of ['respond-async', 'wait=5, Respond-Async; x=1']) {
    const answer = await relay.post(identity(), { headers: { prefer } })
    t.equal(answer.statusCode, 202)
    t.equal(answer.headers['preference-applied'], 'respond-async')
  }
  const withoutOutbox = await startRelay(t)
  for (const prefer of ['respond-async', 'respond-asynchronously']) {
    const answer = await withoutOutbox.post(identity(), { headers: { prefer } })
    t.equal(answer.statusCode, 200)
    t.notOk('preference-applied' in answer.headers)
  }
  const other = await startRelayWithOutbox(t)
  const answer = await other.post(identity(), { headers: { prefer: 'respond-asynchronously' } })
  t.equal(answer.statusCode, 200, 'another preference is ignored')
})

t.test('POST /identify/batch answers 202 if all identities are accepted or queued, else 207', async t => {
  const relay = await startRelayWithOutbox(t)
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

t.test('the first identity of an anonymous id reaches Mixpanel first', async t => {
  const relay = await startRelayWithOutbox(t, { env: { MIXPANEL_TIMEOUT_MS: '300', DEADLINE_MS: '600' } })
  const anon = randomUUID()
  const calls: Call[] = []
  const identify = async (id: string, spelling: string, headers = {}) => {
    const one = { identified_id: id, anon_id: spelling, properties: {} }
    const { statusCode: status } = await relay.post(one, { headers })
    calls.push({ identity: one, status })
    return status
  }
  relay.sandbox.faults.add({ name: 'hang', times: 2 })
  const first = identify('first', anon)
  await sleep(50)
  const others = [identify('second', `$device:${anon}`), identify('third', anon.toUpperCase()), identify('fourth', anon, { prefer: 'respond-async' })]
  t.equal(await first, 202, 'the first identity timed out and was stored')
  t.same(await Promise.all(others), [202, 202, 202], 'the later ones are stored behind it, although Mixpanel answers again')
  t.same(relay.logged().filter(line => line.status === 202).map(line => line.cause), ['mixpanel_timed_out', 'an earlier identity is queued', 'an earlier identity is queued', 'respond-async'])
  await emptied(relay)
  const arrived = relay.sandbox.ledger.rows().map(row => row.properties.$identified_id)
  t.equal(arrived[0], 'first')
  t.same(new Set(arrived), new Set(['first', 'second', 'third', 'fourth']))
  t.same(violations(calls, relay.sandbox.ledger.rows()), [])
  const requests = relay.sandbox.requests.filter(({ body }) => body.includes('first'))
  t.ok(requests.every(({ body }) => body.split('%22%24anon_id').length <= 2), 'the first identity is alone in its requests')
})

t.test('an identity that waits for an earlier one has a deadline of its own', async t => {
  const relay = await startRelayWithOutbox(t, { env: { DEADLINE_MS: '1000' } })
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
  t.equal(relay.logged().find(line => line.status === 202)?.cause, 'half of DEADLINE_MS has passed')
})

t.test('a single event that is too large, or a replay with rejected credentials, becomes a dead letter', async t => {
  const relay = await startRelayWithOutbox(t)
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

t.test('if the outbox cannot store: 503 if Mixpanel has not taken the event, else 502 or 504', async t => {
  const relay = await startRelayWithOutbox(t, { env: { MAX_IN_FLIGHT: '3', DEADLINE_MS: '500' } })
  for (const [result, detail] of [
    ['rejected', /^The outbox is full or cannot write\. The identity was not stored\.$/], ['unknown', /^The outbox did not answer in time and may have stored the identity/]
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
  t.match((await relay.post(identity())).json(), { status: 503, code: 'overloaded' }, 'a refused connection: Mixpanel cannot have it')
  relay.sandbox.app.server.listen(Number(new URL(relay.sandbox.url).port), '127.0.0.1')
  while ((await relay.post(identity())).statusCode !== 200) await sleep(50)
  relay.outbox.has = () => 'unknown'
  t.match((await relay.post(identity())).json(), { status: 503, code: 'overloaded', detail: /out of reach/ })
  relay.outbox.has = () => 'no'
  relay.sandbox.faults.add({ name: 'wait', ms: 300, times: 10 })
  const answers = await Promise.all(Array.from({ length: 5 }, () => relay.post(identity())))
  t.same(answers.map(({ statusCode }) => statusCode), [200, 200, 200, 503, 503])
})

t.test('stopWaiting stores every identity that waits for Mixpanel', async t => {
  const relay = await startRelayWithOutbox(t)
  relay.sandbox.faults.add({ name: 'hang', times: 1000 })
  const anon = randomUUID()
  const answers = Promise.all(Array.from({ length: 20 }, (_, index) => relay.post(identity(index < 3 ? { anon_id: anon } : {}))))
  await sleep(200)
  relay.relay.stopWaiting()
  t.not(await Promise.race([answers, sleep(2000, 'late')]), 'late', 'the answers do not wait for Mixpanel')
  t.same(new Set((await answers).map(({ statusCode }) => statusCode)), new Set([202]))
  t.equal(relay.outbox.counts().waiting, 20)
  relay.outbox.put = async () => 'rejected'
  t.match((await relay.post(identity())).json(), { status: 503, code: 'overloaded' }, 'a later identity does not wait either')
  const withoutOutbox = await startRelay(t)
  t.doesNotThrow(withoutOutbox.relay.stopWaiting, 'without an outbox it does nothing')
})

t.test('all spellings of an anonymous id have one key', async t => {
  const anon = randomUUID()
  const keys = [anon, `$device:${anon}`, anon.toUpperCase()].map(spelling => identifyEvent({ identified_id: 'u', anon_id: spelling }, 0).anonKey)
  t.equal(new Set(keys).size, 1)
})

t.test('OUTBOX_MAX_BYTES bounds the outbox, and callers on an open address may fill half of it', async t => {
  for (const [env, count] of [[{}, 4], [{ HOST: '0.0.0.0', ALLOW_ANONYMOUS: 'true' }, 2]] as const) {
    const relay = await startRelayWithOutbox(t, { env: { OUTBOX_MAX_BYTES: '840', ...env } })
    await relay.outbox.pause(true)
    const statuses: number[] = []
    for (let sent = 0; sent < 6; sent++) statuses.push((await relay.post(identity({ identified_id: `user-${sent}` }))).statusCode)
    t.same(statuses, Array.from({ length: 6 }, (_, index) => index < count ? 202 : 503))
    t.match(relay.logged().find(line => line.msg === 'outbox write rejected'), { cause: /^full: \d+ bytes of/ })
  }
})

t.test('DEAD_LETTER_DAYS deletes older dead letters and logs how many', async t => {
  const directory = `file:${temporary(t)}/outbox`
  const first = await startRelayWithOutbox(t, { env: { OUTBOX: directory } })
  first.sandbox.faults.add({ name: 'refused', times: 4 })
  t.equal((await first.post(identity(), { headers: { prefer: 'respond-async' } })).statusCode, 202)
  await emptied(first)
  t.match(first.outbox.counts(), { dead: 1 })
  await first.app.close()
  await first.outbox.close()
  first.outbox.close = async () => {}

  const now = Date.now()
  const { Date: RealDate } = globalThis
  t.teardown(() => { globalThis.Date = RealDate })
  globalThis.Date = class extends RealDate { static override now () { return now + 8 * 24 * 3_600_000 } } as DateConstructor
  const second = await startRelayWithOutbox(t, { env: { OUTBOX: directory, DEAD_LETTER_DAYS: '7' } })
  while (second.outbox.counts().dead > 0) await sleep(10)
  globalThis.Date = RealDate
  while (!second.lines.some(line => line.includes('old dead letters dropped'))) await sleep(10)
  t.match(second.logged().find(line => line.msg === 'old dead letters dropped'), { level: 40, identities: 1, days: 7 })
})

t.test('an outbox that cannot delete old dead letters says so', async t => {
  const logged: string[] = []
  const outbox = { expire: async () => { throw new Error('the disk is gone') } } as unknown as Outbox
  const expiry = createDeadLetterExpiry(readConfig({ MIXPANEL_TOKEN: 'x', DEAD_LETTER_DAYS: '1' }, () => ''), outbox,
    { ...silent, error: (fields, message) => { logged.push(message) } })
  expiry.start()
  await sleep(10)
  expiry.stop()
  t.same(logged, ['old dead letters not dropped'])
})

t.test('an outbox on a file system without a disk is a warning', { skip: !existsSync('/dev/shm') && 'needs /dev/shm' }, async t => {
  const directory = mkdtempSync('/dev/shm/relay-')
  t.teardown(() => rmSync(directory, { recursive: true }))
  const relay = await startRelayWithOutbox(t, { env: { OUTBOX: `file:${directory}` } })
  t.match(relay.logged().find(line => line.msg === 'outbox on a weak file system'), { level: 40, file_system: 'tmpfs' })
})
