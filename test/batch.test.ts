import { isDeepStrictEqual } from 'node:util'
import fc from 'fast-check'
import { t } from 'tap'
import { outline } from '#src/http/json.js'
import { identity, listen, startRelay } from './helper.ts'
import { exchange, get } from './raw-http.ts'

t.test('POST /identify/batch answers with a result for each identity', async t => {
  const relay = await startRelay(t)
  const batch = (identities: unknown, type = 'application/json') => relay.inject({
    method: 'POST', url: '/identify/batch', payload: JSON.stringify({ identities }), headers: { 'content-type': type }
  })
  const good = await batch(Array.from({ length: 2000 }, () => identity()))
  t.equal(good.statusCode, 200)
  t.same(good.json().results[1999], { index: 1999, status: 'accepted' })
  t.equal(good.json().results.length, 2000)
  t.equal(relay.sandbox.ledger.rows().length, 2000)
  t.ok(relay.sandbox.requests.length <= 60)

  relay.sandbox.requests.length = 0
  const mixed = await batch([identity(), identity({ identified_id: 'null', token: 'x' }), 7, identity({ anon_id: undefined }), identity()])
  t.equal(mixed.statusCode, 207)
  t.match(mixed.json().results, [
    { index: 0, status: 'accepted' },
    { index: 1, status: 'failed', problem: { status: 400, code: 'invalid_request', errors: [{ pointer: '/token' }, { pointer: '/identified_id' }] } },
    { index: 2, status: 'failed', problem: { code: 'invalid_request', errors: [{ pointer: '', detail: 'must be object' }] } },
    { index: 3, status: 'failed', problem: { code: 'invalid_request', retryable: false, errors: [{ pointer: '/anon_id', detail: 'is required' }] } },
    { index: 4, status: 'accepted' }
  ])
  t.equal(relay.sandbox.ledger.rows().length, 2002, 'invalid identities are not sent')
  relay.sandbox.faults.add({ name: 'rate_limited' })
  const limited = await batch([identity()])
  t.match(limited.json().results[0].problem, { status: 503, code: 'mixpanel_rate_limited', retryable: true })
  t.equal(limited.headers['retry-after'], '2')
  const sent = relay.sandbox.requests.length
  for (const query of ['?dry_run=1', '?strict=1', '?x=1']) {
    const answer = await relay.inject({ method: 'POST', url: `/identify/batch${query}`, payload: { identities: [identity()] } })
    t.match(answer.json(), { status: 400, errors: [{ pointer: '', detail: /query parameter \w+ is not a known field/ }] })
  }
  t.equal(relay.sandbox.requests.length, sent, 'a request with an unknown parameter is not sent')
  t.match((await relay.inject({ method: 'POST', url: '/identify/batch', payload: { identities: [], x: 1 } })).json().errors,
    [{ pointer: '/x' }, { pointer: '/identities' }])

  for (const [body, pointer] of [[[], '/identities'], [Array(2001).fill(identity()), '/identities'], ['x', '/identities'], [undefined, '/identities']] as const) {
    t.match((await batch(body)).json(), { status: 400, code: 'invalid_request', errors: [{ pointer }] })
  }
  t.match((await relay.inject({ method: 'POST', url: '/identify/batch', payload: { identities: [identity()], more: 1 } })).json(), { errors: [{ pointer: '/more' }] })
  t.equal((await batch([identity()], 'text/plain')).statusCode, 200)
  t.equal((await batch([identity({ properties: { a: 'x'.repeat(4_200_000) } })])).statusCode, 413)
  t.match(relay.logged().find(line => line.route === '/identify/batch' && line.status === 207), { identities: 5, failed: 3 })
  const small = await startRelay(t, { env: { MAX_IN_FLIGHT: '3' } })
  const over = (await small.inject({ method: 'POST', url: '/identify/batch', payload: { identities: Array.from({ length: 5 }, () => identity()) } })).json()
  t.same(over.results.map((result: { problem?: { code: string } }) => result.problem?.code ?? 'accepted'), ['accepted', 'accepted', 'accepted', 'overloaded', 'overloaded'])
})

t.test('an identity with too many fields or properties gets one error', async t => {
  const { inject, sandbox } = await startRelay(t)
  const many = (count: number, prefix: string) => Object.fromEntries(Array.from({ length: count }, (_, index) => [`${prefix}${index}`, 1]))
  const answer = await inject({
    method: 'POST',
    url: '/identify/batch',
    payload: { identities: [identity(many(90, 'x')), identity(many(99, 'x')), identity({ properties: many(5000, 'mp_') }), identity({ properties: many(200, 'x') }), identity({ properties: [] }), identity({ properties: null })] }
  })
  t.equal(answer.statusCode, 207)
  const results: { status: string, problem?: { code: string, errors: { pointer: string, detail: string }[] } }[] = answer.json().results
  t.equal(results[0]?.problem?.errors.length, 90, 'up to a hundred fields are named')
  t.same(results[1]?.problem?.errors, [{ pointer: '', detail: 'must not have more than 100 fields' }])
  t.same(results[2]?.problem?.errors, [{ pointer: '/properties', detail: 'must not have more than 200 properties' }])
  t.same(results[3], { index: 3, status: 'accepted' })
  t.same(results[4]?.problem?.errors, [{ pointer: '/properties', detail: 'must be object' }])
  t.same(results[5]?.problem?.errors, [{ pointer: '/properties', detail: 'must be object' }])
  t.equal(sandbox.requests.length, 1)
  for (const [count, detail] of [[200, 'must not have more than 100 fields'], [10_000, 'must not have other fields than identities']] as const) {
    const wide = await inject({ method: 'POST', url: '/identify/batch', payload: { identities: [identity()], ...many(count, 'x') } })
    t.match(wide.json(), { status: 400, errors: [{ pointer: '', detail }] })
  }
})

t.test('a batch with a JSON error in any place gets 400, and nothing is sent', async t => {
  const { inject, sandbox } = await startRelay(t)
  const batch = (payload: string | Buffer) => inject({ method: 'POST', url: '/identify/batch', payload, headers: { 'content-type': 'application/json' } })
  const good = Array.from({ length: 300 }, () => JSON.stringify(identity()))
  const bodies = [
    `{"identities":[${good.join()},{"identified_id":]}`, `{"identities":[${good.join()},]}`, `{"identities":[${good.join()}]`,
    `{"identities":[${good.join()}]}]`, '', 'null', '[]', '{"identities":[nul]}', Buffer.from(`{"identities":[${good[0]},"\u00e9"]}`, 'latin1')
  ]
  for (const body of bodies) {
    const answer = await batch(body)
    t.match(answer.json(), { status: 400, code: 'invalid_request' }, String(body).slice(-30))
  }
  t.equal(sandbox.requests.length, 0)
  const twice = await batch(`{"identities":[${good[0]}],"identities":[${good[1]},${good[2]}]}`)
  t.equal(twice.json().results.length, 2, 'of two lists the last one counts, as with JSON.parse')
  t.equal((await batch(`\ufeff{ "identities" : [ ${good[3]} , ${good[4]} ] }`)).statusCode, 200)
})

t.test('an answer lists at most 100 broken fields', async t => {
  const { inject, sandbox } = await startRelay(t)
  const batch = (identities: unknown[]) => inject({ method: 'POST', url: '/identify/batch', payload: { identities } })
  const zeros = await batch(Array(2000).fill(0))
  t.match(zeros.json(), { status: 400, errors: [{ pointer: '/identities/0', detail: 'must be object' }] })
  t.equal(zeros.json().errors.length, 100)
  t.ok(zeros.payload.length < 10_000)
  const wrong = Object.fromEntries(Array.from({ length: 40 }, (_, index) => [`x${index}`, 0]))
  const many = (await batch([identity(), ...Array(50).fill(identity(wrong)), 0, identity()])).json().results
  const listed = many.map((result: { problem?: { errors?: unknown[] } }) => result.problem?.errors?.length ?? 0)
  t.same(listed.slice(0, 5), [0, 40, 40, 20, 0])
  t.equal(listed.reduce((sum: number, count: number) => sum + count), 100)
  t.match(many[51], { status: 'failed', problem: { code: 'invalid_request', detail: /lists 100 fields already/ } })
  t.same(many[52], { index: 52, status: 'accepted' })
  t.equal(sandbox.ledger.rows().length, 2)
})

t.test('an exception for one identity is a 500 for that identity alone', async t => {
  const relay = await startRelay(t)
  const { identify } = relay.relay
  relay.relay.identify = async (event, wishes) => {
    if (event.json.includes('unlucky')) throw new Error('a bug')
    return identify(event, wishes)
  }
  const { results } = (await relay.inject({ method: 'POST', url: '/identify/batch', payload: { identities: [identity(), identity({ identified_id: 'unlucky' }), identity()] } })).json()
  t.match(results, [{ status: 'accepted' }, { status: 'failed', problem: { status: 500, code: 'internal' } }, { status: 'accepted' }])
  t.match(relay.logged().find(line => line.msg === 'unhandled error'), { err: { message: 'a bug' } })
})

t.test('outline finds the elements of a list wherever JSON.parse does, and nowhere else', async t => {
  const whole = (body: string) => {
    const found = outline(Buffer.from(body), 1000)
    if (found === undefined) throw new Error('too many')
    let parsed: unknown = JSON.parse(found.text)
    const elements = Array.from({ length: found.bounds.length / 2 }, (_, at) =>
      JSON.parse(Buffer.from(body).toString('utf8', found.bounds[2 * at], found.bounds[2 * at + 1])))
    const fill = (value: unknown) => Array.isArray(value) ? value.map(at => elements[at]) : value
    if (Array.isArray(parsed)) parsed = parsed.map(fill)
    else if (typeof parsed === 'object' && parsed !== null) parsed = Object.fromEntries(Object.entries(parsed).map(([name, value]) => [name, fill(value)]))
    return parsed
  }
  const parse = (read: (text: string) => unknown, text: string) => {
    try {
      return [read(text)]
    } catch {
      return []
    }
  }
  const spaced = (value: unknown) => JSON.stringify(value, null, 1)
  const lists = fc.dictionary(fc.string(), fc.oneof(fc.array(fc.jsonValue()), fc.jsonValue({ maxDepth: 0 })))
  fc.assert(fc.property(lists, value => isDeepStrictEqual(whole(spaced(value)), JSON.parse(spaced(value)))), { numRuns: 300 })
  // Broken in one place: a character removed or replaced.
  fc.assert(fc.property(lists, fc.nat(), fc.constantFrom('', '"', '\\', ',', ']', '[', '}', '{', ' ', 'e'), (value, at, sign) => {
    const text = JSON.stringify({ identities: [1, 'a,b]"', { a: [] }], ...value })
    const broken = text.slice(0, at % text.length) + sign + text.slice(at % text.length + 1)
    const [found, expected] = [parse(whole, broken), parse(JSON.parse, broken)]
    if (!isDeepStrictEqual(found, expected)) t.same(found, expected, broken)
  }), { numRuns: 500 })
  for (const text of ['', '[', '{"a":[', '{"a":[1}', '{"a":[1,]}', '{"a":[,1]}', '{"a":[1 2]}', '{"a":["]}', '{"a":["\\"]}', '{"a":[]]}', '{"a":[ ]}', '{"a":[[],{}]}', '[[1],[2]]', '{"a":[1]}]', '{"a":[{]}']) {
    t.same(parse(whole, text), parse(JSON.parse, text), text)
  }
  t.equal(outline(Buffer.from(`[[${'0,'.repeat(1001)}0]]`), 1000), undefined)
})

t.test('hostile batches do not block other requests', async t => {
  const { port, inject } = await listen(t)
  const filled = (text: string) => text.slice(0, 1_048_000)
  const names = (count: number, value: string) => Array.from({ length: count }, (_, index) => `"mp_${index}":${value}`).join()
  const bodies = {
    'broken properties': `{"identities":[${Array(16).fill(`{"identified_id":"u","anon_id":"x","properties":{${names(200, `[${'[1],'.repeat(60)}0]`)}}}`).join()}]}`,
    nesting: filled(`{"identities":[${'['.repeat(500_000)}`) + ']}',
    'nesting in a property': `{"identities":[{"identified_id":"u","properties":${'{"a":'.repeat(150_000)}1${'}'.repeat(150_000)}}]}`,
    'many names': `{"identities":[{${names(60_000, '0')}}]}`,
    'a long list': `{"identities":[{"properties":{"a":[${'0,'.repeat(500_000)}0]}}]}`,
    'many identities': `{"identities":[${'{},'.repeat(300_000)}{}]}`,
    'two thousand': `{"identities":[${Array(2000).fill(`{"identified_id":"u","x":[${'[],'.repeat(80)}0],"anon_id":7}`).join()}]}`
  }
  for (const [what, payload] of Object.entries(bodies)) {
    t.ok(payload.length <= 1_048_576, what)
    const state = { isOver: false }
    const attack = Promise.all([1, 2].map(() => inject({ method: 'POST', url: '/identify/batch', payload, headers: { 'content-type': 'application/json' } })))
      .finally(() => { state.isOver = true })
    let slowest = 0
    while (!state.isOver) {
      const since = performance.now()
      await exchange(port, get('/livez', 'connection: close\r\n'), { ms: 5000 })
      slowest = Math.max(slowest, performance.now() - since)
    }
    for (const answer of await attack) t.ok([207, 400].includes(answer.statusCode), `${what}: the answer is 207 or 400`)
    t.ok(slowest < 2000, `${what}: other requests take less than 2 s, and took up to ${slowest.toFixed(0)} ms`)
  }
})
