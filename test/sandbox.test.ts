import { randomUUID } from 'node:crypto'
import { gzipSync } from 'node:zlib'
import { t } from 'tap'
import { createSandbox } from '#src/sandbox/app.js'
import { failedRecords } from '#src/sandbox/records.js'
import { startSandbox } from './helper.ts'

const TOKEN = 'project-token'
const UUID = '2c93fdf3-4fbf-4fec-baaf-136ce87c13cc'
const now = () => Math.floor(Date.now() / 1000)
const event = (properties: Record<string, unknown>, name = '$identify') => ({ event: name, properties: { token: TOKEN, ...properties } })
const pair = (identified: string, anon: string, more = {}) => event({ $identified_id: identified, $anon_id: anon, ...more })

async function start (t: Parameters<typeof startSandbox>[0], options: Parameters<typeof startSandbox>[1] = {}) {
  const sandbox = await startSandbox(t, { token: TOKEN, ...options })
  const send = async (path: string, init: RequestInit = {}) => {
    const answer = await fetch(sandbox.url + path, { redirect: 'manual', ...init })
    const body = await answer.text()
    return { status: answer.status, body, json: () => JSON.parse(body), type: answer.headers.get('content-type'), headers: answer.headers }
  }
  return {
    ...sandbox,
    send,
    track: (data: unknown, query = '?verbose=1', more: Record<string, string> = {}) => send(`/track${query}`, {
      method: 'POST', body: new URLSearchParams({ data: typeof data === 'string' ? data : JSON.stringify(data), ...more })
    }),
    import: (events: unknown, query = '?strict=1', credentials = `${TOKEN}:`) => send(`/import${query}`, {
      method: 'POST',
      body: typeof events === 'string' ? events : JSON.stringify(events),
      headers: { authorization: `Basic ${Buffer.from(credentials).toString('base64')}`, 'content-type': 'application/json' }
    }),
    outcomes: () => sandbox.ledger.rows().map(row => row.outcome)
  }
}

t.test('/track answers and merges as Mixpanel does', async t => {
  const { track, ledger } = await start(t)
  const rows: [identified: string, anon: string, outcome: string | undefined, more?: Record<string, unknown>, error?: string][] = [
    ['u1', UUID, 'merged'],
    ['u1', UUID, 'repeat'],
    ['u2', UUID, 'errAnonDistinctIdAssignedAlready'],
    ['u1', '$device:2C93FDF3-4FBF-4FEC-BAAF-136CE87C13CD', 'merged'],
    ['u1', '13bbf7943e584-0885c2531-5c793977-3e8000-13bbf7943e64cf', 'merged'],
    ['u1', '12345', 'errAnonDistinctIdNonGUIDForm'],
    [UUID, UUID, 'errSameIDs'],
    ['a+b&c%20d@x.com', randomUUID(), 'merged'],
    ['u1', randomUUID(), undefined, { token: '' }, 'token, missing or empty'],
    ['u1', randomUUID(), 'unknown_token', { token: 'another' }],
    ['u1', randomUUID(), undefined, { time: now() - 6 * 24 * 3600 }, 'time, too old'],
    ['u1', randomUUID(), undefined, { time: (now() - 6 * 24 * 3600) * 1000 }, 'time, too old'],
    ['u1', randomUUID(), undefined, { distinct_id: '' }, 'distinct_id, missing or empty'],
    ['u1', randomUUID(), 'ignored', { $ignore: true }]
  ]
  for (const [identified, anon, outcome, more, error] of rows) {
    const before = ledger.rows().length
    const answer = await track(pair(identified, anon, more))
    t.equal(answer.status, 200)
    t.same(answer.json(), { error: error ?? null, status: error === undefined ? 1 : 0 }, `${identified} ${anon}`)
    const row = ledger.rows()[before]
    t.equal(row?.outcome, outcome)
    if (outcome !== undefined) t.equal(row?.properties.$identified_id, identified, 'byte for byte')
    t.notOk(JSON.stringify(row ?? {}).includes(TOKEN))
  }
  t.match(ledger.rows().find(row => row.outcome === 'errSameIDs')?.failure_description, /are same in the identify request/)
  t.equal((await track(pair('u9', randomUUID()), '')).body, '1')
  t.equal((await track(pair('u9', randomUUID(), { token: '' }), '')).body, '0')
})

t.test('a cluster has a limit, and a merge cannot be undone', async t => {
  const { track, outcomes } = await start(t, { clusterMax: 3 })
  const [one, two, three] = [randomUUID(), randomUUID(), randomUUID()]
  for (const [identified, anon] of [['u', one], ['u', two], ['u', three], ['v', three], [one, 'x-1-2-3-4'], ['u', 'y-1-2-3-4'], [two, one]] as const) {
    await track(pair(identified, anon))
  }
  t.same(outcomes(), ['merged', 'merged', 'errManyIDs', 'merged', 'errManyIDs', 'errManyIDs', 'errAnonDistinctIdAssignedAlready'])
  const big = await start(t)
  await big.track(Array.from({ length: 501 }, () => pair('fresh', randomUUID())))
  t.same(big.outcomes().filter(outcome => outcome !== 'merged'), ['errManyIDs'], '500 anonymous ids and the user')
  const same = await start(t)
  const id = 'a-b-c-d-e'
  await same.track([pair('u', id), pair(id, 'f-b-c-d-e'), pair('u', 'f-b-c-d-e'), pair('f-b-c-d-e', 'u-1-2-3-4'), pair('u-1-2-3-4', 'g-1-1-1-1'), pair('g-1-1-1-1', 'h-1-1-1-1')])
  t.same(same.outcomes(), ['merged', 'merged', 'errAnonDistinctIdAssignedAlready', 'merged', 'merged', 'merged'])
  const circle = await start(t)
  await circle.track([pair('1-1-1-1-1', '2-1-1-1-1'), pair('2-1-1-1-1', '1-1-1-1-1')])
  t.same(circle.outcomes(), ['merged', 'merged'], 'two that are one already')
})

t.test('id management modes, anonymous id formats, regions and other events have their outcomes', async t => {
  const other = ['u', '13bbf7943e584-0885c2531-5c793977-3e8000-13bbf7943e64cf'] as const
  const simplified = await start(t, { mode: 'simplified' })
  t.equal((await simplified.track(pair('u', UUID))).json().status, 1)
  t.same(simplified.outcomes(), ['ignored_simplified'])
  t.match((await simplified.import([pair('u', UUID)])).json(), { code: 400, num_records_imported: 0, failed_records: [/simplified identity/] })
  t.equal((await simplified.import([event({ time: now(), distinct_id: 'u', $insert_id: 'i' }, 'Sign up')])).status, 200)
  const legacy = await start(t, { mode: 'legacy' })
  await legacy.track(pair('u', UUID))
  t.same(legacy.outcomes(), ['not_applicable'])
  const strict = await start(t, { anonFormat: 'strict', foreignTokens: ['token-eu'] })
  await strict.track(pair(...other))
  await strict.track(pair('u', UUID, { token: 'token-eu' }))
  await strict.track(event({ $identified_id: 'u' }))
  await strict.track(event({ $identified_id: 'u', $anon_distinct_id: `$device:${UUID}` }))
  await strict.track(event({}, 'Sign up'))
  await strict.track(event({ distinct_id: 'x'.repeat(300) }, 'Sign up'))
  t.same(strict.outcomes(), ['errAnonDistinctIdNonGUIDForm', 'wrong_region', 'identify_incomplete', 'merged', 'stored', 'stored'])
  t.equal(String(strict.ledger.rows().at(-1)?.properties.distinct_id).length, 255, 'strings are cut')
})

t.test('/track takes every form of the body, and its parameters', async t => {
  const { track, send, ledger } = await start(t)
  const base64 = (value: unknown) => Buffer.from(JSON.stringify(value)).toString('base64')
  t.equal((await track(base64(pair('u?>~', UUID)))).json().status, 1)
  t.equal((await send('/track/?verbose=1', { method: 'POST', body: `data=${base64(pair('u>>>???', UUID))}`, headers: { 'content-type': 'application/x-www-form-urlencoded' } })).json().status, 1, 'raw base64, its + read as a space')
  t.equal((await send(`/track?data=${encodeURIComponent(base64(pair('u', UUID)))}`)).body, '1')
  t.equal((await send('/track', { method: 'POST', body: JSON.stringify([pair('u', UUID)]), headers: { 'content-type': 'application/json' } })).body, '1')
  t.equal((await send('/track', { method: 'POST', body: gzipSync(JSON.stringify([pair('u', UUID)])), headers: { 'content-type': 'application/json', 'content-encoding': 'gzip' } })).body, '1')
  t.equal((await send('/track', { method: 'POST', body: 'no gzip', headers: { 'content-encoding': 'gzip' } })).status, 400)
  t.equal(ledger.rows().length, 5)
  const empty = 'data, missing or empty'
  const errors: [data: unknown, error: string][] = [['', empty], ['[]', empty], ['[{}]', empty], ['{', 'data, invalid'],
    ['%%%', 'data, invalid'], ['[1]', 'data, invalid'], [{ properties: {} }, 'event, missing'], [{ event: 'x' }, 'token, missing or empty']]
  for (const [data, error] of errors) t.same((await track(data)).json(), { error, status: 0 }, JSON.stringify(data))
  t.equal((await send('/track?verbose=1', { method: 'POST' })).json().error, empty)
  t.equal((await track(pair('u', UUID), '?img=1')).type, 'image/gif')
  t.match(await track(pair('u', UUID), '?callback=f'), { body: 'f(1)', type: /^text\/javascript/ })
  t.match(await track(pair('u', UUID), '?redirect=/elsewhere'), { status: 302 })
  t.equal((await track(pair('u', UUID), '', { verbose: '1' })).json().status, 1, 'parameters also from the form')
  t.equal((await track(Array(2001).fill(pair('u', UUID)))).status, 413)
  t.equal((await send('/track', { method: 'POST', body: 'x'.repeat(10 * 1024 * 1024 + 1) })).status, 413)
})

t.test('/track stores the valid events of an array', async t => {
  const mixed = [pair('u1', randomUUID()), pair('u2', randomUUID(), { token: '' })]
  const all = await start(t)
  t.equal((await all.track(mixed, '')).body, '0')
  t.same(all.outcomes(), ['merged'], 'the good one is stored')
  const any = await start(t, { arrayAnswer: 'any' })
  t.equal((await any.track(mixed, '')).body, '1')
  t.equal((await any.track([mixed[1]], '')).body, '0')
  const strict = await start(t)
  const good = { time: now(), distinct_id: 'u', $insert_id: 'i-1' }
  t.same((await strict.track(pair('u', UUID, good), '', { strict: '1' })).json(), { code: 200, num_records_imported: 1, status: 'OK' })
  const { status, json } = await strict.track([pair('u', randomUUID(), good), pair('u', randomUUID(), { ...good, time: undefined })], '?strict=1')
  t.equal(status, 400)
  t.match(json(), { num_records_imported: 1, failed_records: [{ index: 1, insert_id: 'i-1', field: 'properties.time', message: /must not be missing/ }] })
})

t.test('/import checks credentials and answers as Mixpanel does', async t => {
  const sandbox = await start(t, { serviceAccounts: ['robot:secret'], projectId: '7' })
  const good = event({ time: now(), distinct_id: 'u', $insert_id: 'i-1', $identified_id: 'u', $anon_id: UUID })
  t.same((await sandbox.import([good])).json(), { code: 200, num_records_imported: 1, status: 'OK' })
  t.equal((await sandbox.import([good], '?strict=1&project_id=7', 'robot:secret')).status, 200)
  for (const [query, credentials] of [['?strict=1', 'robot:secret'], ['?project_id=8', 'robot:secret'], ['?project_id=7', 'robot:wrong'],
    ['', 'another:'], ['', `${TOKEN}:x`], ['', '']] as const) {
    t.match((await sandbox.import([good], query, credentials)).json(), { code: 401, error: 'Invalid credentials' })
  }
  t.equal((await sandbox.send('/import', { method: 'POST', body: '[]' })).status, 401)
  t.equal((await sandbox.import(`${JSON.stringify(good)}\n${JSON.stringify(good)}\n`)).json().num_records_imported, 2, 'a line each')
  t.equal((await sandbox.import('[1')).status, 400)
  t.equal((await sandbox.import(Array(2001).fill(good))).status, 413)
  t.equal((await sandbox.import([good], '?strict=0')).body, '1')
  t.same((await sandbox.import([{}], '?strict=0&verbose=1')).json(), { error: 'data, missing or empty', status: 0 })
  t.ok(sandbox.ledger.deduplicated().length < sandbox.ledger.rows().length)
})

t.test('strict validation names the field', async t => {
  const at = 1_764_000_000
  const good = { time: at, distinct_id: 'u', $insert_id: 'i-1' }
  const deep = (depth: number): unknown => depth === 0 ? 1 : { a: deep(depth - 1) }
  const rows: [event: unknown, properties: Record<string, unknown>, field: string | undefined][] = [
    ['$identify', good, undefined],
    ['$identify', { ...good, time: at * 1000, deep: deep(3), distinct_id: '' }, undefined],
    ['', good, 'event'], [undefined, good, 'event'],
    ['x', { ...good, huge: 'x'.repeat(1_000_001) }, 'event'],
    ['x', { ...good, time: undefined }, 'properties.time'],
    ['x', { ...good, time: 'now' }, 'properties.time'],
    ['x', { ...good, time: 1 }, 'properties.time'],
    ['x', { ...good, time: at + 7200 }, 'properties.time'],
    ['x', { ...good, distinct_id: undefined }, 'properties.distinct_id'],
    ['x', { ...good, distinct_id: 'NULL' }, 'properties.distinct_id'],
    ['x', { ...good, $insert_id: undefined }, '$insert_id'],
    ['x', { ...good, $insert_id: 'a_b' }, '$insert_id'],
    ['x', { ...good, $insert_id: 'x'.repeat(37) }, '$insert_id'],
    ['x', { ...good, $insert_id: 'none' }, '$insert_id'],
    ['x', { ...good, ...Object.fromEntries(Array.from({ length: 255 }, (_, index) => [`p${index}`, 1])) }, 'properties'],
    ['x', { ...good, deep: deep(5) }, 'properties.deep.a.a.a'],
    ['x', { ...good, list: Array(255).fill(1) }, 'properties.list'],
    ['x', { ...good, text: '\ud800' }, 'properties.text']
  ]
  for (const [name, properties, field] of rows) {
    t.equal(failedRecords([{ event: name, properties }], at)[0]?.field, field, JSON.stringify([name, properties]).slice(0, 80))
  }
  t.equal(failedRecords([{ event: 'x' }], at)[0]?.field, 'properties.time')
})

t.test('other paths, methods and the sandbox\'s own routes have their answers', async t => {
  const { send, faults, ledger, track } = await start(t)
  t.match((await send('/')).json(), { error: /^Welcome/ })
  t.equal((await send('/nope')).status, 404)
  t.equal((await send('/track%23create-identity', { method: 'POST' })).status, 404, 'a fragment is loud')
  for (const [method, path] of [['PUT', '/track'], ['GET', '/import'], ['DELETE', '/import/']]) {
    t.equal((await send(path as string, { method: method as string })).status, 405)
  }
  t.equal((await send('/track', { method: 'OPTIONS' })).status, 204)
  t.equal((await send('/__sandbox/livez')).status, 200)
  t.equal((await send('/__sandbox/faults', { method: 'POST', body: '[{"name":"edge_down","times":2},{"name":"internal"}]' })).status, 204)
  t.same([(await track('x')).status, (await track('x')).status, (await track('x')).status, (await track('x')).status], [503, 503, 500, 200])
  await track(pair('u', UUID))
  t.match((await send('/__sandbox/events')).json(), { deduplicated: 1, events: [{ outcome: 'merged', endpoint: 'track' }] })
  faults.add({ name: 'hang' })
  t.equal((await send('/__sandbox', { method: 'DELETE' })).status, 204)
  t.equal((await track('x')).status, 200)
  t.equal(ledger.rows().length, 0)
  t.equal((await send('/__sandbox/faults', { method: 'POST', body: 'x' })).status, 400)
})

t.test('a bug of the sandbox is a 500 with its message', async t => {
  const { app } = createSandbox()
  app.get('/bug', () => { throw new Error('a bug') })
  t.match(await app.inject('/bug'), { statusCode: 500, body: '{"error":"a bug","status":0}' })
})

t.test('an unknown fault is a 400', async t => {
  const { send } = await start(t)
  for (const fault of [{ name: 'nope' }, { name: 'toString' }, {}, null, 7]) {
    const answer = await send('/__sandbox/faults', { method: 'POST', body: JSON.stringify([{ name: 'reset' }, fault]) })
    t.match(answer, { status: 400, body: /not a fault/ })
  }
  t.equal((await send('/__sandbox/faults', { method: 'POST', body: '[{"name":"cut","ms":1},{"name":"edge_down"}]' })).status, 204)
})
