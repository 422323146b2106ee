import type { FastifyReply } from 'fastify'
import { PROBLEMS, type ProblemCode } from '../problem.ts'
import type { AnswerHead, AnswerProblem } from '../plugins/problems.ts'
import { isSdkPath } from '../sdk-paths.ts'
import { queryOf, readForm, type Parameters } from './form.ts'

declare module 'fastify' {
  interface FastifyRequest {
    /** What the request of an SDK asks for. Until its body is read only the query tells. */
    parameters: Parameters | undefined
  }
}

const PIXEL = Buffer.from('R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7', 'base64')

/** How long an SDK waits after a 503 that says nothing better, in seconds. */
const RETRY_AFTER = 10

/** A body of up to this length is read to its end before an error. What it asks for may stand in its last bytes. */
const MAX_DISCARDED_BYTES = 1_048_576
const TAIL_BYTES = 64

/**
 * Sends an answer in the form that the SDK reads: a pixel, JSON, or one digit. `error` is null for a success. An SDK
 * reads the words of a success too.
 */
export function sendAnswer (
  reply: FastifyReply, status: number, isTaken: boolean, error: string | null
): FastifyReply {
  const { parameters = readForm(queryOf(reply.request.raw.url as string)) } = reply.request
  if (status === 503 && !reply.hasHeader('retry-after')) reply.header('retry-after', RETRY_AFTER)
  // A GET would else be stored, and its repeat would not arrive.
  reply.code(status).header('cache-control', 'no-store')
  if (parameters.img === '1') return reply.header('content-type', 'image/gif').send(PIXEL)
  const { type, body } = bodyOf(parameters, isTaken, error)
  // Fastify adds a charset to a string.
  return reply.header('content-type', type).send(Buffer.from(body))
}

function bodyOf ({ verbose }: Parameters, isTaken: boolean, error: string | null): { type: string, body: string } {
  const digit = isTaken ? 1 : 0
  return verbose === '1'
    ? { type: 'application/json', body: JSON.stringify({ error, status: digit }) }
    : { type: 'text/plain', body: String(digit) }
}

/** The statuses that an SDK understands. Others are 503: Mixpanel is out of reach. */
const STATUSES: Partial<Record<ProblemCode, number>> = {
  // What cannot be read would not be read on a repeat either.
  invalid_request: 200,
  unsupported_media_type: 200,
  unauthenticated: 401,
  forbidden: 403,
  not_found: 404,
  method_not_allowed: 405,
  body_too_large: 413,
  too_many_requests: 429,
  internal: 500
}

/** Returns the status of a problem for an SDK. */
export const statusOf = (code: ProblemCode): number => STATUSES[code] ?? 503

/**
 * Sends a problem as an SDK reads it. The form of the answer may stand at the end of the body, so a short body is read
 * first. That also keeps the connection from a reset, after which the JavaScript SDK drops its events.
 */
export const answerProblem: AnswerProblem = (reply, code, { detail, errors = [], status = statusOf(code) }) => {
  const [first] = errors
  const text = detail ?? (first && `${first.pointer} ${first.detail}`.trim()) ?? PROBLEMS[code].detail
  const send = () => sendAnswer(reply, status, false, text)
  const { raw, parameters, headers } = reply.request
  const isUnread = parameters === undefined && raw.readableFlowing === null && reply.request.method === 'POST'
  if (!isUnread || Number(headers['content-length'] ?? 0) > MAX_DISCARDED_BYTES) return send()
  let tail = ''
  let length = 0
  raw.on('data', take).on('end', finish).on('error', finish)
  return reply

  function take (chunk: Buffer): void {
    length += chunk.length
    tail = (tail + chunk.toString('latin1', Math.max(0, chunk.length - TAIL_BYTES))).slice(-TAIL_BYTES)
    if (length > MAX_DISCARDED_BYTES) finish()
  }

  function finish (): void {
    raw.off('data', take).off('end', finish).off('error', finish)
    // Otherwise Node would buffer the rest of a body that is not read.
    raw.resume()
    reply.request.parameters = withQuery(reply, readForm(Buffer.from(tail.replace(/^[^&]*&?/, ''), 'latin1')))
    send()
  }
}

/** Returns the parameters of a body with those of the query, which win. */
export const withQuery = (reply: FastifyReply, body: Parameters): Parameters =>
  ({ ...body, ...readForm(queryOf(reply.request.raw.url as string)) })

/** Returns the answer to a request of an SDK that could not be read. Pages of `origins` can read it. */
export const createAnswerHead = (origins: string[]): AnswerHead => ({ url, origin }, detail) => {
  if (!isSdkPath(url.split('?')[0] as string)) return undefined
  const { type, body } = bodyOf(readForm(queryOf(url)), false, detail)
  const cors: Record<string, string> = origin !== undefined && origins.includes(origin)
    ? { 'access-control-allow-origin': origin, 'access-control-allow-credentials': 'true', vary: 'Origin' }
    : {}
  return { body, headers: { ...cors, 'cache-control': 'no-store', 'content-type': type } }
}
