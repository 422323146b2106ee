import type { IncomingMessage } from 'node:http'
import type { Socket } from 'node:net'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import type { Slices } from '../concurrency/slices.ts'
import type { Config } from '../config.ts'
import { checkUtf8, parseJson } from './json.ts'

declare module 'fastify' {
  interface FastifyRequest {
    /** The bytes that the body holds of MAX_BYTES_IN_FLIGHT, from its first byte until its answer has left. */
    lease: Lease
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

/** Some bytes of a budget, of which all leases of one share may hold `share.max` together. */
export class Lease {
  held = 0
  readonly #budget: Bound
  readonly #share: Bound
  constructor (budget: Bound, share: Bound) {
    this.#budget = budget
    this.#share = share
  }

  /** Takes more bytes; false, and takes none, where the budget or the share has none left. */
  grow (bytes: number): boolean {
    if (this.#budget.used + bytes > this.#budget.max || this.#share.used + bytes > this.#share.max) return false
    this.#take(bytes)
    return true
  }

  /** Gives all of them back. */
  release (): void {
    this.#take(-this.held)
  }

  #take (bytes: number): void {
    this.held += bytes
    this.#budget.used += bytes
    this.#share.used += bytes
  }
}

interface Bound { used: number, readonly max: number }

const ignore = () => {}

/** What Node takes to read a piece of a body: for the piece, and for its bytes. */
const PIECE_US = 2
const BYTES_PER_US = 2000

/** Counts bytes against a bound, over all who hold some. */
export function createByteBudget (max: number) {
  const budget: Bound = { used: 0, max }
  return {
    used: () => budget.used,
    /** Returns what makes leases that may hold so much of the budget together, a fraction of it. */
    share (fraction: number): () => Lease {
      const share: Bound = { used: 0, max: max * fraction }
      return () => new Lease(budget, share)
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

interface Accepted {
  types: string[]
  /** The most that a body may have, in bytes. */
  limit: number
  /** The fraction of MAX_BYTES_IN_FLIGHT that all such bodies may hold together. */
  share: number
  /** Makes the request's `body` of its bytes. */
  parse: (body: Buffer, done: Done) => void
}

export type Bodies = ReturnType<typeof createBodies>

/** Bounds the memory of bodies: a body holds what it has of MAX_BYTES_IN_FLIGHT until its answer has left. */
export function createBodies ({ config, spend }: Options) {
  const budget = createByteBudget(config.MAX_BYTES_IN_FLIGHT)
  return {
    /** How many bytes are arriving, or wait for their answer to leave. */
    bytesInFlight: budget.used,

    /**
     * Lets the routes of `app` read bodies. A body that is longer than `limit`, or for which MAX_BYTES_IN_FLIGHT has no
     * room, fails with a BodyError; then nothing more of it is kept.
     */
    accept (app: FastifyInstance, { types, limit, share, parse }: Accepted): void {
      const lease = budget.share(share)
      app.decorateRequest('lease', null as unknown as Lease)
      app.addHook('onRequest', (request, reply, done) => {
        const held = lease()
        request.lease = held
        reply.raw.on('close', () => held.release())
        done()
      })
      app.addContentTypeParser(types, createReader({ limit, spend, parse }))
    }
  }
}

/** Returns a content type parser that gathers a body, within its request's lease, and gives it to `parse`. */
function createReader ({ limit, spend, parse }: Pick<Accepted, 'limit' | 'parse'> & Pick<Options, 'spend'>) {
  return ({ headers, lease }: FastifyRequest, payload: IncomingMessage, done: Done): void => {
    const declared = Number(headers['content-length'] ?? 0)
    if (declared > limit) return done(new BodyError('body_too_large'))
    // Most bodies come in one piece, which is taken as it is. Many small pieces must not cost an object each.
    let body: Buffer = NO_BYTES
    let length = 0
    let pieces = 0

    function append (chunk: Buffer): void {
      pieces++
      if (pieces > MAX_PIECES && length < pieces * PIECE_BYTES) {
        spend(payload.socket, TINY_US)
        return end(new BodyError('invalid_request', TINY))
      }
      if (length + chunk.length > limit) return end(new BodyError('body_too_large'))
      // Not for the small bodies that nearly all are.
      if (pieces > 1 || chunk.length > SMALL) spend(payload.socket, PIECE_US + chunk.length / BYTES_PER_US)
      if (!lease.grow(chunk.length)) return end(new BodyError('overloaded'))
      if (length === 0) {
        body = chunk
      } else {
        if (length + chunk.length > body.length) {
          body = enlarged(body, length, declared > length ? declared : length + chunk.length)
        }
        chunk.copy(body, length)
      }
      length += chunk.length
    }

    function end (error?: Error): void {
      // None of these closures may live as long as the request does: they keep the body.
      payload.off('data', append).off('end', end).off('error', end)
      if (error === undefined) return parse(body.length === length ? body : body.subarray(0, length), done)
      // What still comes is thrown away. Without a listener Node would buffer each piece first.
      payload.on('data', ignore)
      done(error instanceof BodyError ? error : new BodyError('invalid_request', 'must arrive whole'))
    }
    payload.on('data', append).on('end', end).on('error', end)
  }
}

/** A buffer of at least `needed` bytes that begins with the first `length` of `body`. Unused pages take no memory. */
function enlarged (body: Buffer, length: number, needed: number): Buffer {
  const larger = Buffer.allocUnsafeSlow(Math.max(needed, Math.ceil(1.5 * body.length)))
  body.copy(larger, 0, 0, length)
  return larger
}

/** A body of so many bytes is looked at at once. */
const SMALL = 8192

/** Parses a body as JSON. One of more than `most` bytes is refused; one that is not small waits for its slice. */
export const parseAsJson = (most: number, nextSlice: Slices) => (body: Buffer, done: Done): void => {
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
}

/** What is said of JSON that has more than `most` bytes. */
export const tooLong = (most: number) => `must be at most ${most / 1024} KiB of JSON`
