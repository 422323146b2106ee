import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, statfsSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { createCallers } from '../load.ts'
import { startSandbox } from '../helper.ts'
import { violations } from '../delivery-check.ts'
import { startServer } from '../processes.ts'

t.test('on a full disk the relay answers 503, loses no 202, and stores again when there is room', async t => {
  const mount = mkdtempSync(join(tmpdir(), 'outbox-'))
  if (spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=12m', 'tmpfs', mount]).status !== 0) {
    return t.pass('a full disk', { skip: 'a file system cannot be mounted here' })
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
  t.same(statuses(from), new Set([503]), 'once its own events fill the disk every answer is 503')
  const { bavail, bsize } = statfsSync(mount)
  t.ok(bavail * bsize > 1024 * 1024, 'more than 1 MiB of the reserved tenth is free')

  sandbox.faults.clear()
  await callers.stop()
  await server.emptied()
  t.equal(await callers.call(), 202, 'the emptied outbox stores again')

  // Another program takes all of the disk during the writes.
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
  t.pass('once the free pages of its own file are used up, the answer is 503')
  await server.kill()
  await callers.stop()
  server = await startServer(t, sandbox.url, env)
  t.equal(await server.kill('SIGTERM'), 0, 'the relay starts on a full disk, and ends in order')
  server = await startServer(t, sandbox.url, env)
  callers.start(64)
  rmSync(filler)
  await sleep(1000)
  from = callers.calls.length
  await sleep(300)
  t.same(statuses(from), new Set([202]), 'the outbox stores again when there is room')
  await callers.stop()
  sandbox.faults.clear()
  await server.emptied()
  t.equal(await server.kill('SIGTERM'), 0)
  t.comment(JSON.stringify(callers.statuses()))
  t.same(violations(callers.calls, sandbox.ledger.rows(), { repeats: callers.calls.length }), [])
})
