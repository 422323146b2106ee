import { randomUUID } from 'node:crypto'
import { t } from 'tap'
import { identity, needsRedis, silent, startRedis, startRelay, startRelayWithOutbox, temporary, emptied, TOKEN, type Env } from './helper.ts'
import { checkMerges } from './merge-model.ts'
import { startProcess, SERVER } from './processes.ts'
import { connectRedis } from '#src/redis.js'

t.jobs = 3
const MODES = ['original', 'simplified'] as const
const start = (mode: typeof MODES[number], env: Env = {}, sandboxMode: typeof MODES[number] | 'legacy' = mode) => (t: Parameters<typeof startRelay>[0]) =>
  startRelay(t, { env: { MIXPANEL_ID_MERGE: mode, ...env }, sandbox: { mode: sandboxMode } })

for (const mode of MODES) {
  t.test(`what arrives merges in a project with ${mode} ID merge, alone, in batches and through the outbox`, async t => {
    for (const env of [{}, { MAX_BATCH: '1' }, { MIXPANEL_STRICT: '1' }, { MIXPANEL_ENDPOINT: 'import' }] as Env[]) {
      const { inject, post, sandbox } = await start(mode, env)(t)
      const phone = randomUUID()
      t.equal((await post({ identified_id: 'a', anon_id: phone, properties: { plan: 'pro' } })).statusCode, 200)
      t.equal((await post({ identified_id: 'a', anon_id: `$device:${phone}`, properties: { plan: 'pro' } })).statusCode, 200)
      t.equal((await post({ identified_id: 'b', anon_id: phone })).statusCode, 200)
      t.equal((await inject({ method: 'POST', url: '/identify/batch', payload: { identities: Array.from({ length: 30 }, () => identity({ identified_id: 'c' })) } })).statusCode, 200)
      const outcomes = sandbox.ledger.rows().map(({ outcome }) => outcome)
      // The prefix belongs to the id in Original ID Merge, and not in Simplified ID Merge.
      t.same(outcomes.slice(0, 3), ['merged', mode === 'original' ? 'merged' : 'repeat', 'errAnonDistinctIdAssignedAlready'])
      t.same(new Set(outcomes.slice(3)), new Set(['merged']))
      t.same(new Set(sandbox.ledger.rows().map(({ event }) => event)), new Set([mode === 'original' ? '$identify' : 'identity association']), 'one mode sends one kind of event')
    }
    const relay = await startRelayWithOutbox(t, { env: { MIXPANEL_ID_MERGE: mode }, sandbox: { mode } })
    const phone = randomUUID()
    relay.sandbox.faults.add({ name: 'edge_down', times: 4 })
    t.equal((await relay.post({ identified_id: 'first', anon_id: phone })).statusCode, 202)
    t.equal((await relay.post({ identified_id: 'second', anon_id: `$device:${phone}` })).statusCode, 202)
    await emptied(relay)
    t.same(relay.sandbox.ledger.rows().map(({ properties }) => properties.distinct_id), ['first', 'second'], 'the first claim wins')
  })

  t.test(`the clusters are those of first-write-wins, in 150 random sequences with ${mode} ID merge`, async t => {
    for (const env of [{}, { OUTBOX: `file:${temporary(t)}` }] as Env[]) {
      const { faults, counts } = await checkMerges(t, { mode, sequences: 75, kills: 1, atOnce: 25, env })
      t.same(faults, [])
      t.comment(JSON.stringify(counts))
    }
  })
}

t.test('the event of Simplified ID Merge is an ordinary one', async t => {
  const { post, sandbox } = await start('simplified', { MERGE_EVENT: 'merge ids' })(t)
  const preview = await post({ identified_id: 'user-1', anon_id: '$device:Any Id', properties: { plan: 'pro' } }, { query: '?dry_run=1' })
  t.match(preview.json(), {
    event: 'merge ids', properties: { token: '***', plan: 'pro', distinct_id: 'user-1', $user_id: 'user-1', $device_id: 'Any Id', $insert_id: /^[0-9a-f]{32}$/ }
  })
  t.notMatch(preview.body, /\$identified_id|\$anon_id/)
  t.equal((await post({ identified_id: 'user-1', anon_id: 'Any Id', properties: { plan: 'pro' } })).statusCode, 200)
  t.equal(sandbox.ledger.rows()[0]?.properties.$insert_id, preview.json().properties.$insert_id, 'the prefix does not make another event')
})

t.test('anonymous ids of Simplified ID Merge', async t => {
  const { post } = await start('simplified')(t)
  const rows: [anon: unknown, detail: RegExp | undefined][] = [
    ['x', undefined], ['anonymous111', undefined], ['$device:x', undefined], ['007', undefined], ['a b', undefined], ['é'.repeat(127), undefined], [`$device:${'x'.repeat(255)}`, undefined],
    [randomUUID(), undefined], ['13bbf7943e584-0885c2531-5c793977-3e8000-13bbf7943e64cf', undefined],
    ['', /fewer than 1|must NOT/], ['$device:', /placeholder/], ['$device:$device:x', /prefix/], ['$DEVICE:x', /prefix/], ['$device:$Device:x', /prefix/],
    ['null', /placeholder/], ['$device:NULL', /placeholder/], ['00000000-0000-0000-0000-000000000000', /placeholder/], ['0', /placeholder/], ['"undefined"', /placeholder/],
    [' x', /white space/], ['x\u200b', /white space|invisible/], ['$device: x', /white space/], ['a\nb', /control/], ['\ud800', /surrogates/],
    ['x'.repeat(256), /255 bytes/], ['é'.repeat(128), /255 bytes/], [7, /string/], [null, /string/]
  ]
  for (const [anon, detail] of rows) {
    const answer = await post({ identified_id: 'user-1', anon_id: anon }, { query: '?dry_run=1' })
    t.equal(answer.statusCode, detail === undefined ? 200 : 400, JSON.stringify(anon))
    if (detail !== undefined) t.match(answer.json().errors.find(({ pointer }: { pointer: string }) => pointer === '/anon_id')?.detail, detail, JSON.stringify(anon))
  }
  for (const [identified, anon] of [['abc', 'abc'], ['abc', '$device:ABC']]) {
    t.match((await post({ identified_id: identified, anon_id: anon })).json().errors, [{ pointer: '/identified_id', detail: /not be equal to anon_id/ }])
  }
})

t.test('in Simplified ID Merge the case of a device id matters, in order and in the merge guard', async t => {
  const { post, sandbox } = await start('simplified', { MAX_USERS_PER_ANON: '1' })(t)
  t.equal((await post({ identified_id: 'a', anon_id: 'Device' })).statusCode, 200)
  t.equal((await post({ identified_id: 'b', anon_id: 'device' })).statusCode, 200)
  t.equal((await post({ identified_id: 'c', anon_id: '$device:Device' })).statusCode, 409)
  t.same(sandbox.ledger.rows().map(({ outcome }) => outcome), ['merged', 'merged'])
})

t.test('ids of older SDKs need ANON_ID_FORMAT=sdk, and the error says so', async t => {
  const old = '13bbf7943e584-0885c2531-5c793977-3e8000-13bbf7943e64cf'
  const strict = await startRelay(t)
  for (const anon of [old, `$device:${old}`, '2c93fdf3-4fbf-1fec-baaf-136ce87c13cc']) {
    t.match((await strict.post(identity({ anon_id: anon }))).json().errors, [{ pointer: '/anon_id', detail: /UUID v4.*; ids of older Mixpanel SDKs need ANON_ID_FORMAT=sdk/ }])
  }
  t.notMatch((await strict.post(identity({ anon_id: '12345' }))).body, /ANON_ID_FORMAT/)
  const { post, sandbox } = await startRelay(t, { env: { ANON_ID_FORMAT: 'sdk' } })
  for (const anon of [old, `$device:${old}`, randomUUID(), randomUUID().toUpperCase()]) t.equal((await post(identity({ anon_id: anon }))).statusCode, 200, anon)
  t.same(new Set(sandbox.ledger.rows().map(({ outcome }) => outcome)), new Set(['merged']))
  const bad = ['12345', 'a-b-c-d', 'a-b-c-d-e-f', `$device:$device:${old}`, `${old} `, '0-0-0-0-0', '00000000-0000-0000-0000-000000000000', '00000000-0000-4000-8000-000000000000', `${'a'.repeat(252)}-b-c-d-e`, 'a--c-d-e']
  for (const anon of bad) t.equal((await post(identity({ anon_id: anon }))).statusCode, 400, anon)
})

t.test('a project with Simplified ID Merge is told by /import: once in the log, in the answers and in /readyz', async t => {
  const { inject, logged, post, sandbox } = await start('original', { MIXPANEL_ENDPOINT: 'import' }, 'simplified')(t)
  t.match((await inject({ url: '/readyz?verbose' })).json().parts, { id_merge: 'original', id_merge_of_project: undefined })
  const answer = await post(identity())
  t.match(answer.json(), { status: 422, code: 'refused_by_mixpanel', detail: /simplified identity management.*MIXPANEL_ID_MERGE=simplified/ })
  const many = await inject({ method: 'POST', url: '/identify/batch', payload: { identities: Array.from({ length: 50 }, () => identity()) } })
  t.equal(many.statusCode, 207)
  t.ok(many.json().results.every(({ problem }: { problem: { detail: string } }) => /MIXPANEL_ID_MERGE=simplified/.test(problem.detail)))
  t.equal(sandbox.requests.length, 2, 'a refusal that holds for all is not divided')
  t.match((await inject({ url: '/readyz?verbose' })).json().parts, { id_merge: 'original', id_merge_of_project: 'simplified' })
  t.equal(logged().filter(line => line.msg === 'project has Simplified ID Merge').length, 1)
})

t.test('/track answers 1 in the wrong mode, and nothing merges', async t => {
  const { post, sandbox } = await start('original', {}, 'simplified')(t)
  t.equal((await post(identity())).statusCode, 200)
  t.equal(sandbox.ledger.rows()[0]?.outcome, 'ignored_simplified')
  const other = await start('simplified', {}, 'original')(t)
  t.equal((await other.post(identity())).statusCode, 200)
  t.equal(other.sandbox.ledger.rows()[0]?.outcome, 'stored')
  const legacy = await start('original', {}, 'legacy')(t)
  t.equal((await legacy.post(identity())).statusCode, 200)
  t.equal(legacy.sandbox.ledger.rows()[0]?.outcome, 'not_applicable')
})

t.test('a relay in another mode does not open an outbox with identities of the first', async t => {
  const directory = temporary(t)
  for (const [mode, other, more] of [['original', 'simplified', {}], ['simplified', 'original', { MIXPANEL_PROJECT_ID: '42' }]] as const) {
    const env = { OUTBOX: `file:${directory}/${mode}`, MIXPANEL_URL: 'http://127.0.0.1:9', MIXPANEL_TOKEN: TOKEN, PORT: '0', ...more }
    const relay = startProcess(t, SERVER, [], { ...env, MIXPANEL_ID_MERGE: mode })
    const [, url] = await relay.until(/Server listening at (http:[^"]+)"/)
    t.match(relay.output(), new RegExp(`"id_merge":"${mode}","hint":"[^"]*settings of the project[^"]*","msg":"mode of the project"`))
    const { status } = await fetch(`${url}/identify`, { method: 'POST', headers: { 'content-type': 'application/json', prefer: 'respond-async' }, body: JSON.stringify(identity()) })
    t.equal(status, 202)
    relay.child.kill('SIGTERM')
    t.equal(await relay.exit, 0)
    const refused = startProcess(t, SERVER, [], { ...env, MIXPANEL_ID_MERGE: other })
    t.equal(await refused.exit, 1)
    t.match(refused.output(), /OUTBOX: .* cannot be used: it holds identities that were queued with another MIXPANEL_ID_MERGE/)
    const dropped = startProcess(t, SERVER, ['outbox', 'list'], { ...env, MIXPANEL_ID_MERGE: mode })
    t.equal(await dropped.exit, 0)
  }
})

t.test('nor one in Redis, whatever the project is called', needsRedis, async t => {
  const { url } = await startRedis(t)
  const connect = async () => {
    const redis = await connectRedis(url, silent)
    t.teardown(() => { redis.disconnect() })
    return redis
  }
  for (const more of [{}, { MIXPANEL_PROJECT_ID: '42' }] as Env[]) {
    const env = { OUTBOX: 'redis', REDIS_URL: url, MIXPANEL_URL: 'http://127.0.0.1:9', ...more }
    const redis = await connect()
    const relay = await startRelay(t, { env: { ...env, MIXPANEL_ID_MERGE: 'simplified' }, redis })
    t.equal((await relay.post(identity({ anon_id: 'x' }), { headers: { prefer: 'respond-async' } })).statusCode, 202)
    await t.rejects(startRelay(t, { env, redis: await connect() }), { message: /OUTBOX=redis: it holds identities that were queued with another MIXPANEL_ID_MERGE/ })
    await redis.flushall()
    t.ok(await startRelay(t, { env, redis: await connect() }), 'once they are gone the mode may change')
    await redis.flushall()
  }
})
