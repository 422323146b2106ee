import { spawnSync } from 'node:child_process'
import { copyFileSync, mkdirSync, truncateSync, writeFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { createCallers } from '../load.ts'
import { startSandbox, temporary, type Env } from '../helper.ts'
import { violations } from '../delivery-check.ts'
import { inOutboxThread } from '../scenarios.ts'
import { startServer } from '../processes.ts'

/** Mounts the file system in `image`; false where that is not permitted. */
function mount (t: Test, image: string, at: string): boolean {
  mkdirSync(at)
  if (spawnSync('mount', ['-o', 'loop', image, at]).status !== 0) return false
  t.teardown(() => spawnSync('umount', ['-l', at]))
  return true
}

/**
 * Fills the outbox of a relay on a disk, and copies the disk: a copy holds what a power cut would leave, which without
 * fsync is not much. A relay then delivers what is on each copy. Returns the violations.
 */
async function powerCuts (t: Test, { cuts, env = {} as Env }: { cuts: number, env?: Env }) {
  const directory = temporary(t)
  const image = `${directory}/image`
  writeFileSync(image, '')
  truncateSync(image, 64 * 1024 * 1024)
  if (spawnSync('mkfs.ext4', ['-q', image]).status !== 0 || !mount(t, image, `${directory}/disk`)) return undefined
  const outage = await startSandbox(t)
  outage.faults.add({ name: 'edge_down', times: 1_000_000 })
  const server = await startServer(t, outage.url, { OUTBOX: `file:${directory}/disk/outbox`, ...env })
  const callers = createCallers(() => server.url, { async: 1 })
  callers.start(64)
  const answered: number[] = []
  for (let cut = 0; cut < cuts; cut++) {
    await sleep(200 + Math.random() * 400)
    server.child.kill('SIGSTOP')
    // The answers that are under way reach the callers.
    await sleep(50)
    answered.push(callers.calls.length)
    copyFileSync(image, `${image}-${cut}`)
    server.child.kill('SIGCONT')
  }
  await callers.stop()
  await server.kill()
  const found: string[] = []
  for (const [cut, count] of answered.entries()) {
    const sandbox = await startSandbox(t)
    mount(t, `${image}-${cut}`, `${directory}/disk-${cut}`)
    const next = await startServer(t, sandbox.url, { OUTBOX: `file:${directory}/disk-${cut}/outbox` })
    await next.emptied()
    t.equal(await next.kill('SIGTERM'), 0)
    // The outcome of later calls is unknown at that moment.
    const calls = callers.calls.map(({ identity, status }, index) => index < count ? { identity, ...status && { status } } : { identity })
    found.push(...violations(calls, sandbox.ledger.rows()))
  }
  t.comment(`answers at the cuts: ${answered}`)
  return found
}

const SKIPPED = 'a file system cannot be made and mounted here'

t.test('after each of 8 power cuts what was answered 202 is on the disk', async t => {
  const found = await powerCuts(t, { cuts: 8 })
  if (found === undefined) return t.pass('a power cut', { skip: SKIPPED })
  t.same(found, [])
})

t.test('the check finds an outbox that does not wait for the disk', async t => {
  const careless = inOutboxThread(`
    const { exec } = Database.prototype
    Database.prototype.exec = function (sql) { return exec.call(this, sql.replace('synchronous = FULL', 'synchronous = OFF')) }`)
  const found = await powerCuts(t, { cuts: 2, env: { NODE_OPTIONS: careless } })
  if (found === undefined) return t.pass('a power cut', { skip: SKIPPED })
  t.ok(found.some(sentence => sentence.endsWith('got 202 and is lost')), `a lost 202 is among ${found.length} violations`)
})
