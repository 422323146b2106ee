import { spawnSync } from 'node:child_process'
import { copyFileSync, mkdirSync, truncateSync, writeFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { createCallers } from '../load.ts'
import { startSandbox, temporary, type Env } from '../helper.ts'
import { violations } from '../delivery-check.ts'
import { startServer } from '../scenarios.ts'

/** A file system of its own in `image`; false where that is not permitted, or mkfs.ext4 is not installed. */
function mount (t: Test, image: string, at: string): boolean {
  mkdirSync(at)
  if (spawnSync('mount', ['-o', 'loop', image, at]).status !== 0) return false
  t.teardown(() => spawnSync('umount', ['-l', at]))
  return true
}

/**
 * The relay keeps what many send it, on a disk of which copies are made: what the disk holds at that moment is what a
 * power cut would leave, and without fsync that is not much. A relay then delivers what it finds on each copy.
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
  const told: number[] = []
  for (let cut = 0; cut < cuts; cut++) {
    await sleep(200 + Math.random() * 400)
    server.child.kill('SIGSTOP')
    // What was answered by now is on its way to the callers.
    await sleep(50)
    told.push(callers.calls.length)
    copyFileSync(image, `${image}-${cut}`)
    server.child.kill('SIGCONT')
  }
  await callers.stop()
  await server.kill()
  const broken: string[] = []
  for (const [cut, count] of told.entries()) {
    const sandbox = await startSandbox(t)
    mount(t, `${image}-${cut}`, `${directory}/disk-${cut}`)
    const heir = await startServer(t, sandbox.url, { OUTBOX: `file:${directory}/disk-${cut}/outbox` })
    await heir.drained()
    t.equal(await heir.kill('SIGTERM'), 0)
    // Nobody knows yet what the later ones were told.
    const calls = callers.calls.map(({ identity, status }, index) => index < count ? { identity, ...status && { status } } : { identity })
    broken.push(...violations(calls, sandbox.ledger.rows()))
  }
  t.comment(`acknowledged at the cuts: ${told}`)
  return broken
}

const SKIPPED = 'no file system can be made and mounted here'

t.test('power cuts, 8 of them: what was acknowledged is on the disk', async t => {
  const broken = await powerCuts(t, { cuts: 8 })
  if (broken === undefined) return t.pass('a power cut', { skip: SKIPPED })
  t.same(broken, [])
})

t.test('the check has teeth: an outbox that does not wait for the disk loses', async t => {
  const careless = `data:text/javascript,${encodeURIComponent(`
    import Database from 'file://${process.cwd()}/node_modules/libsql/index.js'
    const { exec } = Database.prototype
    Database.prototype.exec = function (sql) { return exec.call(this, sql.replace('synchronous = FULL', 'synchronous = OFF')) }`)}`
  const broken = await powerCuts(t, { cuts: 2, env: { NODE_OPTIONS: `--import=${careless}` } })
  if (broken === undefined) return t.pass('a power cut', { skip: SKIPPED })
  t.ok(broken.some(sentence => sentence.endsWith('was told 202 and is lost')), `${broken.length} sentences`)
})
