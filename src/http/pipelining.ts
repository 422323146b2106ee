import type { IncomingMessage, RequestListener, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { linger } from './lingering-close.ts'

/** The most requests of one connection that are begun and unanswered. Pipelining clients send up to ten. */
const MAX_UNANSWERED = 16

/** The most refused requests in memory, over all connections. Each takes about 4 KB. */
const MAX_REFUSED = 2000

/** Node's cost of a refused request, in µs. */
const REFUSAL_US = 10

declare module 'http' {
  interface IncomingMessage {
    /** The requests of its connection; undefined for an injected request, which has no connection. */
    pipeline?: Pipeline
  }
}

interface Costs {
  /** Records Node's cost of a connection in this turn of the event loop, in µs. */
  recordCost: (socket: Socket, us: number) => void
  /** Counts refused requests of a connection against its caller's rate limit. */
  charge: (socket: Socket, count: number) => void
}

/** The requests of one connection. */
export interface Pipeline {
  /** The number of requests that are begun and unanswered. */
  unanswered: number
  /** The request that was begun last, until its response has left. */
  latest?: IncomingMessage | undefined
  hasRequested: boolean
  /** True while hooks may still refuse `latest`. Requests behind it wait. */
  isChecking: boolean
  waiting: [IncomingMessage, ServerResponse][]
  /** True after a refused request. Earlier requests are answered; no later one is begun. */
  isFull: boolean
  /** True after a response with `connection: close`. No later request is begun. */
  isClosing: boolean
  refused: number
  /** The refused requests that do not count against the rate limit yet. `refused` includes them. */
  uncharged: number
  /** Called when every complete request has its response. */
  whenAnswered?: () => void
}

/**
 * Returns a bound on the requests that a peer sends without waiting for responses. Node reads a chunk of 64 KB in one
 * turn and begins all requests in it, up to two thousand; pausing the socket comes too late. A refused request counts
 * against the rate limit, because Node keeps it until the requests before it are answered.
 */
export function createPipelining ({ recordCost, charge }: Costs) {
  let refused = 0

  function start (
    pipeline: Pipeline, request: IncomingMessage, response: ServerResponse, handler: RequestListener
  ): void {
    request.pipeline = pipeline
    pipeline.unanswered++
    pipeline.latest = request
    pipeline.hasRequested = true
    pipeline.isChecking = true
    response.on('close', () => {
      request.lease?.release()
      pipeline.unanswered--
      markChecked(pipeline, request, handler)
      if (pipeline.latest === request) pipeline.latest = undefined
      if (unfinished(pipeline) === 0) pipeline.whenAnswered?.()
    })
    // Set by connections for a request that no other may follow.
    if (response.hasHeader('connection')) pipeline.isClosing = true
    handler(request, response)
  }

  /** Records that a request has reached its handler or has its response, and begins the request behind it. */
  function markChecked (pipeline: Pipeline, request: IncomingMessage, handler: RequestListener): void {
    if (pipeline.latest !== request || !pipeline.isChecking) return
    pipeline.isChecking = false
    const next = pipeline.waiting.shift()
    if (next === undefined) return
    if (pipeline.isClosing) pipeline.waiting = []
    else start(pipeline, ...next, handler)
  }

  /** Refuses a request. The connection closes after the earlier responses; Node keeps the request until then. */
  function refuse (pipeline: Pipeline, { socket }: IncomingMessage): void {
    pipeline.refused++
    refused++
    if (pipeline.uncharged++ === 0) {
      setImmediate(() => {
        charge(socket, pipeline.uncharged)
        pipeline.uncharged = 0
      })
    }
    recordCost(socket, REFUSAL_US)
    // Node resumes the socket after each body, so every refusal pauses it again.
    socket.pause()
    if (refused > MAX_REFUSED) socket.destroy()
    if (pipeline.isFull || pipeline.isClosing) return
    pipeline.isFull = true
    skipAbortTraces(socket)
    whenAnswered(pipeline, () => linger(socket, recordCost))
  }

  return {
    open: (): Pipeline => ({
      unanswered: 0,
      hasRequested: false,
      isChecking: false,
      waiting: [],
      isFull: false,
      isClosing: false,
      refused: 0,
      uncharged: 0
    }),

    /** Forgets the refused requests of a closed connection. */
    close: (pipeline: Pipeline): void => { refused -= pipeline.refused },

    /** Calls `handler` for a request now, or when earlier ones are past their checks, or never. */
    receive (pipeline: Pipeline, request: IncomingMessage, response: ServerResponse, handler: RequestListener): void {
      const { isClosing, isFull, unanswered, waiting, isChecking } = pipeline
      if (isClosing || isFull || unanswered + waiting.length >= MAX_UNANSWERED) refuse(pipeline, request)
      else if (isChecking) waiting.push([request, response])
      else start(pipeline, request, response, handler)
    },

    markChecked
  }
}

/**
 * Turns off stack traces while a connection closes. Node makes an error for each of its requests, which no code reads.
 * For a thousand refused requests the traces take 25 of 30 ms.
 */
function skipAbortTraces (socket: Socket): void {
  let limit = Error.stackTraceLimit
  socket.prependListener('close', () => {
    limit = Error.stackTraceLimit
    Error.stackTraceLimit = 0
  })
  socket.on('close', () => { Error.stackTraceLimit = limit })
}

/** Returns the number of complete requests that are unanswered. */
export function unfinished ({ unanswered, latest }: Pipeline): number {
  return latest?.complete === false ? unanswered - 1 : unanswered
}

/** Returns true for a connection that waits for its next request. */
export function isIdle ({ hasRequested, unanswered, isClosing }: Pipeline): boolean {
  return hasRequested && unanswered === 0 && !isClosing
}

/** Returns true for the request whose response is the last of its connection. */
export function isLast ({ isFull, latest, waiting }: Pipeline, request: IncomingMessage): boolean {
  return isFull && latest === request && waiting.length === 0
}

/** Begins no more requests, and calls `callback` when every complete request has its response. */
export function endAfterAnswers (pipeline: Pipeline, callback: () => void): void {
  pipeline.isClosing = true
  pipeline.waiting = []
  whenAnswered(pipeline, callback)
}

function whenAnswered (pipeline: Pipeline, callback: () => void): void {
  pipeline.whenAnswered = callback
  if (unfinished(pipeline) === 0) callback()
}
