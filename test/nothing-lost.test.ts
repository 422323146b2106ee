import { t } from 'tap'
import { killed } from './scenarios.ts'

t.test('killed in the middle of an outage: who was told 202 arrives', async t => {
  const { told, broken } = await killed(t, { rounds: 3, writers: 32 })
  t.same(broken, [])
  t.ok(told[202]! > 100, JSON.stringify(told))
})
