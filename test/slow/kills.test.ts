import { t } from 'tap'
import { inOutboxThread, killed } from '../scenarios.ts'

t.test('a relay that is killed 25 times under 64 callers loses nothing', async t => {
  const { statuses, exit, found } = await killed(t, { rounds: 25, writers: 64 })
  t.equal(exit, 0)
  t.same(found, [])
  t.comment(JSON.stringify(statuses))
})

t.test('a relay that is killed 10 times while Mixpanel comes and goes loses nothing', async t => {
  const { statuses, exit, found } = await killed(t, { rounds: 10, writers: 64, isFlapping: true })
  t.equal(exit, 0)
  t.same(found, [])
  t.ok(statuses[200]! > 0 && statuses[202]! > 0, `there are answers 200 and 202: ${JSON.stringify(statuses)}`)
})

t.test('the check finds an outbox that answers before its commit', async t => {
  // COMMIT is delayed by 300 ms, and the answer does not wait for it.
  const early = inOutboxThread(`
    const { exec } = Database.prototype
    let isOpen = false
    Database.prototype.exec = function (sql) {
      if (isOpen && (sql === 'BEGIN IMMEDIATE' || sql.startsWith('PRAGMA synchronous'))) return
      if (sql !== 'COMMIT') { isOpen ||= sql === 'BEGIN IMMEDIATE'; return exec.call(this, sql) }
      setTimeout(() => { if (isOpen) exec.call(this, sql); isOpen = false }, 300)
    }`)
  const { statuses, found } = await killed(t, { rounds: 3, writers: 64, env: { NODE_OPTIONS: early } })
  t.ok(found.some(sentence => sentence.endsWith('got 202 and is lost')), `a lost 202 is found: ${JSON.stringify(statuses)}`)
})
