import { STATUS_CODES } from 'node:http'
import type { Socket } from 'node:net'
import { randomUUID } from 'node:crypto'
import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import { type Extras, problemBody, type ProblemCode, PROBLEMS } from '../problem.ts'

declare module 'fastify' {
  interface FastifyReply {
    /** Answers with a problem (RFC 9457); `retryAfter` is in seconds. */
    problem: (code: ProblemCode, extras?: Extras) => FastifyReply
  }
}

/** Gives replies `problem`, and turns every error of Fastify, its plugins or ours into one. */
export const problems = fp(async app => {
  app.decorateReply('problem', function (code, extras = {}) {
    this.outcome.code = code
    if (extras.retryAfter !== undefined) this.header('retry-after', extras.retryAfter)
    return send(this, code, extras)
  })
  app.setErrorHandler(answerError)
})

function send (reply: FastifyReply, code: ProblemCode, extras: Extras) {
  return reply.code(PROBLEMS[code].status).header('content-type', 'application/problem+json')
    // As a string it would be given a charset, which JSON media types do not have.
    .send(Buffer.from(JSON.stringify(problemBody(code, reply.request.id, extras))))
}

/** For a URL that Fastify cannot even route: no hook of ours has seen the request. */
export function answerBadUrl (_error: FastifyError, request: FastifyRequest, reply: FastifyReply) {
  const errors = [{ pointer: '', detail: 'must have a valid URL' }]
  return send(reply.header('x-request-id', request.id), 'invalid_request', { errors })
}

/** For the errors that Fastify meets around a handler. What is nobody's fault but ours is logged. */
function answerError (error: FastifyError, request: FastifyRequest, reply: FastifyReply) {
  switch (error.statusCode) {
    case 400: return reply.problem('invalid_request', { errors: [{ pointer: '', detail: error.message }] })
    case 413: return reply.problem('body_too_large')
    case 415: return reply.problem('unsupported_media_type')
    case 429: return reply.problem('too_many_requests')
    default:
      request.log.error({ err: error, request_id: request.id }, 'bug')
      return reply.problem('internal')
  }
}

/** For bytes that Node could not read as a request, or that came too slowly: answers, then closes the connection. */
export function answerClientError (error: NodeJS.ErrnoException, socket: Socket) {
  if (error.code === 'ECONNRESET' || !socket.writable) return socket.destroy()
  const status = { ERR_HTTP_REQUEST_TIMEOUT: 408, HPE_HEADER_OVERFLOW: 431 }[String(error.code)] ?? 400
  const title = STATUS_CODES[status]
  const id = randomUUID()
  const detail = `The request could not be read: ${title}.`
  const problem = problemBody('invalid_request', id, { detail, errors: [{ pointer: '', detail }] })
  const body = JSON.stringify({ ...problem, title, status })
  return socket.end(`HTTP/1.1 ${status} ${title}\r\nconnection: close\r\nx-request-id: ${id}\r\n` +
    `content-type: application/problem+json\r\ncontent-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`)
}
