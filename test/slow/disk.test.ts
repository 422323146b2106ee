import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, statfsSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { createCallers } from '../load.ts'
import { startSandbox } from '../helper.ts'
import { violations } from '../delivery-check.ts'
import { startServer } from '../scenarios.ts'

t.test('a full disk: 503, never a 202 that is not on disk, and it goes on when there is room', async t => {
  const mount = mkdtempSync(join(tmpdir(), 'outbox-'))
  if (spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=12m', 'tmpfs', mount]).status !== 0) {
    return t.pass('a full disk', { skip: 'no file system can be mounted here' })
  }
  t.teardown(() => spawnSync('umount', ['-l', mount]))
  const sandbox = await startSandbox(t)
  const env = { OUTBOX: `file:${mount}/outbox` }
  let server = await startServer(t, sandbox.url, env)
  const callers = createCallers(() => server.url, { async: 1 })
  const statuses = (from: number) => new Set(callers.calls.slice(from).map(({ status }) => status))
  sandbox.faults.add({ name: 'edge_down', times: 1_000_000 })
  callers.start(64)
  while (!statuses(0).has(503)) await sleep(100)
  await sleep(1000)
  let from = callers.calls.length
  await sleep(500)
  t.same(statuses(from), new Set([503]), 'its own identities fill the disk')
  const { bavail, bsize } = statfsSync(mount)
  t.ok(bavail * bsize > 1024 * 1024, 'of the tenth that is reserved nearly all is left')

  sandbox.faults.clear()
  await callers.stop()
  await server.drained()
  t.equal(await callers.call(), 202, 'emptied, it keeps again')

  // Somebody else takes all of it, in the middle of the writing.
  sandbox.faults.add({ name: 'edge_down', times: 1_000_000 })
  callers.start(64)
  await sleep(300)
  const filler = `${mount}/filler`
  try {
    for (let size = bavail * bsize; size > 4096; size = Math.floor(size / 2)) writeFileSync(filler, Buffer.alloc(size), { flag: 'a' })
  } catch (error) {
    t.match(error, { code: 'ENOSPC' })
  }
  from = callers.calls.length
  while (!statuses(from).has(503)) await sleep(100)
  t.pass('when also the free pages of its own file are used up, it keeps nothing')
  await server.kill()
  await callers.stop()
  server = await startServer(t, sandbox.url, env)
  t.equal(await server.kill('SIGTERM'), 0, 'it starts on a full disk, and ends in order')
  server = await startServer(t, sandbox.url, env)
  callers.start(64)
  rmSync(filler)
  await sleep(1000)
  from = callers.calls.length
  await sleep(300)
  t.same(statuses(from), new Set([202]), 'and goes on when there is room')
  await callers.stop()
  sandbox.faults.clear()
  await server.drained()
  t.equal(await server.kill('SIGTERM'), 0)
  t.comment(JSON.stringify(callers.told()))
  t.same(violations(callers.calls, sandbox.ledger.rows(), { repeats: callers.calls.length }), [])
})
