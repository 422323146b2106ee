import fc from 'fast-check'
import { credentials, LISTED, senderOf, USERS } from './fuzz-callers.ts'
import type { Env } from './helper.ts'

/** A POST, and whether its payload and its identities are valid by construction. */
export interface Case {
  path: string
  query: string
  headers: Env
  payload: Buffer
  /** True for a payload that no step has changed, apart from the identities in it. */
  isWhole: boolean
  /** For each identity, true when no step has changed it. */
  intact: boolean[]
}

/** An identity as Mixpanel receives it. */
export const pairOf = (user: unknown, anon: unknown) => JSON.stringify([user, anon])

export const anonId = fc.noBias(fc.nat()).map(number => `5f0c8a1e-6a0b-4d53-9d3c-${number.toString(16).padStart(12, '0')}`)
const SOME_ID = '0b1f6f2b-7c11-4d53-8d3c-5f0c8a1e6a0b'

/** Values near the rules' edges, so that a mutation is sometimes still valid. */
const value = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.constantFrom<unknown>(null, true, 0, -1, 1e308, '', ' ', 'null', 'undefined', '$device:x', ...USERS, 'é😀', '\u0000', '\ud800', 'x'.repeat(255),
      'x'.repeat(256), [], {}, { a: { b: 1 } }, { a: { b: { c: 1 } } }, SOME_ID, SOME_ID.toUpperCase(), `$device:${SOME_ID}`, '00000000-0000-0000-0000-000000000000',
      [USERS[0]], { toString: USERS[0] }, 'USER-A', 'user-a ', 'user-\u200da')
  },
  { weight: 1, arbitrary: fc.string({ unit: 'binary', maxLength: 300 }) },
  { weight: 1, arbitrary: fc.jsonValue({ maxDepth: 5 }) })
const name = fc.oneof(
  { weight: 5, arbitrary: fc.constantFrom(...Array<string>(6).fill('identified_id'), 'anon_id', 'anon_id', 'distinct_id', 'properties', 'token', '__proto__', 'constructor', 'toString', '') },
  { weight: 1, arbitrary: fc.string({ maxLength: 20 }) })
const propertyName = fc.oneof(
  fc.constantFrom('token', '$insert_id', '$identified_id', '$anon_id', 'mp_x', 'plan', '__proto__', 'time', 'x'.repeat(255), 'x'.repeat(256)), name)

interface Mutation { kind: string, name: string, value: unknown }

/** One change to an identity: a field set or left out, or a property set. */
const mutation: fc.Arbitrary<Mutation> = fc.oneof(
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('set'), name, value }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('delete'), name, value: fc.constant(null) }) },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('property'), name: propertyName, value }) })

function mutate (body: Record<string, unknown>, { kind, name, value }: Mutation) {
  if (kind === 'delete') return Object.fromEntries(Object.entries(body).filter(([key]) => key !== name))
  if (kind === 'set') return { ...body, [name]: value }
  return { ...body, properties: { ...Object(body.properties), [name]: value } }
}

const candidate = fc.record({
  user: fc.constantFrom(...USERS, ...USERS, 'User-A', 'user-é'),
  anon: anonId,
  more: fc.constantFrom({}, {}, { properties: { plan: 'pro' } }),
  hasDistinctId: fc.boolean(),
  mutations: fc.oneof({ weight: 3, arbitrary: fc.constant([]) }, { weight: 2, arbitrary: fc.array(mutation, { minLength: 1, maxLength: 3 }) }) as fc.Arbitrary<Mutation[]>
}).map(({ user, anon, more, hasDistinctId, mutations }) => ({
  isIntact: mutations.length === 0,
  identity: mutations.reduce(mutate, { identified_id: user, anon_id: anon, ...hasDistinctId && { distinct_id: user }, ...more } as Record<string, unknown>)
}))

/** A change to the text of a body, or the encoding of its bytes. */
const alteration = fc.record({
  kind: fc.constantFrom('delete', 'insert', 'cut', 'append', 'prepend', 'repeat', 'latin1', 'utf16le'),
  at: fc.nat(1000),
  text: fc.oneof(fc.constantFrom('"', '{', '}', '[', ']', ',', ':', '\\', '\n', '\u0000', '\ufeff', 'e', '0', `"identified_id":"${USERS[1]}",`), fc.string({ maxLength: 4 }))
})

function alter (source: string, { kind, at, text }: { kind: string, at: number, text: string }): Buffer {
  if (kind === 'latin1' || kind === 'utf16le') return Buffer.from(source, kind)
  const index = at % (source.length + 1)
  const ends: Record<string, [start: string, end: string]> = {
    delete: [source.slice(0, index), source.slice(index + 1)],
    insert: [source.slice(0, index) + text, source.slice(index)],
    cut: [source.slice(0, index), ''],
    append: [source, text],
    prepend: [text, source],
    // A field that a body has twice. JSON.parse takes the last.
    repeat: ['{"identified_id":"user-b","identities":[],', source.slice(1)]
  }
  return Buffer.from((ends[kind] as [string, string]).join(''))
}

/** The routes by path; the other paths have none. */
const ROUTES: Record<string, 'single' | 'batch' | 'malformed'> = {
  '/identify': 'single',
  '/identify/': 'single',
  '/%69dentify': 'single',
  '/identify/batch': 'batch',
  '/identify/batch/': 'batch',
  '/identify/%62atch': 'batch',
  '/identify/%zz': 'malformed'
}
const otherPath = fc.constantFrom(...Object.keys(ROUTES), '/IDENTIFY', '/identify%2fbatch', '/identify;x', '/identify/batch/x', '/identify%00', '/')
const pathOr = (path: string) => fc.oneof({ weight: 9, arbitrary: fc.constant(path) }, { weight: 1, arbitrary: otherPath })

const BROKEN_QUERIES = [
  '?strict=2', '?strict=true', '?dry_run=1&dry_run=1', '?x=1', '?strict', '?__proto__=1', '?strict[]=1', '?%', '?dry_run=%zz', '?STRICT=1', '?strict=1;dry_run=1'
]
const query = fc.oneof(
  { weight: 6, arbitrary: fc.constant('') },
  { weight: 3, arbitrary: fc.constantFrom('?', '?strict=0', '?strict=1', '?dry_run=1', '?dry_run=0&strict=1', '?dry_run=1&strict=1') },
  { weight: 1, arbitrary: fc.constantFrom(...BROKEN_QUERIES) })

const TYPES = ['application/json', 'text/plain', 'application/json; charset=utf-8', 'text/plain;charset=UTF-8', 'Application/JSON', 'application/json; charset="utf-8"']
const OTHER_TYPES = ['', 'application/xml', 'application/json; charset=latin1', 'text/html', 'application/jsonx', 'text/plain; charset=utf-16', 'json',
  'multipart/form-data; boundary=x', 'application/x-www-form-urlencoded']
const ENCODINGS = ['identity', '']

/** Headers other than credentials. Most requests have only the first. */
const headers = fc.tuple(
  fc.oneof({ weight: 9, arbitrary: fc.constantFrom(...TYPES) }, { weight: 1, arbitrary: fc.constantFrom(...OTHER_TYPES, undefined) }).map(type => ({ 'content-type': type })),
  fc.oneof(
    { weight: 6, arbitrary: fc.constant({}) },
    { weight: 3, arbitrary: fc.constant({ origin: LISTED }) },
    {
      weight: 1,
      arbitrary: fc.constantFrom('null', '', 'https://evil.example', `${LISTED}.evil.example`, 'http://app.example.com', `${LISTED}:443`, `${LISTED}/`, 'HTTPS://app.example.com')
        .map(origin => ({ origin }))
    }),
  fc.oneof(
    { weight: 9, arbitrary: fc.constantFrom({}, {}, { prefer: 'respond-async' }, { prefer: 'wait=1, RESPOND-ASYNC;x' }, { 'x-forwarded-for': '127.0.0.1' }, { 'x-http-method-override': 'GET' }) },
    { weight: 1, arbitrary: fc.constantFrom('gzip', 'br', 'identity, gzip', ...ENCODINGS).map(encoding => ({ 'content-encoding': encoding })) })
).map(parts => Object.fromEntries(Object.entries(Object.assign({}, ...parts)).filter(([, value]) => value !== undefined)) as Env)

/** Bodies that have nothing of an identity. */
const arbitraryBody = fc.oneof(
  fc.json(), fc.string({ unit: 'binary' }), fc.constant(''), fc.jsonValue().map(json => JSON.stringify({ identified_id: json, anon_id: json })),
  fc.jsonValue().map(json => JSON.stringify({ identities: json })))

const WRAPPINGS: Record<string, (list: unknown[]) => unknown> = {
  extra: list => ({ identities: list, strict: 1 }),
  list: list => list,
  empty: () => ({ identities: [] }),
  object: list => ({ identities: { ...list } }),
  nested: list => ({ identities: [list] }),
  mixed: list => ({ identities: [null, ...list, 'user-a', [], 0] })
}
type Target = Omit<Case, 'query' | 'headers'>
const rarely = fc.oneof({ weight: 12, arbitrary: fc.constant(undefined) }, { weight: 1, arbitrary: alteration })

const single: fc.Arbitrary<Target> = fc.record({ path: pathOr('/identify'), one: candidate, alteration: rarely })
  .map(({ path, one: { identity, isIntact }, alteration }) => {
    const text = JSON.stringify(identity)
    const payload = alteration === undefined ? Buffer.from(text) : alter(text, alteration)
    return { path, payload, isWhole: alteration === undefined && ROUTES[path] === 'single', intact: [isIntact] }
  })

const batch: fc.Arbitrary<Target> = fc.record({
  path: pathOr('/identify/batch'),
  list: fc.array(candidate, { minLength: 1, maxLength: 5 }),
  wrapping: fc.oneof({ weight: 12, arbitrary: fc.constant(undefined) }, { weight: 2, arbitrary: fc.constantFrom(...Object.keys(WRAPPINGS)) }),
  alteration: rarely
}).map(({ path, list, wrapping, alteration }) => {
  const identities = list.map(({ identity }) => identity)
  const text = JSON.stringify(wrapping === undefined ? { identities } : WRAPPINGS[wrapping]?.(identities))
  const payload = alteration === undefined ? Buffer.from(text) : alter(text, alteration)
  const isWhole = alteration === undefined && wrapping === undefined && ROUTES[path] === 'batch'
  return { path, payload, isWhole, intact: list.map(({ isIntact }) => isIntact) }
})

const shapeless: fc.Arbitrary<Target> = fc.record({ path: fc.constantFrom('/identify', '/identify/batch'), body: arbitraryBody })
  .map(({ path, body }) => ({ path, payload: Buffer.from(body), isWhole: false, intact: [] }))

/** Requests of all sorts of callers. About one in seven is accepted. */
export const requestCase: fc.Arbitrary<Case> = fc.record({
  target: fc.oneof({ weight: 8, arbitrary: single }, { weight: 3, arbitrary: batch }, { weight: 1, arbitrary: shapeless }),
  query,
  headers,
  credentials
}).map(({ target, query, headers, credentials }) => ({
  ...target,
  // A batch has no query parameters, and many would only be refused.
  query: ROUTES[target.path] === 'batch' && !BROKEN_QUERIES.includes(query) ? '' : query,
  headers: { ...headers, ...credentials }
}))

/** What a response is known by. */
export interface Answer { statusCode: number, headers: Record<string, unknown>, payload: string }

/** The verdict on a response: what is wrong with it, and the identities that the relay must have sent for it. */
export interface Judgement { faults: string[], pairs: string[] }

/**
 * Compares a response with the rules in the order of the relay's hooks: the origin, the credentials, the framing, the
 * body. An identity that was changed may be valid or not, so for it this model knows only who may send it.
 */
export function judge ({ path, query, headers, payload, isWhole, intact }: Case, answer: Answer): Judgement {
  const sender = senderOf(headers)
  const route = ROUTES[path]
  const { statusCode: status } = answer
  const only = (...statuses: number[]): Judgement => ({ faults: statuses.includes(status) ? problemFaults(answer) : [`${status} instead of ${statuses}`], pairs: [] })

  if (route === 'malformed') return only(400)
  if (headers.origin !== undefined && headers.origin !== LISTED) return only(403)
  if (route !== undefined && sender.kind === 'none') return only(401)
  if (route === 'batch' && sender.kind === 'user') return only(403)
  const type = headers['content-type']
  if (!ENCODINGS.includes(headers['content-encoding'] ?? '') || /latin1|utf-16/.test(type ?? '')) return only(415)
  // Fastify looks at the media type of a body that no route reads.
  if (route === undefined) return only(404, 415)
  if (type === undefined && payload.length === 0) return only(400)
  if (type === undefined || !TYPES.includes(type)) return only(415)
  const body = parse(payload)
  if (typeof body !== 'object' || body === null || Array.isArray(body)) return only(400)
  if (BROKEN_QUERIES.includes(query)) return only(400)

  if (route === 'single') {
    const { identified_id: user, anon_id: anon, distinct_id: distinct = user } = body
    const isForeign = sender.kind === 'user' && sender.user !== user
    const isValid = isWhole && intact[0] === true
    if ((status === 400 && !isValid) || distinct !== user) return only(400)
    if (isForeign) return only(403)
    if (status !== 200) return only(200)
    if (!query.includes('dry_run=1')) return { faults: answer.payload === '{"status":"accepted"}' ? [] : [answer.payload], pairs: [pairOf(user, anon)] }
    const { event, properties } = JSON.parse(answer.payload)
    return { faults: event === '$identify' && pairOf(properties.$identified_id, properties.$anon_id) === pairOf(user, anon) ? [] : [answer.payload], pairs: [] }
  }

  const isValid = isWhole && intact.includes(true)
  if (status === 400 && !isValid) return only(400)
  if (status !== 200 && status !== 207) return only(200, 207)
  const { results } = JSON.parse(answer.payload) as { results: { index: number, status: string }[] }
  const accepted = results.filter(result => result.status === 'accepted').map(({ index }) => index)
  const identities = (body.identities as unknown[]).map(one => Object(one) as Record<string, unknown>)
  const isComplete = results.length === identities.length && results.every(({ index }, at) => index === at) &&
    (status === 200) === (accepted.length === results.length) && (!isWhole || intact.every((isIntact, index) => !isIntact || accepted.includes(index)))
  const sent = accepted.map(index => identities[index] ?? {})
  const isFaithful = sent.every(({ identified_id: user, distinct_id: distinct = user }) => distinct === user)
  return { faults: isComplete && isFaithful ? [] : [answer.payload], pairs: sent.map(({ identified_id: user, anon_id: anon }) => pairOf(user, anon)) }
}

/** Returns what is missing in a problem (RFC 9457). */
function problemFaults ({ statusCode, headers, payload }: Answer): string[] {
  const problem = JSON.parse(payload)
  const isWhole = headers['content-type'] === 'application/problem+json' && problem.status === statusCode &&
    (statusCode !== 400 || problem.errors.length > 0) && (statusCode === 401) === ('www-authenticate' in headers)
  return isWhole ? [] : [payload]
}

/** Returns the value of a body; undefined when it is not JSON in UTF-8. */
function parse (payload: Buffer): Record<string, unknown> | undefined {
  try {
    return JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(payload))
  } catch {
    return undefined
  }
}
