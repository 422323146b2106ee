import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { runAdminCommand } from '#src/commands/admin.js'
import { callAdminSocket, serveAdminSocket } from '#src/commands/admin-socket.js'
import { outboxCommand } from '#src/commands/outbox.js'
import { projectOf, readConfig } from '#src/config.js'
import { identifyEvent } from '#src/identity/event.js'
import { openOutbox } from '#src/outbox/open.js'
import { openSqlite } from '#src/outbox/sqlite.js'
import { violations } from './delivery-check.ts'
import { emptied, identity, leaks, silent, startRelayWithOutbox, startSandbox, temporary, TOKEN, type Env, type Relay } from './helper.ts'
import { createCallers } from './load.ts'
import { SERVER, startProcess, startServer } from './processes.ts'

const DAY = 24 * 3600 * 1000
const outage = { name: 'edge_down' as const, times: 1_000_000 }

async function lines (relay: Relay, ...args: string[]): Promise<string[]> {
  let text = ''
  for await (const chunk of runAdminCommand(relay.outbox, relay.config, args)) text += chunk
  return text.split('\n').filter(line => line !== '')
}

// Most of these tests wait for a process or for a bound in time.
t.jobs = 3

t.test('the outbox commands list, replay and drop dead letters', async t => {
  const relay = await startRelayWithOutbox(t)
  relay.sandbox.faults.add(outage)
  const [refused, large] = [identity(), identity()]
  for (const one of [refused, large]) await relay.post(one)
  const old = identifyEvent(identity(), Date.now() - 5 * DAY)
  t.equal(await relay.outbox.put(old), 'stored')
  const waiting = (await lines(relay, 'list')).map(line => JSON.parse(line))
  t.match(waiting, [{ identified_id: refused.identified_id, anon_id: refused.anon_id }, { identified_id: large.identified_id }, { validated: /^20/ }])
  relay.sandbox.faults.clear()
  relay.sandbox.faults.add({ name: 'refused', times: 12 }, { name: 'too_large', times: 12 })
  await emptied(relay)
  const dead = (await lines(relay, 'dead')).map(line => JSON.parse(line))
  t.same(dead.map(letter => letter.reason).sort(), ['event, invalid', 'event, invalid', 'older than 4.5 days'].sort())
  t.same(await lines(relay, 'drop', '0'), ['0 dropped.', '1 unknown: see outbox dead.'])
  t.ok(relay.logged().some(line => line.level === 40 && line.msg === 'identities dead-lettered'))
  relay.sandbox.faults.clear()

  const letterOf = (insertId: string) => dead.find(letter => letter.insert_id === insertId)
  t.same(await lines(relay, 'replay', String(letterOf(old.insertId).id), '999'),
    ['1 queued again, 1 of them for /import: too old for /track.', '1 unknown: see outbox dead.'])
  await emptied(relay)
  t.match(relay.sandbox.ledger.rows().at(-1), { endpoint: 'import', properties: { $insert_id: old.insertId, time: old.time } })
  const [one, other] = dead.filter(letter => letter.insert_id !== old.insertId)
  t.same(await lines(relay, 'drop', String(one.id)), ['1 dropped.'])
  t.same(await lines(relay, 'replay', 'all'), ['1 queued again.'])
  await emptied(relay)
  t.equal(relay.sandbox.ledger.rows().at(-1)?.properties.$identified_id, other.identified_id)
  t.same(await lines(relay, 'dead'), [])
  t.same(await lines(relay, 'drop', 'all'), ['0 dropped.'])
  for (const args of [[], ['delete'], ['replay'], ['drop'], ['list', 'all'], ['drop', 'all', '17'], ['replay', '1', 'all'], ['drop', '--user'], ['drop', '--user', 'a', 'b'], ['pause', '1']]) {
    await t.rejects(lines(relay, ...args), { message: /^outbox.*\.$/ }, `outbox ${args.join(' ')} is an error`)
  }
})

t.test('drop --user erases one user, queued or dead', async t => {
  const relay = await startRelayWithOutbox(t)
  await lines(relay, 'pause')
  const event = (user: string, age = 0) => identifyEvent(identity({ identified_id: user }), Date.now() - age)
  for (const one of [event('erased'), event('kept'), event('erased', 5 * DAY)]) await relay.outbox.put(one)
  await relay.outbox.pause(false)
  const [, , old] = await relay.outbox.next(10)
  await relay.outbox.deadLetter([{ entry: old!, reason: 'why' }])
  await relay.outbox.pause(true)
  t.same(await lines(relay, 'drop', '--user', 'erased'), ['1 queued and 1 dead letters dropped.'])
  t.same(await lines(relay, 'drop', '--user', 'erased'), ['0 queued and 0 dead letters dropped.'])
  t.same((await lines(relay, 'list')).map(line => JSON.parse(line).identified_id), ['kept'])
  while (!relay.lines.some(line => line.includes('paused by an operator'))) await sleep(20)
  await lines(relay, 'resume')
  await emptied(relay)
  t.match(relay.logged().filter(({ msg }) => /by an operator/.test(String(msg))).map(({ level }) => level), [40, 30])
})

t.test('in a project with Simplified ID Merge the commands name and erase users as well', async t => {
  const relay = await startRelayWithOutbox(t, { env: { MIXPANEL_ID_MERGE: 'simplified' }, sandbox: { mode: 'simplified' } })
  await lines(relay, 'pause')
  const post = (user: string, anon: string) => relay.post({ identified_id: user, anon_id: anon }, { headers: { prefer: 'respond-async' } })
  for (const user of ['erased', 'kept', 'erased']) t.equal((await post(user, `$device:of-${user}`)).statusCode, 202)
  t.match((await lines(relay, 'list')).map(line => JSON.parse(line)), [{ identified_id: 'erased', anon_id: 'of-erased' }, { identified_id: 'kept' }, {}])
  t.same(await lines(relay, 'drop', '--user', 'erased'), ['2 queued and 0 dead letters dropped.'])
  t.same((await lines(relay, 'list')).map(line => JSON.parse(line).identified_id), ['kept'])
})

t.test('pause stops delivery, over restarts, and identities are queued until resume', async t => {
  const sandbox = await startSandbox(t)
  const env = { OUTBOX: `file:${temporary(t)}/outbox` }
  const run = async (...args: string[]) => {
    const { exit, output } = startProcess(t, SERVER, ['outbox', ...args], { MIXPANEL_TOKEN: TOKEN, ...env })
    t.equal(await exit, 0, output())
    return output()
  }
  let server = await startServer(t, sandbox.url, env, { isCovered: true })
  t.match(await run('pause'), /^Delivery is paused/)
  await server.until(/"level":40.*"action":"pause","msg":"outbox command"/)
  t.equal((await server.post()).status, 202)
  t.match((await server.parts()).outbox, { waiting: 1, paused: true })
  t.equal(await server.kill('SIGTERM'), 0)
  server = await startServer(t, sandbox.url, env)
  await server.until(/"level":40.*outbox delivery paused by an operator/)
  t.equal((await server.post()).status, 202)
  t.equal(sandbox.requests.length, 0)
  t.match(await run('resume'), /^Delivery goes on/)
  await server.emptied()
  await server.until(/outbox delivery resumed by an operator/)
  t.equal(sandbox.ledger.rows().length, 2)
  t.equal((await server.post()).status, 200)
  t.equal(await server.kill('SIGTERM'), 0)
})

t.test('drop all removes more than a thousand dead letters', async t => {
  const relay = await startRelayWithOutbox(t)
  relay.sandbox.faults.add({ name: 'refused', times: 10_000 })
  const old = Array.from({ length: 1200 }, () => identifyEvent(identity(), Date.now() - 5 * DAY))
  await Promise.all(old.map(event => relay.outbox.put(event)))
  relay.relay.identify(old[0]!, { isAsync: true })
  await emptied(relay)
  t.same(await lines(relay, 'drop', '--all'), ['1201 dropped.'])
  t.match(relay.outbox.counts(), { waiting: 0, dead: 0 })
})

t.test('the admin socket returns the whole answer or an error', async t => {
  const directory = temporary(t)
  const close = await serveAdminSocket(directory, async function * ([name]) {
    if (name === 'refuse') throw new Error('no')
    for (let line = 0; line < 5000; line++) yield `${'x'.repeat(99)}\n`
    if (name === 'break') throw new Error('in the middle')
    if (name === 'forever') for (;;) yield `${'x'.repeat(9999)}\n`
  })
  const ask = async (name: string, most = Infinity) => {
    let length = 0
    for await (const text of callAdminSocket(directory, [name])) {
      length += text.length
      if (length > most) break
    }
    return length
  }
  t.equal(await ask('list'), 500_000)
  await t.rejects(ask('refuse'), { message: 'no' })
  await t.rejects(ask('break'))
  t.ok(await ask('forever', 1_000_000) > 1_000_000)
  await sleep(100)
  close()
  await t.rejects(ask('list'), { message: /does not accept commands/ })
})

t.test('a directory belongs to one relay, which answers the outbox commands', async t => {
  const sandbox = await startSandbox(t)
  const env = { MIXPANEL_TOKEN: TOKEN, OUTBOX: `file:${temporary(t)}/outbox` }
  const server = await startServer(t, sandbox.url, env)
  const second = startProcess(t, SERVER, [], { ...env, PORT: '0' }, { isCovered: true })
  t.equal(await second.exit, 1)
  t.match(second.output(), /^The relay cannot continue: another process uses the outbox in .*\/outbox\/relay\.\n$/)

  sandbox.faults.add(outage)
  const callers = createCallers(() => server.url, { async: 1 })
  await Promise.all(Array.from({ length: 6 }, async () => {
    for (let count = 0; count < 100; count++) await callers.call()
  }))
  const run = async (...args: string[]) => {
    const { exit, output } = startProcess(t, SERVER, ['outbox', ...args], env)
    const code = await exit
    t.same(leaks(output()), [])
    return { code, lines: output().split('\n').slice(0, -1) }
  }
  const list = await run('list')
  t.equal(list.code, 0)
  t.same(list.lines.map(line => JSON.parse(line).identified_id).sort(), callers.calls.map(({ identity }) => identity.identified_id).sort(),
    'list prints every entry')
  t.same(await run('drop'), { code: 1, lines: ['outbox drop takes ids, or all.'] })
  t.match((await server.parts()).outbox, { waiting: 600, dead: 0 })

  await server.kill()
  t.same(await run('list'), list, 'without a relay the command opens the directory itself')
  const next = await startServer(t, sandbox.url, env, { isCovered: true })
  t.same(await run('list'), list, 'the next relay answers as well')
  sandbox.faults.clear()
  await next.emptied()
  t.equal(await next.kill('SIGTERM'), 0)
  t.same(violations(callers.calls, sandbox.ledger.rows(), { repeats: 400 }), [])
})

t.test('the outbox commands ask the relay, or open the outbox, or say why they cannot', async t => {
  const config = readConfig({ MIXPANEL_TOKEN: TOKEN }, () => '')
  const run = async (env: Partial<typeof config>) => {
    for await (const text of outboxCommand({ ...config, ...env }, ['list'])) t.comment(text)
  }
  await t.rejects(run({}), { name: 'UsageError', message: 'OUTBOX is off: there is no outbox.' })
  await t.rejects(run({ OUTBOX: 'file:/nowhere/outbox' }), { name: 'UsageError', message: 'There is no outbox in /nowhere/outbox.' })
  await t.rejects(run({ OUTBOX: 'file:README.md' }), { name: 'UsageError', message: 'There is no outbox in README.md.' })
  await t.rejects(openOutbox({ ...config, OUTBOX: 'file:README.md' }, undefined, silent), { message: /^OUTBOX: README\.md cannot be used: / })
  const directory = `${temporary(t)}/outbox`
  const outbox = await openSqlite(`${directory}/relay`, projectOf(config), silent, { maxEntries: 10 })
  await t.rejects(run({ OUTBOX: `file:${directory}` }),
    { name: 'UsageError', message: /^The process that uses \/.*\/outbox\/relay does not accept commands \(ENOENT\): stop it first\.$/ })
  const closeSocket = await serveAdminSocket(`${directory}/relay`, async function * () { yield 'from the relay' })
  await run({ OUTBOX: `file:${directory}` })
  closeSocket()
  await outbox.close()
  await run({ OUTBOX: `file:${directory}` })
  const long = `${t.testdir({})}/${'long'.repeat(40)}`
  const other = await openSqlite(`${long}/relay`, projectOf(config), silent, { maxEntries: 10 })
  await t.rejects(run({ OUTBOX: `file:${long}` }), { name: 'UsageError', message: /^\/.*operators\.sock is too long for a socket: stop the relay\.$/ })
  await other.close()
})

t.test('a directory whose path is too long for a socket is a warning of the relay', async t => {
  const { url } = await startSandbox(t)
  const env: Env = { MIXPANEL_TOKEN: TOKEN, OUTBOX: `file:${t.testdir({})}/${'long'.repeat(40)}` }
  const server = await startServer(t, url, env, { isCovered: true })
  t.match(server.output(), /no socket in the outbox directory/)
})
