import { STATUS_CODES, type IncomingMessage } from 'node:http'
import type { Socket } from 'node:net'
import { randomUUID } from 'node:crypto'
import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import type { Logger } from 'pino'
import { BodyError } from '../body.ts'
import type { Metrics } from '../../metrics.ts'
import type { Connections } from '../connections.ts'
import { SECURITY_HEADERS } from './security-headers.ts'
import { type ProblemOptions, problemBody, type ProblemCode, PROBLEMS } from '../problem.ts'

declare module 'fastify' {
  interface FastifyReply {
    /** Sends a problem (RFC 9457). `retryAfter` is in seconds. */
    problem: (code: ProblemCode, extras?: ProblemOptions) => FastifyReply
    /** Logs an error that is a bug of the relay. */
    logUnhandledError: (error: Error) => void
  }
  interface FastifyContextConfig {
    /**
     * Set for a route that Mixpanel's SDKs call: its errors have the form that they read, a GET has effects, and a body
     * may be gzipped.
     */
    sdk?: { answerProblem: AnswerProblem }
  }
}

/** Sends a problem in another form. */
export type AnswerProblem = (reply: FastifyReply, code: ProblemCode, extras: ProblemOptions) => FastifyReply

/** The start of a request that could not be read: its target, and the page that sent it. */
export interface RequestHead { url: string, origin: string | undefined }

/** Returns the body and the headers for such a request; undefined if a problem is the right answer. */
export type AnswerHead = (head: RequestHead, detail: string) => HeadAnswer | undefined
interface HeadAnswer { body: string, headers: Record<string, string> }

/** Returns the part of a pointer that the log may have: other names are the caller's, and might be a secret. */
function knownPart (pointer: string): string {
  return /^\/(?:identified_id|anon_id|distinct_id|properties|identities)(?=\/|$)/.exec(pointer)?.[0] ?? ''
}

/** Adds `problem` to replies, and turns every error around a handler into a problem. Unexpected errors are logged. */
export const problems = fp<{ logger: Logger }>(async (app, { logger }) => {
  app.decorateReply('problem', function (code, extras = {}) {
    const pointers = extras.errors && [...new Set(extras.errors.map(({ pointer }) => knownPart(pointer)))]
    this.logLine.details = { ...this.logLine.details, code, ...pointers && { pointers } }
    if (extras.retryAfter !== undefined) this.header('retry-after', extras.retryAfter)
    const { sdk } = this.request.route.config
    return sdk === undefined ? send(this, code, extras) : sdk.answerProblem(this, code, extras)
  })
  app.decorateReply('logUnhandledError', function (error) {
    logger.error({ err: error, request_id: this.request.id }, 'unhandled error')
  })
  app.setErrorHandler<FastifyError>((error, request, reply) => {
    if (error instanceof BodyError) {
      const { problem, message } = error
      return reply.problem(problem, {
        ...problem === 'overloaded' && { retryAfter: 1 },
        ...problem === 'invalid_request' && { errors: [{ pointer: '', detail: message }] }
      })
    }
    switch (error.statusCode) {
      case 400: return reply.problem('invalid_request', { errors: [{ pointer: '', detail: error.message }] })
      case 415: return reply.problem('unsupported_media_type')
      case 429: return reply.problem('too_many_requests')
      default:
        reply.logUnhandledError(error)
        return reply.problem('internal')
    }
  })
})

function send (reply: FastifyReply, code: ProblemCode, extras: ProblemOptions) {
  return reply.code(extras.status ?? PROBLEMS[code].status).header('content-type', 'application/problem+json')
    // Fastify adds a charset to a string, and JSON media types have none.
    .send(Buffer.from(JSON.stringify(problemBody(code, reply.request.id, extras))))
}

/** Returns the handler for a URL that Fastify cannot route. No hook runs, and its reply has no `problem`. */
export const handleFrameworkError = (logger: Logger, metrics: Metrics) =>
  (_: FastifyError, { method, id }: FastifyRequest, reply: FastifyReply) => {
    const errors = [{ pointer: '', detail: 'must have a valid URL' }]
    metrics.request(method, undefined, 400, 0)
    logger.info({ method, status: 400, code: 'invalid_request', request_id: id }, 'request completed')
    const headers = { ...SECURITY_HEADERS, 'x-request-id': id, 'cache-control': 'no-store' }
    return send(reply.headers(headers), 'invalid_request', { errors })
  }

/** Returns the handler for bytes that are not a request, or too slow. It sends a problem and closes the connection. */
export const handleClientError = (
  logger: Logger, { refuseBytes }: Connections, metrics: Metrics, answerHead: AnswerHead = () => undefined
) => (error: ClientError, socket: Socket): void => {
  if (error.code === 'ECONNRESET') socket.destroy()
  else refuseBytes(socket, request => clientErrorAnswer(logger, error, metrics, answerHead, headOf(request, error)))
}

type ClientError = NodeJS.ErrnoException & { rawPacket?: unknown }

/** Returns the start of the request whose body was too slow, or of the bytes that are no request. */
function headOf (request: IncomingMessage | undefined, { rawPacket }: ClientError): RequestHead | undefined {
  if (request !== undefined) return { url: String(request.url), origin: request.headers.origin }
  const text = Buffer.isBuffer(rawPacket) ? rawPacket.toString('latin1') : ''
  const url = /^[A-Z]+ (\/\S*)/.exec(text)?.[1]
  return url === undefined ? undefined : { url, origin: /\r\norigin: *([^\r\n]+)/i.exec(text)?.[1] }
}

function clientErrorAnswer (
  logger: Logger, { code: cause }: ClientError, metrics: Metrics, answerHead: AnswerHead, head: RequestHead | undefined
): string {
  const status = { ERR_HTTP_REQUEST_TIMEOUT: 408, HPE_HEADER_OVERFLOW: 431 }[String(cause)] ?? 400
  const title = STATUS_CODES[status]
  const id = randomUUID()
  const detail = `The request could not be read: ${title}.`
  const { body, headers: own } = (head && answerHead(head, detail)) ?? {
    body: JSON.stringify(problemBody('invalid_request', id, { detail, errors: [{ pointer: '', detail }], status })),
    headers: { 'content-type': 'application/problem+json' }
  }
  metrics.request('none', undefined, status, 0)
  logger.info({ status, code: 'invalid_request', cause, request_id: id }, 'request completed')
  const headers = {
    ...SECURITY_HEADERS,
    connection: 'close',
    'x-request-id': id,
    ...own,
    'content-length': Buffer.byteLength(body)
  }
  const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`)
  return `HTTP/1.1 ${status} ${title}\r\n${lines.join('')}\r\n${body}`
}
