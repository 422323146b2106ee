import type { IncomingMessage } from 'node:http'
import type { Socket } from 'node:net'
import type { FastifyReply, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import type { Slices } from '../concurrency/slices.ts'
import type { Config } from '../config.ts'
import { checkUtf8, parseJson } from './json.ts'

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
  /** Told what reading has cost, in µs. */
  spend?: (us: number) => void
}

const ignore = () => {}

/** What Node takes to read a piece of a body: for the piece, and for its bytes. */
const PIECE_US = 2
const BYTES_PER_US = 2000

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

/** A body may come in as many pieces as this, and in more where they have that many bytes on average. */
const MAX_PIECES = 1000
const PIECE_BYTES = 32
/** What Node takes for the others that it has read with them. */
const TINY_US = 10_000
const TINY = 'must not come in a thousand tiny chunks'

const NO_BYTES = Buffer.alloc(0)

type Done = (error: Error | null, body?: unknown) => void

interface Options {
  config: Pick<Config, 'MAX_BYTES_IN_FLIGHT'>
  /** Told what reading has cost, in µs. */
  spend: (socket: Socket, us: number) => void
}

/** Gives every POST a lease, which `readBody` fills, and ends it when the answer has left or its connection is gone. */
export const bodies = fp<Options>(async (app, { config, spend }) => {
  const budget = createByteBudget(config.MAX_BYTES_IN_FLIGHT)
  app.decorate('bytesInFlight', budget.used)
  app.decorateRequest('lease', undefined)
  app.addHook('preParsing', (request: FastifyRequest, reply: FastifyReply, payload, done) => {
    if (request.method === 'POST') {
      const lease = budget.lease(request.routeOptions.config.bodyShare)
      const { socket } = request.raw
      let isMore = false
      request.lease = {
        release: lease.release,
        spend: us => spend(socket, us),
        grow (bytes) {
          // Not for the small bodies that nearly all are.
          if (isMore || bytes > SMALL) spend(socket, PIECE_US + bytes / BYTES_PER_US)
          isMore = true
          return lease.grow(bytes)
        }
      }
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
  const declared = Number(request.headers['content-length'] ?? 0)
  if (declared > bodyLimit) return done(new BodyError('body_too_large'), NO_BYTES)
  // Most bodies come in one piece, which is taken as it is. What comes in many small ones must not cost an object each.
  let body: Buffer | undefined
  let length = 0
  let pieces = 0

  function append (chunk: Buffer): void {
    pieces++
    if (pieces > MAX_PIECES && length < pieces * PIECE_BYTES) {
      request.lease?.spend?.(TINY_US)
      return fail(new BodyError('invalid_request', TINY))
    }
    if (length + chunk.length > bodyLimit) return fail(new BodyError('body_too_large'))
    if (request.lease?.grow(chunk.length) === false) return fail(new BodyError('overloaded'))
    if (body === undefined) {
      body = chunk
    } else {
      if (length + chunk.length > body.length) {
        body = enlarged(body, length, declared > length ? declared : length + chunk.length)
      }
      chunk.copy(body, length)
    }
    length += chunk.length
  }
  function end (): void {
    settle(null, body?.subarray(0, length))
  }
  function fail (error: Error): void {
    settle(error)
    // What still comes is thrown away. Without a listener Node would buffer each piece first.
    payload.on('data', ignore)
  }
  const abort = () => settle(new BodyError('invalid_request', 'must arrive whole'))

  function settle (error: Error | null, value: Buffer = NO_BYTES): void {
    payload.off('data', append).off('end', end).off('error', abort)
    // Not a closure: it lives as long as the request, and would keep the body.
    payload.on('error', ignore)
    done(error, value)
  }
  payload.on('data', append).on('end', end).on('error', abort)
}

/** A buffer of at least `needed` bytes that begins with the first `length` of `body`. Unused pages take no memory. */
function enlarged (body: Buffer, length: number, needed: number): Buffer {
  const larger = Buffer.allocUnsafeSlow(Math.max(needed, Math.ceil(1.5 * body.length)))
  body.copy(larger, 0, 0, length)
  return larger
}

/** A body of so many bytes is looked at at once. */
const SMALL = 8192

/**
 * A content type parser that yields what the body says in JSON. A body of more than `most` bytes is refused; one that
 * is not small waits for its slice of the event loop.
 */
export const readJson = (most: number, nextSlice: Slices) =>
  (request: FastifyRequest, payload: IncomingMessage, done: Done): void => readBody(request, payload, (error, body) => {
    if (error !== null) return done(error)
    if (body.length > most) return done(new BodyError('invalid_request', tooLong(most)))
    const parse = () => {
      let value: unknown
      try {
        value = parseJson(checkUtf8(body))
      } catch (error) {
        return done(error as Error)
      }
      done(null, value)
    }
    const slice = body.length > SMALL ? nextSlice() : undefined
    if (slice === undefined) parse()
    else slice.then(parse)
  })

/** What is said of JSON that has more than `most` bytes. */
export const tooLong = (most: number) => `must be at most ${most / 1024} KiB of JSON`
