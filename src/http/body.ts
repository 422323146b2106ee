import type { IncomingMessage } from 'node:http'
import type { Socket } from 'node:net'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import type { Slices } from '../concurrency/slices.ts'
import type { Config } from '../config.ts'
import { checkUtf8, parseJson } from './json.ts'

declare module 'http' {
  interface IncomingMessage {
    /**
     * The part of MAX_BYTES_IN_FLIGHT that the body holds, from its first byte until its response has left. Set for
     * requests of routes that accept bodies.
     */
    lease?: Lease
  }
}

/** The error of a body that cannot be read. `problem` is its code; `detail` states the broken rule. */
export class BodyError extends Error {
  readonly problem: 'invalid_request' | 'body_too_large' | 'overloaded'
  constructor (problem: BodyError['problem'], detail = '') {
    super(detail)
    this.problem = problem
  }
}

/** Bytes of a budget. All leases of one share together hold at most `share.max`. */
export class Lease {
  held = 0
  readonly #budget: Bound
  readonly #share: Bound
  constructor (budget: Bound, share: Bound) {
    this.#budget = budget
    this.#share = share
  }

  /** Takes more bytes and returns true. Returns false, and takes none, when the budget or the share has too few. */
  grow (bytes: number): boolean {
    if (this.#budget.used + bytes > this.#budget.max || this.#share.used + bytes > this.#share.max) return false
    this.#take(bytes)
    return true
  }

  /** Gives all bytes back. A second call has no effect. */
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

/** Node's cost to read a chunk of a body: a fixed part, and a part for its bytes. */
const CHUNK_US = 2
const BYTES_PER_US = 2000

/** Returns a budget of `max` bytes. */
export function createByteBudget (max: number) {
  const budget: Bound = { used: 0, max }
  return {
    used: () => budget.used,
    /** Returns a function that makes leases. Together these hold at most `fraction` of the budget. */
    share (fraction: number): () => Lease {
      const share: Bound = { used: 0, max: max * fraction }
      return () => new Lease(budget, share)
    }
  }
}

/** A body may have MAX_CHUNKS chunks, and more when they have MIN_CHUNK_BYTES bytes on average. */
const MAX_CHUNKS = 1000
const MIN_CHUNK_BYTES = 32
/** Node's cost of the tiny chunks that it has read beyond that, in µs. */
const TINY_US = 10_000
const TINY = 'must not arrive in a thousand tiny chunks'

const NO_BYTES = Buffer.alloc(0)

type Done = (error: Error | null, body?: unknown) => void

interface Options {
  config: Pick<Config, 'MAX_BYTES_IN_FLIGHT'>
  /** Records the cost of reading from a connection, in µs. */
  recordCost: (socket: Socket, us: number) => void
}

interface ReaderOptions {
  types: string[]
  /** The largest body, in bytes. */
  limit: number
  /** The fraction of MAX_BYTES_IN_FLIGHT that all such bodies may hold together. */
  share: number
  parse: (body: Buffer, done: Done) => void
}

export type Bodies = ReturnType<typeof createBodies>

/** Returns a bound on the memory of bodies: each holds a part of MAX_BYTES_IN_FLIGHT until its response has left. */
export function createBodies ({ config, recordCost }: Options) {
  const budget = createByteBudget(config.MAX_BYTES_IN_FLIGHT)
  return {
    /** Returns the number of bytes that all bodies hold. */
    bytesInFlight: budget.used,

    /**
     * Lets the routes of `app` read bodies. A body longer than `limit`, or beyond MAX_BYTES_IN_FLIGHT, fails with a
     * BodyError, and the rest of it is discarded.
     */
    accept (app: FastifyInstance, { types, limit, share, parse }: ReaderOptions): void {
      const createLease = budget.share(share)
      app.addHook('onRequest', ({ raw }, reply, done) => {
        const lease = createLease()
        raw.lease = lease
        // If the request has a connection, pipelining releases the lease: a second listener would be dear.
        if (raw.pipeline === undefined) reply.raw.on('close', () => lease.release())
        done()
      })
      app.addContentTypeParser(types, createReader({ limit, recordCost, parse }))
    }
  }
}

/** Returns a content type parser that gathers a body within its request's lease and passes it to `parse`. */
function createReader (
  { limit, recordCost, parse }: Pick<ReaderOptions, 'limit' | 'parse'> & Pick<Options, 'recordCost'>
) {
  return ({ headers, raw }: FastifyRequest, payload: IncomingMessage, done: Done): void => {
    const lease = raw.lease as Lease
    const declared = Number(headers['content-length'] ?? 0)
    if (declared > limit) return done(new BodyError('body_too_large'))
    // Most bodies arrive in one chunk, which is used without a copy. Many small ones must not cost an object each.
    let body: Buffer = NO_BYTES
    let length = 0
    let chunks = 0
    let isOver = false

    function append (chunk: Buffer): void {
      // The rest of a refused body is discarded. Without a listener Node would buffer each chunk first.
      if (isOver) return
      chunks++
      if (chunks > MAX_CHUNKS && length < chunks * MIN_CHUNK_BYTES) {
        recordCost(payload.socket, TINY_US)
        return end(new BodyError('invalid_request', TINY))
      }
      if (length + chunk.length > limit) return end(new BodyError('body_too_large'))
      // Nearly all bodies are one small chunk, too cheap to record.
      if (chunks > 1 || chunk.length > SMALL) recordCost(payload.socket, CHUNK_US + chunk.length / BYTES_PER_US)
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
      if (isOver) return
      isOver = true
      // These closures live as long as the request, and the body must not.
      const whole = body.length === length ? body : body.subarray(0, length)
      body = NO_BYTES
      if (error === undefined) parse(whole, done)
      else done(error instanceof BodyError ? error : new BodyError('invalid_request', 'must arrive whole'))
    }
    payload.on('data', append).on('end', end).on('error', end)
  }
}

/** Returns a buffer of at least `needed` bytes, with the first `length` of `body`. Unused pages take no memory. */
function enlarged (body: Buffer, length: number, needed: number): Buffer {
  const larger = Buffer.allocUnsafeSlow(Math.max(needed, Math.ceil(1.5 * body.length)))
  body.copy(larger, 0, 0, length)
  return larger
}

/** A body of up to this many bytes is parsed at once. */
const SMALL = 8192

/** Returns a parser for JSON that refuses more than `max` bytes. A body that is not small waits for its slice. */
export const parseAsJson = (max: number, nextSlice: Slices) => (body: Buffer, done: Done): void => {
  if (body.length > max) return done(new BodyError('invalid_request', tooLong(max)))
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

/** Returns the error text for JSON of more than `max` bytes. */
export const tooLong = (max: number) => `must be at most ${max / 1024} KiB of JSON`
