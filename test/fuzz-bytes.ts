import { connect } from 'node:net'
import fc from 'fast-check'
import { anonId, pairOf } from './fuzz-bodies.ts'
import { credentials, LISTED, rightCredentials, senderOf, USERS } from './fuzz-callers.ts'
import type { Env } from './helper.ts'
import { readRequests, type Reading, type ReadRequest } from './http-reader.ts'

/** The bytes of a connection, as Latin-1, in two parts that are written one after the other. */
export interface RawCase {
  text: string
  /** The length of the first part. */
  cutAt: number
  /** True for requests that no step has changed. */
  isIntact: boolean
}

const INVALID = 'not-a-uuid'

/** The time between the two parts of a connection, in which the relay reads the first. */
const PART_MS = 5

/** How long a connection waits for the answer to a request that is refused, to a complete one, and to be closed. */
const [QUIET_MS, ANSWER_MS, CLOSE_MS] = [30, 2000, 10_000]

interface Parts { line: string, headers: string[], body: string }

const textOf = ({ line, headers, body }: Parts) => `${[line, ...headers].join('\r\n')}\r\n\r\n${body}`
const linesOf = (headers: Env) => Object.entries(headers).map(([name, value]) => `${name}: ${value}`)
const lengthOf = (length: number) => `content-length: ${length}`
const chunk = (text: string) => `${text.length.toString(16)}\r\n${text}\r\n`

const target = fc.constantFrom('/identify', '/identify', '/identify', '/identify?strict=1', '/identify?dry_run=1', '/identify/batch', '/identify/batch', 'http://x/identify', '/livez')
const upgrade = fc.oneof({ weight: 7, arbitrary: fc.constant([]) }, { weight: 1, arbitrary: fc.constant(['connection: upgrade', 'upgrade: h2c']) })
const origin = fc.oneof({ weight: 8, arbitrary: fc.constant([]) }, { weight: 1, arbitrary: fc.constantFrom([`origin: ${LISTED}`], ['origin: https://evil.example']) })

/** A request that is well formed, for one of these users. Its caller may be allowed to send it or not. */
const requestFor = (...users: string[]): fc.Arbitrary<Parts> => fc.record({
  target,
  user: fc.constantFrom(...users),
  anon: anonId,
  credentials: fc.oneof(rightCredentials, credentials),
  origin,
  upgrade,
  isChunked: fc.constantFrom(false, false, true),
  split: fc.nat(60)
}).map(({ target, user, anon, credentials, origin, upgrade, isChunked, split }) => {
  const identity = { identified_id: user, anon_id: anon }
  const body = JSON.stringify(target === '/identify/batch' ? { identities: [identity, { ...identity, anon_id: INVALID }] } : identity)
  return {
    line: `${target === '/livez' ? 'GET' : 'POST'} ${target} HTTP/1.1`,
    headers: ['host: x', 'content-type: application/json', ...linesOf(credentials), ...origin, ...upgrade, isChunked ? 'transfer-encoding: chunked' : lengthOf(body.length)],
    body: isChunked ? `${chunk(body.slice(0, split + 1))}${chunk(body.slice(split + 1))}0\r\n\r\n` : body
  }
})
const request = requestFor(...USERS)

const pipelined = fc.array(request, { minLength: 1, maxLength: 3 }).map(list => list.map(textOf).join(''))

const CODINGS = [
  'transfer-encoding: chunked', 'Transfer-Encoding: Chunked', 'transfer-encoding: xchunked', 'transfer-encoding: chunked, identity', 'transfer-encoding: identity',
  'transfer-encoding: gzip, chunked', 'transfer-encoding: chunked, chunked', 'transfer-encoding: "chunked"', 'transfer-encoding: chunked;q=1', 'transfer-encoding: chunked,',
  'transfer-encoding: , chunked', 'transfer-encoding:\x0bchunked', 'transfer-encoding:\tchunked\t', 'transfer-encoding: \x00chunked', 'transfer-encoding : chunked',
  ' transfer-encoding: chunked', 'transfer-encoding:\r\n chunked', 'x: y\r\n transfer-encoding: chunked', 'x: y\rtransfer-encoding: chunked',
  'x: y\ntransfer-encoding: chunked', 'transfer_encoding: chunked', 'transfer-encoding: chunked\x00', 'transfer-encoding:', 'te: chunked', 'transfer-encoding: chunkedchunked',
  'connection: close, transfer-encoding', 'connection: keep-alive', 'connection: upgrade\r\nupgrade: h2c', 'expect: 100-continue', 'trailer: content-length'
]
const LENGTHS: ((length: number) => string)[] = [
  length => `Content-Length:${length}`, length => `content-length: +${length}`, length => `content-length: ${length}, ${length}`, length => `content-length: 0${length}`,
  length => `content-length: 0x${length.toString(16)}`, length => `content-length: ${length} ${length}`, length => `content-length: ${length};`,
  length => `content-length : ${length}`, length => ` content-length: ${length}`, length => `content-length:\r\n ${length}`, length => `content-length: ${length}\x00`,
  length => `content-length: ${length}e0`, length => `content-length: ${length}.0`, length => `content-length: -${length}`, length => `content_length: ${length}`,
  length => `x: y\ncontent-length: ${length}`, length => `x: y\rcontent-length: ${length}`, () => 'content-length:', () => 'content-length: 99999999999999999999',
  length => `content-length: ${2 ** 32 + length}`, length => `content-length:\x0b${length}`
]

/** A line of the head that says where the body ends, or seems to. `of` is the part of the body that a length counts. */
interface Framing { line: (length: number) => string, of: 'all' | 'before' | 'none' | 'more' }

const framing: fc.Arbitrary<Framing> = fc.oneof(
  fc.constantFrom(...CODINGS).map((coding): Framing => ({ line: () => coding, of: 'all' })),
  fc.record({
    line: fc.oneof(fc.constant(lengthOf), fc.constantFrom(...LENGTHS)),
    of: fc.constantFrom<Framing['of'][]>('all', 'all', 'before', 'none', 'more')
  }))

const BEFORE = [
  '', '', '', '', '', '0\r\n\r\n', 'body', 'chunk', 'size', '\r\n\r\n', '0\r\n', '0;x=\n\r\n\r\n', '0\r\nx: y\r\n\r\n', '0\n\n', '-1\r\n\r\n', '00000000\r\n\r\n', '0 \r\n\r\n', '0x0\r\n\r\n'
]

const neighbour = fc.oneof({ weight: 2, arbitrary: fc.constant('') }, { weight: 1, arbitrary: request.map(textOf) })

/**
 * A request with another one in its body, where only a server that reads the framing otherwise would find it. Sometimes
 * the framing truly ends before the inner request, which then counts as any other.
 */
const nested = fc.record({
  earlier: neighbour,
  outer: request,
  inner: requestFor('smuggled-1', 'smuggled-2'),
  framing: fc.oneof(fc.constant<Framing[]>([{ line: lengthOf, of: 'all' }]), fc.tuple(framing), fc.array(framing, { minLength: 2, maxLength: 3 })),
  before: fc.constantFrom(...BEFORE),
  behind: fc.constantFrom('', '', '\r\n0\r\n\r\n', '0\r\n\r\n', '\r\n'),
  follower: neighbour
}).map(({ earlier, outer, inner, framing, before, behind, follower }) => {
  const smuggled = textOf(inner)
  const start = { body: outer.body, chunk: `${chunk(outer.body)}0\r\n\r\n`, size: `${smuggled.length.toString(16)}\r\n` }[before] ?? before
  const body = start + smuggled + behind
  const lengths = { all: body.length, before: start.length, none: 0, more: body.length + 5 }
  const headers = outer.headers.filter(line => !/^(?:content-length|transfer-encoding)/.test(line))
  return earlier + textOf({ ...outer, headers: headers.concat(framing.map(({ line, of }) => line(lengths[of]))), body }) + follower
})

const FRAGMENTS = [
  '\r\n', '\n', '\r', '\0', ' ', '\t', ':', ',', ';', '"', '\x0b', '\x7f', '\x80', '\xff', '\r\n ', '\r\n\r\n', '0\r\n\r\n', 'POST ', 'GET / HTTP/1.1\r\nhost: x\r\n\r\n', 'CONNECT ',
  '\r\nhost: y', '\r\ncontent-length: 0', '\r\ncontent-length: 5', '\r\ntransfer-encoding: chunked', '\r\nconnection: close',
  '\r\nconnection: keep-alive', '\r\nauthorization: Bearer wrong', '\r\nx-api-key: wrong', `\r\norigin: ${LISTED}`, '\r\norigin: null', '\r\nexpect: 100-continue',
  '\r\nupgrade: websocket', '\r\ncontent-type: text/plain'
]
const VERSIONS = [' HTTP/1.0', ' HTTP/1.0\r\nconnection: keep-alive', '', ' ', ' HTTP/0.9', ' HTTP/1.2', ' HTTP/2.0', ' HTTP/3.0', ' HTTP/1.10', ' HTTP/1.1 ', ' http/1.1', ' ICE/1.1', ' HTTP 1.1']

interface Change { kind: string, at: number, to: number, length: number, fragment: string, version: string }

/** One change to the bytes of a connection. Offsets are taken modulo its length. */
const change: fc.Arbitrary<Change> = fc.record({
  kind: fc.constantFrom('byte', 'insert', 'delete', 'copy', 'cut', 'repeat line', 'drop line', 'fold line', 'move line', 'insert line', 'version'),
  // Many of them in the first line and the first header.
  at: fc.oneof(fc.nat(60), fc.nat(100_000)),
  to: fc.nat(100_000),
  length: fc.integer({ min: 1, max: 40 }),
  fragment: fc.oneof(fc.constantFrom(...FRAGMENTS), fc.nat(255).map(byte => String.fromCharCode(byte))),
  version: fc.constantFrom(...VERSIONS)
})

function apply (text: string, { kind, at, to, length, fragment, version }: Change): string {
  if (kind.endsWith('line')) return changeLine(text.split('\r\n'), kind, at, to, fragment).join('\r\n')
  const index = at % (text.length + 1)
  const [start, end] = [text.slice(0, index), text.slice(index)]
  switch (kind) {
    case 'version': return text.replace(' HTTP/1.1', version)
    case 'byte': return start + fragment[0] + end.slice(1)
    case 'insert': return start + fragment + end
    case 'delete': return start + end.slice(length)
    case 'copy': return insertAt(text, to % (text.length + 1), end.slice(0, length))
    default: return start
  }
}

const insertAt = (text: string, index: number, more: string) => text.slice(0, index) + more + text.slice(index)

function changeLine (lines: string[], kind: string, at: number, to: number, fragment: string): string[] {
  const index = at % lines.length
  const line = lines[index] as string
  switch (kind) {
    case 'repeat line': return lines.toSpliced(to % lines.length, 0, line)
    case 'drop line': return lines.toSpliced(index, 1)
    case 'fold line': return lines.with(index, insertAt(line, to % (line.length + 1), '\r\n '))
    case 'move line': return lines.toSpliced(index, 1).toSpliced(to % lines.length, 0, line)
    default: return lines.toSpliced(index, 0, ...fragment.split('\r\n').filter(part => part !== ''))
  }
}

const changes = fc.oneof({ weight: 2, arbitrary: fc.tuple(change) }, { weight: 1, arbitrary: fc.array(change, { minLength: 2, maxLength: 4 }) })

/** Texts with their changes, cut anywhere or behind a head. */
const caseOf = (texts: fc.Arbitrary<string>, changes: fc.Arbitrary<Change[]>): fc.Arbitrary<RawCase> =>
  fc.record({ text: texts, changes, at: fc.nat(1000), isBehindHead: fc.boolean() }).map(({ text: source, changes, at, isBehindHead }) => {
    const text = changes.reduce(apply, source)
    const heads = [...text.matchAll(/\r\n\r\n/g)].map(({ index }) => index + 4)
    return { text, cutAt: (isBehindHead ? heads[at % heads.length] : undefined) ?? at % (text.length + 1), isIntact: text === source }
  })
const unchanged = fc.constant<Change[]>([])

/** Connections of one to three requests, or of one with another in its body. One in ten is well formed, the others hardly ever. */
export const rawCase: fc.Arbitrary<RawCase> = fc.oneof(
  { weight: 1, arbitrary: caseOf(pipelined, unchanged) },
  { weight: 4, arbitrary: caseOf(pipelined, changes) },
  // The relay may refuse more than the rules demand.
  { weight: 3, arbitrary: caseOf(nested, unchanged).map(one => ({ ...one, isIntact: false })) },
  { weight: 2, arbitrary: caseOf(nested, changes) })

/** Returns the identities that a request may send at most: those in its body, if its caller has the credentials for them. */
export function pairsOf ({ method, headers, body }: ReadRequest): string[] {
  const origins = headers.get('origin') ?? []
  // Node takes the first of several Authorization headers, and joins others.
  const sender = senderOf({ authorization: headers.get('authorization')?.[0], 'x-api-key': headers.get('x-api-key')?.join(', ') })
  if (method !== 'POST' || sender.kind === 'none' || origins.some(origin => origin !== LISTED)) return []
  const whole = Object(parse(body)) as Record<string, unknown>
  const list: unknown[] = sender.kind === 'key' && Array.isArray(whole.identities) ? whole.identities : []
  return [whole, ...list].map(one => Object(one) as Record<string, unknown>)
    .filter(({ identified_id: user }) => typeof user === 'string' && (sender.kind === 'key' || user === sender.user))
    .map(({ identified_id: user, anon_id: anon }) => pairOf(user, anon))
}

/**
 * Returns the identities that the relay must send: those of the first requests of a connection that has no malformed
 * one. It may close the connection after a request with Upgrade, or one whose body it does not read.
 */
export function mustSend ({ requests, rest }: Reading): string[] {
  if (rest !== 'nothing') return []
  const pairs: string[] = []
  for (const request of requests) {
    const own = request.target.includes('dry_run') ? [] : pairsOf(request)
    pairs.push(...own.filter(pair => !pair.includes(INVALID)))
    if (own.length === 0 || request.headers.has('upgrade')) break
  }
  return pairs
}

function parse (body: string): unknown {
  try {
    return JSON.parse(Buffer.from(body, 'latin1').toString().replace(/^\ufeff/, ''))
  } catch {
    return undefined
  }
}

/** The statuses of all answers in `text`, without 100 Continue. */
export const finalStatuses = (text: string) => [...text.matchAll(/HTTP\/1\.1 ([2-9]\d\d) /g)].map(([, status]) => Number(status))

/**
 * Sends the bytes of a case in two writes. Resolves with what came back when the relay has closed the connection. The
 * caller ends it when every complete request has its answer: the relay would wait for the rest of an incomplete one.
 */
export function send (port: number, { text, cutAt }: RawCase): Promise<{ received: string, isLate: boolean }> {
  const { requests, rest } = readRequests(text)
  const answers = requests.length + (rest === 'nothing' ? 0 : 1)
  // A request behind one with Upgrade may get no answer.
  const certain = requests.findIndex(({ headers }) => headers.has('upgrade')) + 1 || requests.length
  return new Promise((resolve, reject) => {
    let received = ''
    let isLate = false
    const end = () => socket.end()
    const socket = connect(port, '127.0.0.1', () => {
      socket.write(text.slice(0, cutAt), 'latin1')
      setTimeout(() => {
        socket.write(text.slice(cutAt), 'latin1')
        if (requests.length === 0) end()
      }, cutAt === 0 || cutAt === text.length ? 0 : PART_MS)
    })
    let silence = setTimeout(end, ANSWER_MS)
    const timer = setTimeout(() => {
      isLate = true
      socket.destroy()
    }, CLOSE_MS)
    socket.on('data', chunk => {
      received += String(chunk)
      const count = finalStatuses(received).length
      clearTimeout(silence)
      if (count >= answers) end()
      else silence = setTimeout(end, count < certain ? ANSWER_MS : QUIET_MS)
    })
    socket.on('error', (error: NodeJS.ErrnoException) => error.syscall === 'connect' && reject(error))
    socket.on('close', () => {
      clearTimeout(silence)
      clearTimeout(timer)
      resolve({ received, isLate })
    })
  })
}
