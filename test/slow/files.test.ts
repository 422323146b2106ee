import { cpSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { violations } from '../delivery-check.ts'
import { startSandbox, temporary } from '../helper.ts'
import { createCallers } from '../load.ts'
import { startServer } from '../processes.ts'

const outage = { name: 'edge_down' as const, times: 1_000_000 }

/** What is done to the files, how it is undone, and whether what got 202 before is still there after the relay's end. */
const DAMAGES: [what: string, act: (path: string) => void, undo: (path: string) => void, isKept: boolean][] = [
  ['the directory is moved away', path => renameSync(path, `${path}-away`), path => renameSync(`${path}-away`, path), true],
  ['the lock is removed', path => rmSync(`${path}/lock`), () => {}, true],
  ['the log of the database is removed', path => rmSync(`${path}/outbox.db-wal`), () => {}, true],
  ['a copy takes the place of the directory', path => {
    renameSync(path, `${path}-away`)
    cpSync(`${path}-away`, path, { recursive: true, filter: name => !name.endsWith('.sock') })
  }, path => {
    rmSync(path, { recursive: true })
    renameSync(`${path}-away`, path)
  }, true],
  ['the database is removed', path => rmSync(`${path}/outbox.db`), path => rmSync(path, { recursive: true }), false],
  ['another file is written over it', path => writeFileSync(`${path}/outbox.db`, 'a backup'), path => rmSync(path, { recursive: true }), false]
]

t.test('under load no 202 follows what is done to the files, and none before it is lost', async t => {
  for (const [what, act, undo, isKept] of DAMAGES) {
    await t.test(what, async t => {
      const sandbox = await startSandbox(t)
      const directory = temporary(t)
      const env = { OUTBOX: `file:${directory}` }
      let server = await startServer(t, sandbox.url, env)
      const callers = createCallers(() => server.url, { async: 1, pauseMs: 2 })
      sandbox.faults.add(outage)
      callers.start(16)
      await sleep(500 + Math.random() * 500)
      t.ok(callers.statuses()[202]! > 0)
      act(`${directory}/relay`)
      // The answers that are on their way may be of before.
      const from = callers.calls.length + 32
      while (callers.calls.length < from + 100) await sleep(10)
      t.same(new Set(callers.calls.slice(from).map(({ status }) => status)), new Set([503]), 'every answer is 503')
      await server.until(/"msg":"outbox write rejected"/)
      await callers.stop()
      t.equal(await server.kill('SIGTERM'), 0)
      undo(`${directory}/relay`)
      sandbox.faults.clear()
      server = await startServer(t, sandbox.url, env)
      await server.emptied()
      // A commit under way when it happened is a 503 that says that the identity may be stored.
      const lost = violations(callers.calls, sandbox.ledger.rows(), { repeats: 400 }).filter(sentence => sentence.endsWith('is lost'))
      if (isKept) t.same(lost, [])
      t.equal(await callers.call(), 202, 'after a restart it stores again')
      await server.emptied()
      t.equal(await server.kill('SIGTERM'), 0)
    })
  }
})
