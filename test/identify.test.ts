import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { identity, startRelay, TOKEN } from './helper.ts'
import type { Received } from '#src/sandbox/app.js'

const UUID = '5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11'
const nested = (depth: number): unknown => depth === 0 ? 1 : { a: nested(depth - 1) }
const properties = (count: number) => Object.fromEntries(Array.from({ length: count }, (_, index) => [`p${index}`, index]))

t.test('a valid identity becomes one $identify event, byte for byte', async t => {
  const { post, sandbox } = await startRelay(t)
  for (const identified of ['user-42', 'a+b&c%20d@x.com', 'é', '😀', 'a=b', 'x'.repeat(255), '😀'.repeat(63), 'a b', '"\\', '%']) {
    for (const anon of [randomUUID(), randomUUID().toUpperCase(), `$device:${randomUUID()}`]) {
      const answer = await post({ identified_id: identified, anon_id: anon })
      t.equal(answer.statusCode, 200)
      t.equal(answer.body, '{"status":"accepted"}')
      const { method, url, headers, body } = sandbox.requests.at(-1) as Received
      t.match({ method, url, headers }, {
        method: 'POST', url: '/track?ip=0', headers: { 'content-type': 'application/x-www-form-urlencoded' }
      })
      const form = [...new URLSearchParams(body)]
      t.same(form.map(([name]) => name), ['data'])
      t.match(JSON.parse(form[0]?.[1] ?? ''), {
        event: '$identify',
        properties: {
          token: TOKEN,
          distinct_id: identified,
          $identified_id: identified,
          $anon_id: anon,
          time: Number,
          $insert_id: /^[A-Za-z0-9-]{32}$/
        }
      })
      t.ok(Math.abs(JSON.parse(form[0]?.[1] ?? '').properties.time - Date.now() / 1000) < 60, 'time is in seconds')
      t.notOk('authorization' in headers)
    }
  }
  t.equal(sandbox.requests.length, 30, 'each identity is sent in one request')
})

t.test('properties are sent along, and a repeat has the same $insert_id', async t => {
  const { post, sandbox } = await startRelay(t)
  const one = identity({ distinct_id: 'user-42', identified_id: 'user-42', properties: { plan: 'pro', deep: { a: [1, null] } } })
  await post(one)
  await post(one)
  await post(identity())
  const [first, second, third] = sandbox.ledger.rows()
  t.match(first, { outcome: 'merged', properties: { plan: 'pro', deep: { a: [1, null] } } })
  t.equal(second?.outcome, 'repeat')
  t.equal(first?.properties.$insert_id, second?.properties.$insert_id, 'a repeat has the same $insert_id')
  t.not(first?.properties.$insert_id, third?.properties.$insert_id, 'other ids have another $insert_id')
})

t.test('an invalid identity gets 400 with a pointer to each broken field, and is not sent', async t => {
  const { post, sandbox } = await startRelay(t)
  const bad: [given: unknown, pointers: string[]][] = [
    [{ identified_id: undefined }, ['/identified_id']],
    [{ anon_id: undefined }, ['/anon_id']],
    [{ identified_id: '' }, ['/identified_id']],
    [{ identified_id: 'x'.repeat(256) }, ['/identified_id']],
    ...[42, null, true, ['u'], { a: 1 }].flatMap(value => [
      [{ identified_id: value }, ['/identified_id']], [{ anon_id: value }, ['/anon_id']]
    ] as [unknown, string[]][]),
    ...['null', 'NULL', 'Anonymous', 'anon', 'nil', 'none', 'n/a', 'NA', 'undefined', 'Unknown', '<NIL>', '0', '-1', 'TRUE',
      'false', '[]', '{}', '[object Object]', '00000000-0000-0000-0000-000000000000', ' user', 'user ', '\u00a0user', '\tuser',
      'us\u0000er', 'us\ner', 'us\u007fer', 'us\u0085er', `$device:${UUID}`, '$device:x', ' '
    ].map(value => [{ identified_id: value }, ['/identified_id']] as [unknown, string[]]),
    [{ identified_id: UUID, anon_id: UUID }, ['/identified_id']],
    ...['', '12345', UUID.replaceAll('-', ''), `{${UUID}}`, `${UUID} `, UUID.replace('-4', '-1'), UUID.replace('-9', '-c'),
      `$Device:${UUID}`, `$device:$device:${UUID}`, '00000000-0000-0000-0000-000000000000',
      '$device:00000000-0000-0000-0000-000000000000', `${UUID}\n`, '13bbf7943e584-0885c2531-5c793977-3e8000-13bbf7943e64cf'
    ].map(value => [{ anon_id: value }, ['/anon_id']] as [unknown, string[]]),
    [{ distinct_id: 'another' }, ['/distinct_id']],
    [{ distinct_id: 7 }, ['/distinct_id']],
    [{ token: 'x' }, ['/token']],
    [{ 'a/b~c': 1 }, ['/a~1b~0c']],
    [{ properties: [] }, ['/properties']],
    [{ properties: 'x' }, ['/properties']],
    [{ properties: null }, ['/properties']],
    [{ properties: properties(201) }, ['/properties']],
    [{ properties: { ['x'.repeat(256)]: 1 } }, [`/properties/${'x'.repeat(256)}`]],
    ...['token', 'time', 'distinct_id', '$insert_id', '$anon_id', '$anon_distinct_id', '$ignore', 'bucket', 'mp_lib', 'ip'
    ].map(name => [{ properties: { [name]: 1 } }, [`/properties/${name}`]] as [unknown, string[]]),
    [{ properties: nested(4) }, ['/properties/a']],
    [{ properties: { a: { ['x'.repeat(256)]: 1 } } }, ['/properties/a']],
    [{ properties: { a: [[[]]] } }, ['/properties/a']],
    [{ properties: { a: Array(255).fill(0) } }, ['/properties/a']],
    [{ identified_id: 'null', anon_id: 'x', distinct_id: 'y', more: 1, properties: { token: 1, ok: 1, $ignore: true } },
      ['/more', '/anon_id', '/properties/token', '/properties/$ignore', '/identified_id', '/distinct_id']]
  ]
  for (const [given, pointers] of bad) {
    const answer = await post(identity(given as Record<string, unknown>))
    const problem = answer.json()
    t.match(problem, { status: 400, code: 'invalid_request', retryable: false, title: 'Bad Request' }, JSON.stringify(given).slice(0, 80))
    t.same(problem.errors.map((error: { pointer: string }) => error.pointer), pointers, JSON.stringify(given).slice(0, 80))
    for (const { detail } of problem.errors) t.match(detail, /^(must|is|has) /, 'a detail continues the name of the field')
    t.equal(answer.headers['content-type'], 'application/problem+json')
  }
  const json = { headers: { 'content-type': 'application/json' } }
  const raw: [body: string | Buffer, pointer: string][] = [
    ['', ''], ['{', ''], ['[]', ''], ['"x"', ''], ['null', ''], ['1', ''],
    [`{"__proto__":{"a":1},"identified_id":"u","anon_id":"${UUID}"}`, '/__proto__'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"__proto__":{"a":1}}}`, '/properties/__proto__'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"a":{"__proto__":1}}}`, '/properties/a'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"constructor":{"prototype":1}}}`, '/properties/constructor'],
    [Buffer.from(`{"identified_id":"jos\u00e9","anon_id":"${UUID}"}`, 'latin1'), ''],
    [`{"identified_id":"\\ud800","anon_id":"${UUID}"}`, '/identified_id'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"a":1e999}}`, '/properties/a'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"a":"\\ud800"}}`, '/properties/a'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"a":{"\\ud800":1}}}`, '/properties/a'],
    [`{"identified_id":"u","anon_id":"${UUID}","properties":{"\\ud800":1}}`, '/properties/\ud800']
  ]
  for (const [body, pointer] of raw) {
    const answer = await post(body, json)
    t.match(answer.json(), { status: 400, code: 'invalid_request' }, String(body))
    t.same(answer.json().errors.map((error: { pointer: string }) => error.pointer), [pointer], String(body))
  }
  t.match((await post(identity({ properties: nested(3) }))).statusCode, 200)
  t.match((await post(identity({ properties: properties(200) }))).statusCode, 200)
  t.match((await post(identity({ properties: { ['x'.repeat(255)]: 1 } }))).statusCode, 200)
  t.match((await post(`\ufeff{"identified_id":"bom","anon_id":"${UUID}"}`, json)).statusCode, 200)
  t.equal(sandbox.requests.length, 4, 'only the four valid identities were sent')
  const many = await post(Object.fromEntries(Array.from({ length: 500 }, (_, index) => [`x${index}`, 0])))
  t.equal(many.json().errors.length, 100, 'an answer lists at most 100 errors')
})

t.test('strict=1 makes Mixpanel validate; dry_run=1 shows the event and sends nothing', async t => {
  const { post, sandbox } = await startRelay(t)
  t.equal((await post(identity(), { query: '?strict=1' })).body, '{"status":"accepted"}')
  t.match(sandbox.requests[0]?.body, /&strict=1$/)
  t.equal((await post(identity(), { query: '?strict=0' })).statusCode, 200)
  t.notMatch(sandbox.requests[1]?.body, /strict/)
  const dry = await post(identity({ identified_id: 'dry', properties: { plan: 'pro' } }), { query: '?dry_run=1' })
  t.match(dry.json(), {
    event: '$identify',
    properties: { token: '***', distinct_id: 'dry', $identified_id: 'dry', $anon_id: String, $insert_id: String, time: Number, plan: 'pro' }
  })
  t.equal(sandbox.requests.length, 2)
  for (const query of ['?strict=2', '?strict=', '?dryrun=1', '?strict=1&strict=0']) {
    const { status, errors } = (await post(identity(), { query })).json()
    t.match({ status, errors }, { status: 400, errors: [{ pointer: '', detail: /query parameter (strict|dryrun)/ }] }, query)
  }
})

t.test('beyond MAX_IN_FLIGHT an identity gets 503 at once', async t => {
  const { post, sandbox, inject } = await startRelay(t, { env: { MAX_IN_FLIGHT: '2' } })
  sandbox.faults.add({ name: 'wait', ms: 2000, times: 2 })
  const waiting = [post(identity()), post(identity())]
  const inFlight = async () => (await inject({ url: '/readyz?verbose' })).json().parts.in_flight
  while (await inFlight() < 2) await sleep(20)
  const refused = await post(identity())
  t.match(refused.json(), { status: 503, code: 'overloaded', retryable: true })
  t.match(refused.headers, { 'retry-after': '1' })
  for (const answer of await Promise.all(waiting)) t.equal(answer.statusCode, 200)
  t.equal(sandbox.ledger.rows().length, 2)
})
