import { randomUUID } from 'node:crypto'
import fc from 'fast-check'
import type { Test } from 'tap'
import { identity, listen, startRelay } from './helper.ts'
import { exchange } from './raw-http.ts'
import { failedRecords } from '#src/sandbox/records.js'

/** Values near the rules' edges, so that a mutation is sometimes still valid. */
const value = fc.oneof(
  fc.constantFrom(null, true, 0, -1, 1e308, '', ' ', 'null', 'undefined', '$device:x', 'user-1', 'é😀', '\u0000', '\ud800', 'x'.repeat(255),
    'x'.repeat(256), [], {}, { a: { b: 1 } }, { a: { b: { c: 1 } } }, randomUUID(), randomUUID().toUpperCase(), `$device:${randomUUID()}`,
    '00000000-0000-0000-0000-000000000000'),
  fc.string({ unit: 'binary', maxLength: 300 }), fc.jsonValue({ maxDepth: 5 }))
const name = fc.oneof(fc.constantFrom('identified_id', 'anon_id', 'distinct_id', 'properties', 'token', '__proto__', 'constructor', 'toString', ''),
  fc.string({ maxLength: 20 }))
const propertyName = fc.oneof(fc.constantFrom('token', '$insert_id', 'mp_x', 'plan', '__proto__', 'time', 'x'.repeat(255), 'x'.repeat(256)), name)

/** One change to a body: a field set or left out, or a property set. */
const mutation = fc.oneof(
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('set' as const), name, value }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('delete' as const), name, value: fc.constant(null) }) },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('property' as const), name: propertyName, value }) })

function mutate (body: Record<string, unknown>, { kind, name, value }: { kind: string, name: string, value: unknown }) {
  if (kind === 'delete') return Object.fromEntries(Object.entries(body).filter(([key]) => key !== name))
  if (kind === 'set') return { ...body, [name]: value }
  return { ...body, properties: { ...Object(body.properties), [name]: value } }
}

/** Posts so many mutations of a valid identity, and so many arbitrary bodies. */
export async function fuzzBodies (t: Test, { mutations, arbitrary }: { mutations: number, arbitrary: number }) {
  const { app, sandbox } = await startRelay(t, { env: { LOG_LEVEL: 'silent' } })
  const statuses = new Map<number, number>()
  let sent = 0

  async function check (payload: string): Promise<boolean> {
    const answer = await app.inject({ method: 'POST', url: '/identify', payload, headers: { 'content-type': 'application/json' } })
    statuses.set(answer.statusCode, (statuses.get(answer.statusCode) ?? 0) + 1)
    if (answer.statusCode === 200) sent++
    const problem = answer.statusCode === 200 ? undefined : answer.json()
    return answer.statusCode === 200
      ? answer.body === '{"status":"accepted"}'
      : answer.statusCode === 400 && problem.code === 'invalid_request' && problem.errors.length > 0
  }
  const isHandled = (payloads: fc.Arbitrary<string>, numRuns: number) => fc.assert(fc.asyncProperty(payloads, check), { numRuns })

  await isHandled(fc.array(mutation, { minLength: 1, maxLength: 3 }).map(list => {
    const user = identity()
    return JSON.stringify(list.reduce(mutate, { ...user, distinct_id: user.identified_id, properties: { plan: 'pro' } } as Record<string, unknown>))
  }), mutations)
  t.ok((statuses.get(200) ?? 0) > mutations / 20, `more than a twentieth of the mutations is valid, and ${statuses.get(200)} were`)
  t.ok((statuses.get(400) ?? 0) > mutations / 2, `more than half of the mutations is invalid, and ${statuses.get(400)} were`)
  await isHandled(fc.oneof(fc.json(), fc.string({ unit: 'binary' }), fc.jsonValue().map(json => JSON.stringify({ identified_id: json, anon_id: json }))), arbitrary)

  t.equal(sandbox.requests.length, sent, 'Mixpanel gets one request for each 200 and none for a 400')
  const events = sandbox.requests.map(({ body }) => JSON.parse(new URLSearchParams(body).get('data') ?? ''))
  t.same(failedRecords(events, Math.floor(Date.now() / 1000)), [], 'every event passes the strict validation')
  t.same(sandbox.ledger.rows().filter(row => row.outcome !== 'merged' && row.outcome !== 'repeat' &&
    row.outcome !== 'errAnonDistinctIdAssignedAlready' && row.outcome !== 'errManyIDs'), [], 'no malformed event reached Mixpanel')
}

/** Sends a valid request so many times, with up to four bytes changed. */
export async function fuzzBytes (t: Test, runs: number) {
  const { port, sandbox } = await listen(t, { env: { LOG_LEVEL: 'silent' } })
  const body = JSON.stringify(identity())
  const whole = Buffer.from(`POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\nconnection: close\r\n\r\n${body}`)
  let answered = 0
  const change = fc.record({ at: fc.nat(whole.length - 1), byte: fc.nat(255) })
  await fc.assert(fc.asyncProperty(fc.array(change, { minLength: 1, maxLength: 4 }), async changes => {
    const bytes = Buffer.from(whole)
    for (const { at, byte } of changes) bytes[at] = byte
    const answer = await exchange(port, bytes, { ms: 40 })
    if (answer !== '') answered++
    return answer === '' || /^HTTP\/1\.1 (200|4\d\d) /.test(answer)
  }), { numRuns: runs })
  t.ok(answered > runs / 2, `more than half of the requests is answered, and ${answered} were`)
  const before = sandbox.requests.length
  t.match(await exchange(port, whole, { ms: 1000 }), /^HTTP\/1\.1 200/)
  t.equal(sandbox.requests.length, before + 1, 'a valid request is still sent')
}
