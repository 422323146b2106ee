import { t } from 'tap'
import { killed } from '../scenarios.ts'

t.test('kill -9, 25 times, under 64 writers', async t => {
  const { told, exit, broken } = await killed(t, { rounds: 25, writers: 64 })
  t.equal(exit, 0)
  t.same(broken, [])
  t.comment(JSON.stringify(told))
})

t.test('kill -9, 10 times, while Mixpanel comes and goes', async t => {
  const { told, exit, broken } = await killed(t, { rounds: 10, writers: 64, isFlapping: true })
  t.equal(exit, 0)
  t.same(broken, [])
  t.ok(told[200]! > 0 && told[202]! > 0, JSON.stringify(told))
})

t.test('the check has teeth: an outbox that says so before it is on disk loses', async t => {
  // COMMIT is held back for 300 ms, and everybody is told that it was done.
  const early = `data:text/javascript,${encodeURIComponent(`
    import Database from 'file://${process.cwd()}/node_modules/libsql/index.js'
    const { exec } = Database.prototype
    let isOpen = false
    Database.prototype.exec = function (sql) {
      if (sql === 'BEGIN IMMEDIATE' && isOpen) return
      if (sql !== 'COMMIT') { isOpen ||= sql === 'BEGIN IMMEDIATE'; return exec.call(this, sql) }
      setTimeout(() => { if (isOpen) exec.call(this, sql); isOpen = false }, 300)
    }`)}`
  const { told, broken } = await killed(t, { rounds: 3, writers: 64, env: { NODE_OPTIONS: `--import=${early}` } })
  t.ok(broken.some(sentence => sentence.endsWith('was told 202 and is lost')), JSON.stringify(told))
})
