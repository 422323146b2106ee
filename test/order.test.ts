import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { identity, startRelay } from './helper.ts'
import { checkOrder } from './order-model.ts'

const seeds = (count: number, from = 0) => Array.from({ length: count }, (_, index) => from + index)

t.test('no claim overtakes an earlier one, in 200 random sequences without an outbox', async t => {
  for (const MAX_BATCH of ['1', '50']) {
    for (let from = 0; from < 100; from += 20) {
      const relay = await startRelay(t, { env: { MAX_BATCH } })
      t.same(await checkOrder(relay, seeds(20, from)), [], `MAX_BATCH=${MAX_BATCH}`)
    }
  }
})

t.test('no claim overtakes an earlier one on its way through an outbox in SQLite', async t => {
  const relay = await startRelay(t, { env: { OUTBOX: `file:${t.testdir({})}` } })
  t.same(await checkOrder(relay, seeds(20)), [])
})

t.test('after a 503 and a retry the first claim of a batch still owns the anonymous id', async t => {
  for (const [MAX_BATCH, fault, between] of [['1', 'edge_down', 0], ['50', 'edge_down', 58], ['50', 'reset', 58]] as const) {
    const { inject, sandbox } = await startRelay(t, { env: { MAX_BATCH } })
    const anon = randomUUID()
    sandbox.faults.add({ name: fault })
    const identities = [
      identity({ identified_id: 'first', anon_id: anon }), ...Array.from({ length: between }, () => identity()), identity({ identified_id: 'second', anon_id: `$device:${anon.toUpperCase()}` })
    ]
    t.equal((await inject({ method: 'POST', url: '/identify/batch', payload: { identities } })).statusCode, 200)
    const claims = sandbox.ledger.rows().filter(({ properties }) => String(properties.$anon_id).toLowerCase().endsWith(anon))
    t.same(claims.map(({ properties }) => properties.$identified_id), ['first', 'second'], `MAX_BATCH=${MAX_BATCH}, ${fault}`)
  }
})

t.test('two callers 50 ms apart, the first one meets a 503: the first keeps the anonymous id', async t => {
  const { post, sandbox } = await startRelay(t)
  const anon = randomUUID()
  sandbox.faults.add({ name: 'edge_down' })
  const first = post(identity({ identified_id: 'first', anon_id: anon }))
  await sleep(50)
  const second = post(identity({ identified_id: 'second', anon_id: anon }))
  t.same([(await first).statusCode, (await second).statusCode], [200, 200])
  t.same(sandbox.ledger.rows().map(({ properties }) => properties.$identified_id), ['first', 'second'])
})

t.test('at most 256 claims wait behind one on their anonymous id', async t => {
  const { inject, sandbox } = await startRelay(t)
  sandbox.faults.add({ name: 'wait', ms: 500 })
  const anon = randomUUID()
  const identities = Array.from({ length: 260 }, () => identity({ anon_id: anon }))
  const { results } = (await inject({ method: 'POST', url: '/identify/batch', payload: { identities } })).json()
  t.same(results.filter(({ status }: { status: string }) => status === 'failed').map(({ index }: { index: number }) => index), [257, 258, 259])
  t.match(results[259].problem, { status: 503, code: 'overloaded', retryable: true, detail: /anonymous id/ })
})

t.test('after a retryable failure the later claims of its batch are not sent, and fail alike', async t => {
  const { inject, sandbox } = await startRelay(t, { env: { MAX_BATCH: '1' } })
  const anon = randomUUID()
  sandbox.faults.add({ name: 'rate_limited' })
  const identities = ['first', 'second', 'third'].map(user => identity({ identified_id: user, anon_id: anon }))
  const { results } = (await inject({ method: 'POST', url: '/identify/batch', payload: { identities } })).json()
  t.match(results, identities.map((_, index) => ({ index, status: 'failed', problem: { status: 503, code: 'mixpanel_rate_limited' } })))
  t.equal(sandbox.requests.length, 1)
  sandbox.faults.add({ name: 'refused', times: 2 })
  t.match((await inject({ method: 'POST', url: '/identify/batch', payload: { identities } })).json().results.map(({ status }: { status: string }) => status),
    ['failed', 'accepted', 'accepted'], 'a refusal that no repeat changes holds up no later claim')
})
