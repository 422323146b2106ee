import { STATUS_CODES } from 'node:http'
import { Type } from '@sinclair/typebox'
import type { FieldError } from '../identity/identity.ts'

/** Every problem code: its HTTP status, whether the same request may succeed later, and its sentence for people. */
export const PROBLEMS = {
  invalid_request: { status: 400, retryable: false, detail: 'The request breaks a rule; `errors` names each field.' },
  unauthenticated: { status: 401, retryable: false, detail: 'The credentials are missing or wrong.' },
  forbidden: { status: 403, retryable: false, detail: 'CORS_ORIGINS does not list this origin.' },
  not_found: { status: 404, retryable: false, detail: 'No route has this path.' },
  method_not_allowed: { status: 405, retryable: false, detail: 'This path does not support the method; see Allow.' },
  suspicious_identity: {
    status: 409, retryable: false, detail: 'The merge guard refused the identity; nothing was sent.'
  },
  body_too_large: { status: 413, retryable: false, detail: 'The body is larger than this path accepts.' },
  unsupported_media_type: {
    status: 415, retryable: false, detail: 'Send JSON, as application/json or text/plain, without a content encoding.'
  },
  refused_by_mixpanel: { status: 422, retryable: false, detail: 'Mixpanel refused the event without a reason.' },
  too_many_requests: { status: 429, retryable: true, detail: 'This caller reached its rate limit; see Retry-After.' },
  internal: { status: 500, retryable: false, detail: 'The relay failed; its log has the request id.' },
  mixpanel_unreachable: { status: 502, retryable: true, detail: 'Mixpanel was unreachable or failed.' },
  mixpanel_misanswered: { status: 502, retryable: true, detail: 'The response was not one that Mixpanel gives.' },
  mixpanel_rejected_credentials: {
    status: 502, retryable: false, detail: 'Mixpanel rejected the credentials of the relay; its operator must fix them.'
  },
  mixpanel_rate_limited: { status: 503, retryable: true, detail: 'Mixpanel limits this project; see Retry-After.' },
  mixpanel_unavailable: {
    status: 503, retryable: true, detail: 'Mixpanel keeps failing, so nothing was sent; see Retry-After.'
  },
  overloaded: { status: 503, retryable: true, detail: 'The relay is at its limit; see Retry-After.' },
  draining: { status: 503, retryable: true, detail: 'This instance is shutting down; send the request again.' },
  mixpanel_timed_out: {
    status: 504, retryable: true, detail: 'Mixpanel did not answer in time. The outcome is unknown; repeating is safe.'
  }
} as const

export type ProblemCode = keyof typeof PROBLEMS

/** What a response adds to its code. `retryAfter` is in seconds and becomes a header. */
export interface ProblemOptions {
  detail?: string | undefined
  errors?: FieldError[]
  retryAfter?: number
  /** For a code that has several statuses. */
  status?: number
}

/** The most fields that one response lists in `errors`. */
export const MAX_ERRORS = 100

/** Returns the body of an error response, with one entry in `errors` for each pointer. */
export function problemBody (code: ProblemCode, requestId: string, options: ProblemOptions = {}) {
  const { detail, errors } = options
  const { retryable, detail: defaultDetail } = PROBLEMS[code]
  const status = options.status ?? PROBLEMS[code].status
  return {
    type: `urn:identify-relay:${code}`,
    title: String(STATUS_CODES[status]),
    status,
    detail: detail ?? defaultDetail,
    code,
    retryable,
    request_id: requestId,
    ...errors && { errors: byPointer(errors).slice(0, MAX_ERRORS) }
  }
}

const FieldErrorSchema = Type.Object({
  pointer: Type.String({ description: 'A JSON Pointer into the body; empty for the request as a whole.' }),
  detail: Type.String({ description: 'The broken rule, for people.' })
}, { title: 'FieldError', description: 'One broken field of a request.' })

/** The shape of every error response. */
export const Problem = Type.Object({
  type: Type.String({ description: 'A URN made of the code.' }),
  title: Type.String({ description: 'The standard phrase of the status.' }),
  status: Type.Integer({ description: 'The HTTP status.' }),
  detail: Type.String({ description: 'What happened, for people. The text may change.' }),
  code: Type.String({ enum: Object.keys(PROBLEMS), description: 'What happened, for programs. It does not change.' }),
  retryable: Type.Boolean({ description: 'True when the same request may succeed later.' }),
  request_id: Type.String({ description: 'Equal to the `x-request-id` header and to `request_id` in the log.' }),
  errors: Type.Optional(Type.Array(FieldErrorSchema, {
    description: `The broken fields, at most ${MAX_ERRORS}; only with \`invalid_request\`.`
  }))
}, { title: 'Problem', description: 'An error (RFC 9457). Programs decide by `code`.' })

/** Statuses of invalid_request for a request that came too slowly, or with too many headers. */
const UNREADABLE: number[] = [408, 431]

/** Returns the error responses of a route for the OpenAPI document, with an example for each code. */
export function problemResponses (only?: number[]) {
  const codes = Object.keys(PROBLEMS) as ProblemCode[]
  const statuses = new Set(only ?? [...codes.map(code => PROBLEMS[code].status), ...UNREADABLE])
  return Object.fromEntries(Array.from(statuses, status => {
    const here = codes.filter(code => (UNREADABLE.includes(status) ? 400 : status) === PROBLEMS[code].status)
    const options = status === 400 ? { errors: [{ pointer: '/anon_id', detail: 'is required' }] } : {}
    const examples = Object.fromEntries(here.map(code =>
      [code, { value: problemBody(code, 'req-1', { ...options, status }) }]))
    const content = { 'application/problem+json': { schema: Problem, examples } }
    const hasRetryAfter = status === 429 || status === 503
    const headers = hasRetryAfter && { headers: { 'retry-after': { type: 'integer', description: 'In seconds.' } } }
    return [status, { description: `One of: ${here.join(', ')}.`, ...headers, content }]
  }))
}

/** Joins the errors of each pointer, in the order given. */
function byPointer (errors: FieldError[]): FieldError[] {
  const details = new Map<string, string>()
  for (const { pointer, detail } of errors) {
    details.set(pointer, details.has(pointer) ? `${details.get(pointer)}; ${detail}` : detail)
  }
  return Array.from(details, ([pointer, detail]) => ({ pointer, detail }))
}
