import type { IncomingMessage, RequestListener, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { linger } from './lingering-close.ts'

/** How many requests of one connection may be begun and not answered. Pipelining clients send up to ten. */
const MAX_UNANSWERED = 16

/** How many requests beyond that may be in memory, over all connections. Node has made some 4 KB of each. */
const MAX_REFUSED = 2000

/** What Node has spent on a request that is refused, in µs. */
const REFUSAL_US = 10

interface Costs {
  /** Told what Node has spent on a connection in this turn of the event loop, in µs. */
  spend: (socket: Socket, us: number) => void
  /** Told how many requests of a connection were refused. */
  charge: (socket: Socket, count: number) => void
}

/** The requests of one connection. */
export interface Pipeline {
  /** How many requests are begun and not answered. */
  unanswered: number
  /** The request that was begun last, until it is answered. */
  latest?: IncomingMessage | undefined
  /** True once there was any. */
  hasAsked: boolean
  /** True while `latest` may still be refused before its handler; what is pipelined behind it waits. */
  isChecking: boolean
  waiting: [IncomingMessage, ServerResponse][]
  /** True once a request was refused: what came before it is answered, nothing is taken any more. */
  isFull: boolean
  /** True once an answer with `connection: close` is made: nothing is begun any more. */
  isClosing: boolean
  /** How many requests were read and will not be begun. */
  refused: number
  /** Of those, how many are not counted against the caller's limit yet. */
  uncharged: number
  /** Runs once every request that has arrived whole has its answer. */
  whenAnswered?: () => void
}

/**
 * Bounds the requests that a peer sends without waiting for answers. Node reads a chunk of 64 KB in one turn, with two
 * thousand requests in it, and begins them all; to pause the socket comes too late. Each request that is
 * not begun counts against its caller's limit all the same: while those before it are under way Node keeps all of them.
 */
export function createPipelining ({ spend, charge }: Costs) {
  let refused = 0

  function start (
    pipeline: Pipeline, request: IncomingMessage, response: ServerResponse, begin: RequestListener
  ): void {
    pipeline.unanswered++
    pipeline.latest = request
    pipeline.hasAsked = true
    pipeline.isChecking = true
    response.on('close', () => {
      pipeline.unanswered--
      checked(pipeline, request, begin)
      if (pipeline.latest === request) pipeline.latest = undefined
      if (unfinished(pipeline) === 0) pipeline.whenAnswered?.()
    })
    begin(request, response)
  }

  /** Says that a request has reached its handler, or has its answer: what is pipelined behind it may begin. */
  function checked (pipeline: Pipeline, request: IncomingMessage, begin: RequestListener): void {
    if (pipeline.latest !== request || !pipeline.isChecking) return
    pipeline.isChecking = false
    const next = pipeline.waiting.shift()
    if (next === undefined) return
    if (pipeline.isClosing) pipeline.waiting = []
    else start(pipeline, ...next, begin)
  }

  /** What is begun is answered, then the connection closes. What Node has read meanwhile is held until then. */
  function refuse (pipeline: Pipeline, { socket }: IncomingMessage): void {
    pipeline.refused++
    refused++
    if (pipeline.uncharged++ === 0) {
      setImmediate(() => {
        charge(socket, pipeline.uncharged)
        pipeline.uncharged = 0
      })
    }
    spend(socket, REFUSAL_US)
    // Node reads on when it has read a body, so this is asked for each time.
    socket.pause()
    if (refused > MAX_REFUSED) socket.destroy()
    if (pipeline.isFull || pipeline.isClosing) return
    pipeline.isFull = true
    muteAborts(socket)
    whenAnswered(pipeline, () => linger(socket, spend))
  }

  return {
    open: (): Pipeline => ({
      unanswered: 0,
      hasAsked: false,
      isChecking: false,
      waiting: [],
      isFull: false,
      isClosing: false,
      refused: 0,
      uncharged: 0
    }),

    /** The connection is gone. */
    close: (pipeline: Pipeline): void => { refused -= pipeline.refused },

    /** Takes a request of Node's: calls `begin` for it now, or when those before it are past their checks, or never. */
    receive (pipeline: Pipeline, request: IncomingMessage, response: ServerResponse, begin: RequestListener): void {
      const { isClosing, isFull, unanswered, waiting, isChecking } = pipeline
      if (isClosing || isFull || unanswered + waiting.length >= MAX_UNANSWERED) refuse(pipeline, request)
      else if (isChecking) waiting.push([request, response])
      else start(pipeline, request, response, begin)
    },

    checked
  }
}

/**
 * When a connection closes, Node makes an error for each of its requests, and its stack trace costs more than all else
 * that the request did: for a thousand refused ones 25 ms of 30. Nobody ever sees these errors.
 */
function muteAborts (socket: Socket): void {
  let limit = Error.stackTraceLimit
  socket.prependListener('close', () => {
    limit = Error.stackTraceLimit
    Error.stackTraceLimit = 0
  })
  socket.on('close', () => { Error.stackTraceLimit = limit })
}

/** How many requests have arrived whole and are not answered. */
export function unfinished ({ unanswered, latest }: Pipeline): number {
  return latest?.complete === false ? unanswered - 1 : unanswered
}

/** True for a connection that waits for its next request. */
export function isIdle ({ hasAsked, unanswered, isClosing }: Pipeline): boolean {
  return hasAsked && unanswered === 0 && !isClosing
}

/** True for the request whose answer is the connection's last. */
export function isLast ({ isFull, latest, waiting }: Pipeline, request: IncomingMessage): boolean {
  return isFull && latest === request && waiting.length === 0
}

/** Begins nothing any more; calls `then` when all that has arrived whole is answered. */
export function endAfterAnswers (pipeline: Pipeline, then: () => void): void {
  pipeline.isClosing = true
  pipeline.waiting = []
  whenAnswered(pipeline, then)
}

function whenAnswered (pipeline: Pipeline, then: () => void): void {
  pipeline.whenAnswered = then
  if (unfinished(pipeline) === 0) then()
}
