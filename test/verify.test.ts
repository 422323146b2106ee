import { readFileSync, writeFileSync } from 'node:fs'
import { randomUUID } from 'node:crypto'
import { createServer, type RequestListener } from 'node:http'
import { createServer as createTlsServer } from 'node:https'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { gzipSync } from 'node:zlib'
import { t, type Test } from 'tap'
import { createDigestSet } from '#src/commands/digest-set.js'
import { verifyCommand } from '#src/commands/verify.js'
import { dataUrl, exportEvents } from '#src/mixpanel/export.js'
import { startGet } from '#src/get.js'
import { readConfig } from '#src/config.js'
import { identity, leaks, startRelay, startSandbox, temporary, TOKEN, type Env } from './helper.ts'
import { SERVER, startProcess, startServer } from './processes.ts'

t.jobs = 3
const ACCOUNT = 'me:CANARY-SECRET'
const today = new Date().toISOString().slice(0, 10)
const DAY = ['--from', '2026-03-02', '--to', '2026-03-03']
const config = (url: string, env: Env = {}) => readConfig({
  MIXPANEL_TOKEN: TOKEN, MIXPANEL_DATA_URL: url, MIXPANEL_SERVICE_ACCOUNT: ACCOUNT, MIXPANEL_PROJECT_ID: '1', ...env
}, () => '')

/** A data API that gives these answers, one for each request, and then the last again. */
async function startData (t: Test, ...answers: RequestListener[]) {
  const urls: string[] = []
  const server = createServer((request, response) => {
    urls.push(String(request.url))
    answers[Math.min(urls.length, answers.length) - 1]?.(request, response)
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, urls, query: (index = 0) => Object.fromEntries(new URL(`http://x${urls[index]}`).searchParams) }
}

const event = (id: string, more: object = {}, name = '$identify') => ({
  event: name, properties: { time: 1772452800, $insert_id: id, distinct_id: `user-${id}`, $identified_id: `user-${id}`, $anon_id: `anon-${id}`, ...more }
})
const lines = (events: object[]) => events.map(one => `${JSON.stringify(one)}\n`).join('')
const answer = (text: string, status = 200): RequestListener => (_, response) => { response.writeHead(status).end(text) }

async function verify (url: string, args: string[], { env = {} as Env, log = '' } = {}) {
  let code: number | undefined
  const reports: string[] = []
  let text = ''
  const output = { stdin: Readable.from([log]), report: (line: string) => { reports.push(line) }, exit: (exitCode: number) => { code = exitCode } }
  for await (const part of verifyCommand(config(url, env), args, output)) text += part
  return { code, reports, found: text.trim() === '' ? [] : text.trim().split('\n').map(line => JSON.parse(line)) }
}

t.test('verify prints what Mixpanel refused, once for each $insert_id, and with --all the rest', async t => {
  const events = [
    event('1'), event('2', { $failure_reason: 'errManyIDs' }), event('2', { $failure_reason: 'errManyIDs' }), event('3', { $distinct_id_before_identity: 'x' }),
    event('4', { $failure_reason: '' }), event('5', { $failure_reason: 'no' }, 'Page view'), event('6', { $preshuffle_distinct_id: 'x' }),
    { event: '$identify', properties: { time: 1, $identified_id: 'a', $anon_distinct_id: 'b', $failure_reason: 'without an id' } },
    { event: '$identify', properties: { time: 2, distinct_id: 'c', $insert_id: '7', $failure_reason: 'without ids' } }
  ]
  const { url, query } = await startData(t, answer(lines(events)))
  const { code, reports, found } = await verify(url, DAY)
  t.equal(code, 2)
  t.same(found, [
    { verdict: 'refused', reason: 'errManyIDs', identified_id: 'user-2', anon_id: 'anon-2', insert_id: '2', time: 1772452800 },
    { verdict: 'refused', reason: 'without an id', identified_id: 'a', anon_id: 'b', time: 1 },
    { verdict: 'refused', reason: 'without ids', identified_id: 'c', insert_id: '7', time: 2 }
  ])
  t.same(reports, ['refused: 3, merged: 2, no_failure: 2, not_seen: 0'])
  t.same(query(), { project_id: '1', from_date: '2026-03-01', to_date: '2026-03-04', event: '["$identify"]' })
  const all = await verify(url, [...DAY, '--all'])
  t.same(all.found.map(({ verdict, insert_id: id }) => `${id} ${verdict}`), ['1 no_failure', '2 refused', '3 merged', '4 no_failure', '6 merged', 'undefined refused', '7 refused'])
  const fine = await startData(t, answer(lines([event('1')])))
  t.match(await verify(fine.url, DAY), { code: 0, found: [] })
})

t.test('in Simplified ID Merge verify reads the ordinary event', async t => {
  const row = (id: string, more = {}) => ({ event: 'identity association', properties: { time: 1, $insert_id: id, distinct_id: 'u', $user_id: 'u', $device_id: 'd', ...more } })
  const { url, query } = await startData(t, answer(lines([row('1'), row('2', { $identity_failure_reason: 'errAnonDistinctIdAssignedAlready' }), event('3', { $failure_reason: 'x' })])))
  const { found, code } = await verify(url, DAY, { env: { MIXPANEL_ID_MERGE: 'simplified' } })
  t.equal(code, 2)
  t.same(found, [{ verdict: 'refused', reason: 'errAnonDistinctIdAssignedAlready', identified_id: 'u', anon_id: 'd', insert_id: '2', time: 1 }])
  t.equal(query().event, '["identity association"]')
})

t.test('verify --sent prints what a log has as sent and Mixpanel does not have', async t => {
  const { url } = await startData(t, answer(lines([event('1'), event('2'), event('batch-1')])))
  const at = (day: string) => Date.parse(`2026-03-${day}T12:00:00Z`)
  const log = [
    { time: at('02'), status: 200, insert_id: '1' }, { time: at('02'), status: 202, insert_id: '2' }, { time: at('03'), status: 200, insert_id: 'lost' },
    { time: at('03'), status: 200, insert_id: 'lost' }, { time: at('03'), status: 422, insert_id: 'refused' }, { time: at('01'), status: 200, insert_id: 'earlier' },
    { time: at('04'), status: 200, insert_id: 'later' }, { time: at('02'), status: 207, insert_ids: ['batch-1', 'batch-2'] }, { time: at('02'), status: 200 }, { level: 30, msg: 'x' }
  ].map(line => JSON.stringify(line))
  const text = ['no JSON', `2026-03-03T12:00:00Z stdout F ${log[2]}`, ...log, '{"time":1'].join('\n')
  const { code, found, reports } = await verify(url, [...DAY, '--sent', '-'], { log: text })
  t.equal(code, 2)
  t.same(found, [
    { verdict: 'not_seen', insert_id: 'lost', time: at('03') / 1000 }, { verdict: 'not_seen', insert_id: 'batch-2', time: at('02') / 1000 }
  ])
  t.match(reports, ['refused: 0, merged: 0, no_failure: 3, not_seen: 2', /45 minutes/])
  t.match(await verify(url, [...DAY, '--sent', '-'], { log: log[0] as string }), { code: 0, found: [] })
  await t.rejects(verify(url, [...DAY, '--sent', '-'], { log: 'another file' }), { name: 'UsageError', message: /names no identity.*LOG_LEVEL=info/ })
})

t.test('an export that is not complete is never "all fine"', async t => {
  const good = lines([event('1')])
  const cut: RequestListener = (_, response) => {
    response.writeHead(200, { 'transfer-encoding': 'chunked' }).write(good)
    setTimeout(() => response.socket?.destroy(), 50)
  }
  const cutGzip: RequestListener = (_, response) => { response.writeHead(200, { 'content-encoding': 'gzip' }).end(gzipSync(good.repeat(50)).subarray(0, -12)) }
  const endless: RequestListener = (request, response) => { response.socket?.end(`HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n${good}`) }
  const rows: [words: RegExp, answer: RequestListener][] = [
    [/broke off/, cut], [/broke off/, cutGzip], [/broke off/, (_, response) => { response.writeHead(200, { 'content-encoding': 'gzip' }).end(good) }],
    [/no length/, endless], [/terminated the export early/, answer(`${good}terminated early\n`)], [/a line is no event/, answer(`${good}{"event":"$iden`)],
    [/a line is no event/, answer('{"error":"a fault"}')], [/a line is no event/, answer('<html>')], [/more than 4 MB/, answer(`"${'x'.repeat(5_000_000)}`)],
    [/rejected the service account.*MIXPANEL_SERVICE_ACCOUNT \(Invalid\)/, answer('Invalid', 401)], [/plan of the project has no raw export/, answer('', 402)],
    [/may not read the project.*MIXPANEL_PROJECT_ID/, answer('', 403)], [/answered 400 \(bad \*\*\* range\)/, answer('bad CANARY-SECRET range', 400)], [/answered 302/, answer('', 302)],
    [/answered 400/, answer('x'.repeat(5000), 400)], [/cannot be reached/, request => request.socket.destroy()]
  ]
  for (const [words, one] of rows) {
    const { url, urls } = await startData(t, one)
    await t.rejects(verify(url, DAY), { name: 'UsageError', message: words }, String(words))
    t.equal(urls.length, 1, 'it is not asked again')
  }
  await t.rejects(verify('http://127.0.0.1:9', DAY), { message: /It cannot be told what merged: Mixpanel cannot be reached \(ECONNREFUSED\)/ })
})

t.test('the export has a base URL of its own, and a server that cannot be trusted gets no account', async t => {
  const urlOf = (env: Env) => dataUrl(readConfig({ MIXPANEL_TOKEN: TOKEN, ...env }, () => ''))
  t.equal(urlOf({}), 'https://data.mixpanel.com')
  t.equal(urlOf({ MIXPANEL_REGION: 'eu' }), 'https://data-eu.mixpanel.com')
  t.equal(urlOf({ MIXPANEL_REGION: 'in' }), 'https://data-in.mixpanel.com')
  t.equal(urlOf({ MIXPANEL_URL: 'https://gateway.example/' }), 'https://gateway.example')
  t.equal(urlOf({ MIXPANEL_URL: 'https://gateway.example', MIXPANEL_DATA_URL: 'https://data.example' }), 'https://data.example')
  const pem = readFileSync('test/localhost.pem')
  const tls = createTlsServer({ key: pem, cert: pem }, () => t.fail('a request arrives')).listen(0, '127.0.0.1')
  await once(tls, 'listening')
  t.teardown(() => { tls.close() })
  await t.rejects(verify(`https://localhost:${(tls.address() as AddressInfo).port}`, DAY), { message: /cannot be reached \(DEPTH_ZERO_SELF_SIGNED_CERT\)/ })
  const blank = await startData(t, answer(`\n${lines([event('1')])}\n \n`))
  t.match(await verify(blank.url, DAY), { code: 0 })
})

t.test('a limit and a failure are waited for, as long as Mixpanel asks', async t => {
  const events = async (url: string) => {
    const waits: number[] = []
    const list: object[] = []
    for await (const part of exportEvents(config(url), { from: '2026-03-01', to: '2026-03-02', event: '$identify' }, async seconds => { waits.push(seconds) })) list.push(...part)
    return { waits, list }
  }
  const gzipped: RequestListener = (_, response) => { response.writeHead(200, { 'content-encoding': 'gzip' }).end(gzipSync(lines([event('1'), event('2')]).trimEnd())) }
  const limited: RequestListener = (_, response) => { response.writeHead(429, { 'retry-after': '7' }).end('x') }
  const { url, urls } = await startData(t, answer('', 503), limited, answer('', 500), gzipped)
  const { waits, list } = await events(url)
  t.equal(list.length, 2)
  t.equal(urls.length, 4)
  t.ok(waits[0]! >= 3 && waits[0]! <= 7, `2 s and 1 to 5 s of jitter, and was ${waits[0]}`)
  t.equal(waits[1], 7)
  t.ok(waits[2]! >= 9 && waits[2]! <= 13)
  const down = await startData(t, answer('busy', 503))
  await t.rejects(events(down.url), { message: /answered 503 \(busy\)/ })
  t.equal(down.urls.length, 7)
  const brief = await startData(t, (_, response) => { response.writeHead(429, { 'retry-after': '0.01' }).end() }, answer(lines([event('1')])))
  for await (const part of exportEvents(config(brief.url), { from: '2026-03-01', to: '2026-03-02', event: '$identify' })) t.equal(part.length, 1)
  t.equal(brief.urls.length, 2)
  const always = await startData(t, limited)
  await t.rejects(events(always.url), { message: /limits the exports.*an hour/ })
})

t.test('a server that is silent is not waited for', async t => {
  const { url } = await startData(t, () => {})
  await t.rejects(once(startGet(url, { timeoutMs: 50 }), 'response'), { code: 'ETIMEDOUT', message: 'no answer in 50 ms' })
})

t.test('days that have not begun are not asked for', async t => {
  const early = answer('to_date cannot be later than today', 400)
  const { url, query, urls } = await startData(t, early, answer(lines([event('1')])))
  t.match(await verify(url, ['--from', '2026-01-01', '--to', today]), { code: 0 })
  t.equal(query(0).to_date, today)
  t.equal(query(1).to_date, new Date(Date.now() - 86_400_000).toISOString().slice(0, 10), 'a project west of Greenwich has yesterday')
  t.equal(urls.length, 2)
  const other = await startData(t, answer('another fault', 400))
  await t.rejects(verify(other.url, ['--from', '2026-01-01', '--to', today]), { message: /another fault/ })
})

t.test('wrong arguments, and a configuration without an account, are a sentence', async t => {
  const days = [[], ['--from', '2026-01-01'], ['--from', '2026-02-30', '--to', '2026-03-01'], ['--from', '2026-03-02', '--to', '2026-03-01'], ['--from', '1', '--to', '2'], [...DAY, '--more'], [...DAY, 'x']]
  for (const args of days) await t.rejects(verify('http://127.0.0.1:9', args), { name: 'UsageError', message: /use verify --from/ })
  await t.rejects((async () => { for await (const _ of verifyCommand(readConfig({ MIXPANEL_TOKEN: TOKEN }, () => ''), DAY, {} as never)) t.fail(_) })(), { message: /needs MIXPANEL_SERVICE_ACCOUNT and MIXPANEL_PROJECT_ID/ })
})

t.test('the set of digests takes at most 16 bytes for each of many', async t => {
  const set = createDigestSet()
  for (let index = 0; index < 300_000; index++) if (!set.add(`id-${index}`)) t.fail(`id-${index} is new`)
  for (let index = 0; index < 300_000; index += 7) if (set.add(`id-${index}`) || !set.has(`id-${index}`)) t.fail(`id-${index} is known`)
  t.notOk(set.has('id-300000'))
  t.ok(set.bytes() / 300_000 <= 16, `${(set.bytes() / 300_000).toFixed(1)} bytes`)
})

t.test('verify reads the log and the export of a relay, as processes', async t => {
  const sandbox = await startSandbox(t, { serviceAccounts: [ACCOUNT] })
  const relay = await startServer(t, sandbox.url)
  const phone = identity()
  const bodies = [phone, identity(), { ...identity(), anon_id: phone.anon_id }]
  for (const body of bodies) t.equal((await relay.post(body)).status, 200)
  const batch = await fetch(`${relay.url}/identify/batch`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ identities: [identity(), { identified_id: 'null' }, identity()] }) })
  t.equal(batch.status, 207)
  await relay.kill('SIGTERM')
  const file = join(temporary(t), 'relay.log')
  const lost = { level: 30, time: Date.now(), status: 200, insert_id: 'f'.repeat(32), msg: 'request completed' }
  writeFileSync(file, `${relay.output()}${JSON.stringify(lost)}\n`)
  const env = { MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: sandbox.url, MIXPANEL_SERVICE_ACCOUNT: ACCOUNT, MIXPANEL_PROJECT_ID: '1' }
  const days = ['--from', today, '--to', today]
  const { exit, output } = startProcess(t, SERVER, ['verify', ...days, '--sent', file, '--all'], env, { isCovered: true })
  t.equal(await exit, 2)
  t.match(output(), /refused: 1, merged: 4, no_failure: 0, not_seen: 1/)
  t.match(output(), new RegExp(`"verdict":"not_seen","insert_id":"${'f'.repeat(32)}"`))
  t.match(output(), /"verdict":"refused","reason":"errAnonDistinctIdAssignedAlready"/)
  t.same(leaks(output()), [])
  const missing = startProcess(t, SERVER, ['verify', ...days, '--sent', '/nowhere/relay.log'], env, { isCovered: true })
  t.equal(await missing.exit, 1)
  t.match(missing.output(), /The log cannot be read \(ENOENT\)/)
  const user = randomUUID()
  const batchOfMany = { identities: Array.from({ length: 400 }, () => identity({ identified_id: user })) }
  const second = await startServer(t, sandbox.url)
  await fetch(`${second.url}/identify/batch`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(batchOfMany) })
  await second.kill('SIGTERM')
  const piped = startProcess(t, SERVER, ['verify', ...days, '--sent', '-', '--all'], env, { isCovered: true })
  piped.child.stdin?.end(second.output())
  t.equal(await piped.exit, 2)
  t.match(piped.output(), /refused: 1, merged: 404, no_failure: 0, not_seen: 0/)
  t.equal(piped.output().trim().split('\n').filter(line => line.startsWith('{')).length, 405, 'a long output is whole')
  sandbox.faults.add({ name: 'cut', ms: 0 })
  const broken = startProcess(t, SERVER, ['verify', ...days], env)
  t.equal(await broken.exit, 1)
  t.match(broken.output(), /It cannot be told what merged/)
})

t.test('a bug is not told as an incomplete export', async t => {
  const { url } = await startData(t, answer(lines([event('1')])))
  const broken = { ...config(url) } as ReturnType<typeof config>
  Object.defineProperty(broken, 'MIXPANEL_DATA_URL', { get () { throw new TypeError('a bug') } })
  await t.rejects((async () => { for await (const _ of verifyCommand(broken, DAY, {} as never)) t.fail(_) })(), { name: 'TypeError', message: 'a bug' })
})

t.test('the sandbox exports with lag, and only to whom may read', async t => {
  const { post, sandbox } = await startRelay(t, { sandbox: { serviceAccounts: [ACCOUNT], exportLagMs: 3_600_000 } })
  await post(identity())
  const get = async (query: string, account = ACCOUNT) => {
    const answer = await fetch(`${sandbox.url}/api/2.0/export?${query}`, { headers: { authorization: `Basic ${btoa(account)}`, 'accept-encoding': 'identity' } })
    return { status: answer.status, text: await answer.text() }
  }
  const days = `from_date=${today}&to_date=${today}`
  t.same(await get(`project_id=1&${days}`), { status: 200, text: '' })
  t.equal((await get(`project_id=1&${days}`, 'x:y')).status, 401)
  t.equal((await get(`project_id=2&${days}`)).status, 403)
  t.equal((await get('project_id=1&from_date=1')).status, 400)
  t.equal((await get('project_id=1')).status, 400)
  const now = await startSandbox(t, { mode: 'simplified', serviceAccounts: [ACCOUNT] })
  now.ledger.add('track', { event: 'x', properties: { time: Date.now() / 1000, distinct_id: 'u', $device_id: 'd', $user_id: 'u' } })
  now.ledger.add('track', { event: 'x', properties: { time: Date.now() / 1000, $device_id: 'd', $user_id: 'v' } })
  const all = await fetch(`${now.url}/api/2.0/export?project_id=1&${days}`, { headers: { authorization: `Basic ${btoa(ACCOUNT)}` } })
  t.match(await all.text(), /"\$distinct_id_before_identity".*\n.*"\$identity_failure_reason":"errAnonDistinctIdAssignedAlready"/, 'without names every event is exported')
  t.match(await get('project_id=1&from_date=2026-01-01&to_date=2999-01-01'), { status: 400, text: /later than today/ })
})
