import { connect, type AddressInfo } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import fc from 'fast-check'
import { t, type Test } from 'tap'
import { createSlices } from '../src/concurrency/slices.ts'
import { createByteBudget } from '../src/http/body.ts'
import { outline } from '../src/http/json.ts'
import { exchange, identity, startRelay, type Env } from './helper.ts'

async function listening (t: Test, env: Env = {}, options = {}) {
  const relay = await startRelay(t, env, options)
  await relay.app.listen({ host: '127.0.0.1', port: 0 })
  const { port } = relay.app.server.address() as AddressInfo
  const bytes = async () => (await relay.inject({ url: '/readyz?verbose' })).json().parts.bytes_in_flight
  return { ...relay, port, bytes }
}

const head = (path: string, length: number) =>
  `POST ${path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${length}\r\n\r\n`

/** An upload that stops one byte short of its end; `answer` resolves with what came by the time the relay closed it. */
function upload (t: Test, port: number, path: string, length: number) {
  let text = ''
  const socket = connect(port, '127.0.0.1', () => socket.write(head(path, length) + ' '.repeat(length - 1)))
  socket.on('data', chunk => { text += String(chunk) }).on('error', () => {})
  t.teardown(() => { socket.destroy() })
  return { socket, text: () => text }
}

const kib = (count: number) => identity({ properties: { text: 'x'.repeat(count * 1024) } })

t.test('MAX_BYTES_IN_FLIGHT: one budget for all bodies, of which batches may use three quarters', async t => {
  const { port, inject, post, bytes } = await listening(t, { MAX_BYTES_IN_FLIGHT: '1000000' })
  const batches = Array.from({ length: 9 }, () => upload(t, port, '/identify/batch', 100_000))
  await sleep(300)
  t.equal(batches.filter(({ text }) => /^HTTP\/1.1 503 .*"code":"overloaded"/s.test(text())).length, 2, 'seven fit into three quarters')
  t.match(batches.map(({ text }) => text()).find(Boolean), /retry-after: 1\r\n/)
  t.equal(await bytes(), 7 * 99_999)
  const singles = Array.from({ length: 6 }, () => upload(t, port, '/identify', 60_000))
  await sleep(300)
  t.equal(singles.filter(({ text }) => /^HTTP\/1.1 503 /.test(text())).length, 1, 'and five of these beside them')
  t.equal(await bytes(), 7 * 99_999 + 5 * 59_999)
  t.match((await post(kib(50))).json(), { status: 503, code: 'overloaded', retryable: true })
  t.equal((await inject({ url: '/livez' })).statusCode, 200)
  for (const { socket } of [...batches, ...singles]) socket.destroy()
  await sleep(100)
  t.equal(await bytes(), 0)
  t.equal((await post(kib(50))).statusCode, 200)
  t.equal(await bytes(), 0, 'given back when the answer has left')
})

t.test('a body holds its bytes until its answer has left', async t => {
  const { post, sandbox, bytes, inject } = await listening(t, { MAX_BYTES_IN_FLIGHT: '200000' })
  sandbox.faults.add({ name: 'wait', ms: 400, times: 9 })
  const waiting = [post(kib(50)), post(kib(50)), inject({ method: 'POST', url: '/identify/batch', payload: { identities: [kib(50)] } })]
  await sleep(100)
  t.ok(await bytes() > 150 * 1024)
  t.match((await post(kib(50))).json(), { code: 'overloaded' })
  t.equal((await post(identity())).statusCode, 200, 'what still fits is taken')
  t.same((await Promise.all(waiting)).map(answer => answer.statusCode), [200, 200, 200])
  t.equal(await bytes(), 0)
})

t.test('the budget: what does not fit is not counted', async t => {
  const budget = createByteBudget(100)
  const [batch, single] = [budget.share(0.75)(), budget.share(1)()]
  t.same([batch.grow(75), batch.grow(1), single.grow(25), single.grow(1)], [true, false, true, false])
  t.equal(budget.used(), 100)
  batch.release()
  batch.release()
  t.same([budget.used(), single.grow(75), single.grow(1)], [25, true, false])
})

t.test('an identity has at most 64 KiB of JSON, on both routes, however it grows', async t => {
  const { post, inject, sandbox } = await listening(t)
  const exactly = (bytes: number) => {
    const one = identity({ properties: { text: '' } })
    one.identified_id = 'user-1'
    return { ...one, properties: { text: 'x'.repeat(bytes - JSON.stringify(one).length) } }
  }
  const numbers = JSON.stringify(identity()).replace('}', `,"properties":{${Array.from({ length: 60 }, (_, index) => `"a${index}":[${'1e20,'.repeat(200)}0]`).join()}}}`)
  const rows: [payload: string, status: number][] = [
    [JSON.stringify(exactly(65_536)), 200], [JSON.stringify(exactly(65_537)), 400], [numbers, 400]
  ]
  t.ok(numbers.length < 65_536)
  for (const [payload, status] of rows) {
    const alone = await post(payload, { headers: { 'content-type': 'application/json' } })
    t.equal(alone.statusCode, status)
    const batch = await inject({ method: 'POST', url: '/identify/batch', payload: `{"identities":[${payload},${JSON.stringify(identity())}]}`, headers: { 'content-type': 'application/json' } })
    t.same(batch.json().results.map((result: { problem?: { status: number } }) => result.problem?.status ?? 200), [status, 200])
    if (status === 400) {
      const error = [{ pointer: '', detail: 'must be at most 64 KiB of JSON' }]
      t.same(alone.json().errors, error)
      t.same(batch.json().results[0].problem.errors, error)
    }
  }
  for (const { body } of sandbox.requests) t.ok(body.length < 1_048_576)
})

t.test('no request to Mixpanel has more than a megabyte, and none fails for another one\'s size', async t => {
  for (const text of ['x'.repeat(60_000), '"'.repeat(30_000), 'é'.repeat(30_000), '\u{1F354}'.repeat(15_000)]) {
    const { post, sandbox, inject } = await startRelay(t, { MAX_BATCH: '2000' })
    const large = Array.from({ length: 44 }, () => post(identity({ properties: { text } })))
    const batch = inject({ method: 'POST', url: '/identify/batch', payload: { identities: Array.from({ length: 200 }, () => identity()) } })
    t.same(new Set((await Promise.all([batch, ...large])).map(answer => answer.statusCode)), new Set([200]))
    t.ok(Math.max(...sandbox.requests.map(({ body }) => body.length)) <= 1_048_576)
    t.equal(sandbox.ledger.rows().length, 244)
  }
})

t.test('a body in a thousand pieces is the same body', async t => {
  const { port, sandbox, bytes } = await listening(t)
  const one = JSON.stringify(identity({ identified_id: 'in-pieces', properties: { text: 'é'.repeat(350) } }))
  const pieces = Array.from(Buffer.from(one), byte => Buffer.from([0x31, 0x0D, 0x0A, byte, 0x0D, 0x0A]))
  const chunked = Buffer.concat([Buffer.from('POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n'), ...pieces, Buffer.from('0\r\n\r\n')])
  t.match(await exchange(port, chunked, 500), /^HTTP\/1.1 200 /)
  t.match(sandbox.ledger.rows()[0]?.properties, { $identified_id: 'in-pieces' })
  const long = `${'1\r\nx\r\n'.repeat(2000)}0\r\n\r\n`
  t.match(await exchange(port, 'POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n' + long, 2000), /^HTTP\/1.1 400 .*a thousand tiny chunks/s)
  const large = `${'3e8\r\n' + 'x'.repeat(1000) + '\r\n'}`.repeat(140) + '0\r\n\r\n'
  t.match(await exchange(port, 'POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n' + large, 2000), /^HTTP\/1.1 413 /)
  t.equal(await bytes(), 0)
})

t.test('the outline of a list: JSON where and only where the body is', async t => {
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
  fc.assert(fc.property(lists, value => t.same(whole(spaced(value)), JSON.parse(spaced(value)))), { numRuns: 300 })
  // Broken in one place: a byte taken out, doubled, or replaced.
  fc.assert(fc.property(lists, fc.nat(), fc.constantFrom('', '"', '\\', ',', ']', '[', '}', '{', ' ', 'e'), (value, at, sign) => {
    const text = JSON.stringify({ identities: [1, 'a,b]"', { a: [] }], ...value })
    const broken = text.slice(0, at % text.length) + sign + text.slice(at % text.length + 1)
    const [ours, theirs] = [parse(whole, broken), parse(JSON.parse, broken)]
    // Objects on the second level are no lists: the outline has them as they are.
    t.same(ours.length, theirs.length, broken)
    if (theirs.length > 0) t.same(ours, theirs, broken)
  }), { numRuns: 2000 })
  for (const text of ['', '[', '{"a":[', '{"a":[1}', '{"a":[1,]}', '{"a":[,1]}', '{"a":[1 2]}', '{"a":["]}', '{"a":["\\"]}', '{"a":[]]}', '{"a":[ ]}', '{"a":[[],{}]}', '[[1],[2]]', '{"a":[1]}]', '{"a":[{]}']) {
    t.same(parse(whole, text), parse(JSON.parse, text), text)
  }
  t.equal(outline(Buffer.from(`[[${'0,'.repeat(1001)}0]]`), 1000), undefined)
})

t.test('a batch that is no JSON, anywhere, sends nothing', async t => {
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
  t.equal(twice.json().results.length, 2, 'of two lists the last one counts, as in JSON.parse')
  t.equal((await batch(`\ufeff{ "identities" : [ ${good[3]} , ${good[4]} ] }`)).statusCode, 200)
})

t.test('answers to bad batches are in proportion to them', async t => {
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
  t.match(many[51], { status: 'failed', problem: { code: 'invalid_request', detail: /names 100 broken fields already/ } })
  t.same(many[52], { index: 52, status: 'accepted' })
  t.equal(sandbox.ledger.rows().length, 2)
})

t.test('a bug that one identity meets is its own', async t => {
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

t.test('long work gets its share of the event loop, together with all other long work', async t => {
  const slice = createSlices(5)
  let longest = 0
  let isOver = false
  let last = performance.now()
  const watch = () => {
    longest = Math.max(longest, performance.now() - last)
    last = performance.now()
    if (!isOver) setImmediate(watch)
  }
  watch()
  const order: number[] = []
  await Promise.all(Array.from({ length: 10 }, async (_, worker) => {
    for (let step = 0; step < 20; step++) {
      await slice()
      for (const end = performance.now() + 1; performance.now() < end;);
    }
    order.push(worker)
  }))
  isOver = true
  t.ok(longest < 60, `the loop stood still for at most ${longest} ms, of 200 ms of work`)
  t.same(order.toSorted((a, b) => a - b), Array.from({ length: 10 }, (_, worker) => worker))
})

t.test('hostile batches do not hold up others', async t => {
  const { port, inject } = await listening(t)
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
      await exchange(port, 'GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n', 5000)
      slowest = Math.max(slowest, performance.now() - since)
    }
    for (const answer of await attack) t.ok([207, 400].includes(answer.statusCode), what)
    t.comment(`${what}: others waited ${slowest.toFixed(0)} ms at most`)
  }
})
