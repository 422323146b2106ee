import { t } from 'tap'
import { interpretBody, isPartial, settle, type Answer } from '../src/mixpanel/answer.ts'
import { identity, startRelay } from './helper.ts'
import { checkSequence } from './verdict-model.ts'

t.test('no verdict says more than is known, in 200 random sequences of attempts', async t => {
  const faults = await Promise.all(Array.from({ length: 200 }, (_, seed) => checkSequence(seed)))
  t.same(faults.flat(), [])
})

t.test('an outcome that is unknown becomes known only by a success', async t => {
  const lost: Answer = { code: 'mixpanel_timed_out', taken: 'unknown', cause: 'no answer in 5000 ms', isTransient: true }
  const zero: Answer = { code: 'refused_by_mixpanel', taken: 'no', reason: 'no' }
  const limit: Answer = { code: 'mixpanel_rate_limited', taken: 'no', cause: 'status 429', retryAfter: 2 }
  t.same(settle({ code: 'accepted', taken: 'yes' }, lost), { code: 'accepted', taken: 'yes' })
  t.match(settle(limit, lost), { code: 'mixpanel_timed_out', taken: 'unknown' })
  t.match(settle(zero, lost), { code: 'mixpanel_timed_out', taken: 'unknown' })
  t.match(settle(limit, zero), { code: 'mixpanel_unreachable', taken: 'unknown', cause: 'status 429 after a refused array' })
  t.same(settle(zero, zero), { code: 'refused_by_mixpanel', taken: 'no', reason: 'no' }, 'a lone refusal settles the refusal of its array')
})

t.test('a first attempt that was taken and then reset: the answer to the second does not say that it was not taken', async t => {
  for (const [name, retryable] of [['rate_limited', true], ['refused', true], ['unauthorized', true]] as const) {
    const { post, sandbox } = await startRelay(t)
    sandbox.faults.add({ name: 'reset_after' }, { name, times: 3 })
    const answer = await post(identity())
    t.match(answer.json(), { status: 502, code: 'mixpanel_unreachable', retryable }, name)
    t.equal(sandbox.ledger.rows().length, 1, 'Mixpanel has it')
  }
})

t.test('the request for the reason was taken and its answer lost: the outcome is unknown', async t => {
  const { post, sandbox } = await startRelay(t)
  sandbox.faults.add({ name: 'mute_zero' }, { name: 'reset_after' }, { name: 'rate_limited' })
  t.match((await post(identity())).json(), { status: 502, code: 'mixpanel_unreachable' })
  t.equal(sandbox.ledger.rows().length, 1)
})

t.test('a success for some events of an array is no success for all', async t => {
  t.equal(isPartial(interpretBody(200, '{"code":200,"num_records_imported":1}'), 4), true)
  t.equal(isPartial(interpretBody(200, '{"code":200,"num_records_imported":4}'), 4), false)
  t.equal(isPartial(interpretBody(200, '1'), 4), false)
  t.match(interpretBody(200, '{"code":200,"error":["bad"]}'), { code: 'refused_by_mixpanel' })
  const { inject, sandbox } = await startRelay(t)
  sandbox.faults.add({ name: 'imports_one' })
  const answer = await inject({ method: 'POST', url: '/identify/batch', payload: { identities: Array.from({ length: 4 }, () => identity()) } })
  t.equal(answer.statusCode, 200)
  t.equal(new Set(sandbox.ledger.rows().map(({ properties }) => properties.$insert_id)).size, 4, 'each event was sent again')
})

t.test('the log has the time at Mixpanel, the attempts and the size of the array', async t => {
  const { post, sandbox, logged } = await startRelay(t)
  sandbox.faults.add({ name: 'edge_down' }, { name: 'wait', ms: 100 })
  await post(identity())
  const line = logged().find(({ msg }) => msg === 'request completed') as Record<string, number>
  t.match(line, { attempts: 2, events: 1 })
  t.ok(line.mixpanel_ms! >= 140, 'a pause of 50 ms or more, and 100 ms at Mixpanel')
  t.ok(line.ms! >= line.mixpanel_ms!)
})

t.test('a clock before this release: 503, one log line, nothing sent', async t => {
  const { post, sandbox, logged } = await startRelay(t)
  t.capture(Date, 'now', () => 1000)
  for (let count = 0; count < 3; count++) t.match((await post(identity())).json(), { status: 503, code: 'overloaded', detail: /clock/ })
  t.equal(sandbox.requests.length, 0)
  t.equal(logged().filter(({ msg }) => msg === 'clock before the date of this release').length, 1)
})

t.test('a clock that differs from the one of Mixpanel is logged once an hour', async t => {
  const { post, logged } = await startRelay(t)
  const now = Date.now
  t.capture(Date, 'now', () => now() + 120_000)
  for (let count = 0; count < 3; count++) t.equal((await post(identity())).statusCode, 200)
  t.match(logged().filter(({ msg }) => msg === 'clock differs from Mixpanel'), [{ level: 40, seconds: /^1(?:19|20|21)$/ }])
})
