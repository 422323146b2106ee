import { isUtf8 } from 'node:buffer'
import type { IncomingMessage } from 'node:http'
import type { FastifyReply, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import type { Config } from '../config.ts'

declare module 'fastify' {
  interface FastifyInstance {
    /** How many bytes of bodies are arriving, or wait for their answer to leave. */
    bytesInFlight: () => number
  }
  interface FastifyRequest {
    /** The bytes that the body holds of MAX_BYTES_IN_FLIGHT, from its first byte until its answer has left. */
    lease: Lease | undefined
  }
  interface FastifyContextConfig {
    /** The most of MAX_BYTES_IN_FLIGHT that the bodies of such routes may hold together; by default all of it. */
    bodyShare?: number
  }
}

/** A body that could not be read. `problem` is its code; `detail` the broken rule, for the caller. */
export class BodyError extends Error {
  readonly problem: 'invalid_request' | 'body_too_large' | 'overloaded'
  constructor (problem: BodyError['problem'], detail = '') {
    super(detail)
    this.problem = problem
  }
}

export interface Lease {
  /** Takes more bytes of the budget; false where it has none left. */
  grow: (bytes: number) => boolean
  /** Gives all of them back. */
  release: () => void
}

/** Counts bytes against a bound, over all who hold some. */
export function createByteBudget (max: number) {
  let used = 0
  /** By share: what the bodies of routes with that share hold. */
  const shares = new Map<number, number>()

  return {
    used: () => used,
    lease (share = 1): Lease {
      let held = 0
      const take = (bytes: number) => {
        held += bytes
        used += bytes
        shares.set(share, (shares.get(share) ?? 0) + bytes)
      }
      return {
        grow (bytes) {
          const isOver = used + bytes > max || (shares.get(share) ?? 0) + bytes > max * share
          if (!isOver) take(bytes)
          return !isOver
        },
        release: () => take(-held)
      }
    }
  }
}

const NO_BYTES = Buffer.alloc(0)

type Done = (error: Error | null, body?: unknown) => void

/** Gives every POST a lease, which `readBody` fills, and ends it when the answer has left or its connection is gone. */
export const bodies = fp<{ config: Pick<Config, 'MAX_BYTES_IN_FLIGHT'> }>(async (app, { config }) => {
  const budget = createByteBudget(config.MAX_BYTES_IN_FLIGHT)
  app.decorate('bytesInFlight', budget.used)
  app.decorateRequest('lease', undefined)
  app.addHook('preParsing', (request: FastifyRequest, reply: FastifyReply, payload, done) => {
    if (request.method === 'POST') {
      const lease = budget.lease(request.routeOptions.config.bodyShare)
      request.lease = lease
      reply.raw.on('close', lease.release)
    }
    done(null, payload)
  })
})

/**
 * A content type parser that yields the body's bytes. Fails with a BodyError where the body is longer than the route
 * takes or MAX_BYTES_IN_FLIGHT has no room for it; then nothing more of it is kept.
 */
export function readBody (
  request: FastifyRequest, payload: IncomingMessage, done: (error: Error | null, body: Buffer) => void
): void {
  const { bodyLimit } = request.routeOptions
  if (Number(request.headers['content-length'] ?? 0) > bodyLimit) return done(new BodyError('body_too_large'), NO_BYTES)
  // Most bodies come in one piece, which is taken as it is. What comes in many small ones must not cost an object each.
  let body: Buffer | undefined
  let length = 0

  function append (chunk: Buffer): void {
    if (length + chunk.length > bodyLimit) return fail(new BodyError('body_too_large'))
    if (request.lease?.grow(chunk.length) === false) return fail(new BodyError('overloaded'))
    if (body === undefined) {
      body = chunk
    } else {
      if (length + chunk.length > body.length) body = enlarged(body, length, length + chunk.length)
      chunk.copy(body, length)
    }
    length += chunk.length
  }
  function end (): void {
    settle(null, body?.subarray(0, length))
  }
  function fail (error: Error): void {
    settle(error)
    payload.resume()
  }
  const abort = () => settle(new BodyError('invalid_request', 'must arrive whole'))

  function settle (error: Error | null, value: Buffer = NO_BYTES): void {
    payload.off('data', append).off('end', end).off('error', abort)
    payload.on('error', () => {})
    done(error, value)
  }
  payload.on('data', append).on('end', end).on('error', abort)
}

/** A buffer of at least `needed` bytes that begins with the first `length` of `body`. */
function enlarged (body: Buffer, length: number, needed: number): Buffer {
  const larger = Buffer.allocUnsafe(Math.max(needed, 2 * body.length))
  body.copy(larger, 0, 0, length)
  return larger
}

/** A content type parser that yields what the body says in JSON; a body of more than `most` bytes is refused. */
export const readJson = (most: number) => (request: FastifyRequest, payload: IncomingMessage, done: Done): void =>
  readBody(request, payload, (error, body) => {
    if (error !== null) return done(error)
    let value: unknown
    try {
      if (body.length > most) throw new BodyError('invalid_request', tooLong(most))
      value = parseJson(checkUtf8(body))
    } catch (error) {
      return done(error as Error)
    }
    done(null, value)
  })

/** What is said of JSON that has more than `most` bytes. */
export const tooLong = (most: number) => `must be at most ${most / 1024} KiB of JSON`

/** JSON in UTF-8: Node would read other bytes as U+FFFD, and two users' ids could become one. Throws a BodyError. */
export function checkUtf8 (body: Buffer): Buffer {
  if (!isUtf8(body)) throw notJson()
  const hasMark = body[0] === 0xEF && body[1] === 0xBB && body[2] === 0xBF
  return hasMark ? body.subarray(3) : body
}

/** Returns what some of the bytes say in JSON, as `JSON.parse` does. Throws a BodyError where they are no JSON. */
export function parseJson (body: Buffer, start = 0, end = body.length): unknown {
  try {
    return JSON.parse(body.toString('utf8', start, end))
  } catch {
    throw notJson()
  }
}

const notJson = () => new BodyError('invalid_request', 'must be JSON in UTF-8')

/** Where the elements of a list stand in a body, and the JSON text around them. */
export interface Outline {
  /** The body with each element of its lists replaced by the element's number. */
  text: string
  /** The bounds of the elements, two numbers each. */
  bounds: number[]
}

const [QUOTE, BACKSLASH, COMMA, OPEN, CLOSE, OPEN_LIST, CLOSE_LIST] = Array.from('"\\,{}[]', sign => sign.charCodeAt(0))

/**
 * Finds the elements of the lists on the second level of a JSON text (`{"identities":[…]}`) without parsing them, so
 * that each can be parsed by itself: JSON.parse of a hostile megabyte takes a tenth of a second and 30 MB. Where the
 * text around them and every element are JSON, so is the body, and the other way round. Undefined where there are more
 * than `most`.
 */
export function outline (body: Buffer, most: number): Outline | undefined {
  const bounds: number[] = []
  let text = ''
  let depth = 0
  /** Where the text since the last element begins; where the element that is open does. */
  let from = 0
  let start = -1
  const close = (end: number) => {
    if (isBlank(body, start, end) && body[start - 1] === OPEN_LIST && body[end] === CLOSE_LIST) return
    text += `${body.toString('utf8', from, start)}${bounds.length / 2}`
    bounds.push(start, end)
    from = end
  }
  for (let index = 0; index < body.length; index++) {
    const byte = body[index]
    if (byte === QUOTE) {
      for (index++; index < body.length && body[index] !== QUOTE; index++) if (body[index] === BACKSLASH) index++
    } else if (byte === OPEN || byte === OPEN_LIST) {
      depth++
      if (depth === 2 && byte === OPEN_LIST) start = index + 1
    } else if (byte === CLOSE || byte === CLOSE_LIST) {
      if (depth === 2 && start !== -1) close(index)
      if (depth === 2) start = -1
      depth--
    } else if (byte === COMMA && depth === 2 && start !== -1) {
      close(index)
      start = index + 1
    }
    if (bounds.length > 2 * most) return undefined
  }
  return { text: text + body.toString('utf8', from), bounds }
}

function isBlank (body: Buffer, start: number, end: number): boolean {
  for (let index = start; index < end; index++) {
    const byte = body[index]
    if (byte !== 0x20 && byte !== 0x09 && byte !== 0x0A && byte !== 0x0D) return false
  }
  return true
}
