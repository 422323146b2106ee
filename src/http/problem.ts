import { STATUS_CODES } from 'node:http'
import { Type } from '@sinclair/typebox'
import type { FieldError } from '../identity/identity.ts'

/** The one table of what can go wrong: its HTTP status, whether a repeat may succeed, and a sentence for people. */
export const PROBLEMS = {
  invalid_request: { status: 400, retryable: false, detail: 'A rule is broken; errors names each broken field.' },
  forbidden: { status: 403, retryable: false, detail: 'This origin may not identify anyone here.' },
  not_found: { status: 404, retryable: false, detail: 'There is nothing at this path.' },
  method_not_allowed: { status: 405, retryable: false, detail: 'This path does not take this method; see Allow.' },
  body_too_large: { status: 413, retryable: false, detail: 'The body is larger than this path takes.' },
  unsupported_media_type: {
    status: 415, retryable: false, detail: 'Send JSON, as application/json or text/plain, without a content encoding.'
  },
  refused_by_mixpanel: { status: 422, retryable: false, detail: 'Mixpanel refused the identity and gave no reason.' },
  too_many_requests: { status: 429, retryable: true, detail: 'You have reached your limit; see Retry-After.' },
  internal: { status: 500, retryable: false, detail: 'The relay failed; its log knows the request id.' },
  mixpanel_unreachable: { status: 502, retryable: true, detail: 'Mixpanel could not be reached, or failed.' },
  mixpanel_misanswered: { status: 502, retryable: true, detail: 'What answered did not answer as Mixpanel does.' },
  mixpanel_rejected_credentials: {
    status: 502, retryable: false, detail: 'Mixpanel rejected the credentials of this relay: its operator must act.'
  },
  mixpanel_rate_limited: { status: 503, retryable: true, detail: 'Mixpanel takes no more for now; see Retry-After.' },
  mixpanel_unavailable: {
    status: 503, retryable: true, detail: 'Mixpanel keeps failing and was not asked; see Retry-After.'
  },
  overloaded: { status: 503, retryable: true, detail: 'Too much is under way here already; see Retry-After.' },
  draining: { status: 503, retryable: true, detail: 'This instance is shutting down; another will take the request.' },
  mixpanel_timed_out: {
    status: 504, retryable: true, detail: 'Mixpanel did not answer in time. The outcome is unknown; a repeat is safe.'
  }
} as const

export type ProblemCode = keyof typeof PROBLEMS

/** What one answer may add to its code: `retryAfter` is in seconds and becomes a header. */
export interface ProblemOptions {
  detail?: string | undefined
  errors?: FieldError[]
  retryAfter?: number
  /** Where one code has several statuses. */
  status?: number
}

/** How many broken fields one answer lists. */
export const MAX_ERRORS = 100

/** The body of every error answer. */
export function problemBody (code: ProblemCode, requestId: string, { detail, errors, ...extras }: ProblemOptions = {}) {
  const { retryable, detail: usual } = PROBLEMS[code]
  const status = extras.status ?? PROBLEMS[code].status
  return {
    type: `urn:identify-relay:${code}`,
    title: STATUS_CODES[status],
    status,
    detail: detail ?? usual,
    code,
    retryable,
    request_id: requestId,
    ...errors && { errors: byPointer(errors).slice(0, MAX_ERRORS) }
  }
}

/** The shape of every error answer, for the OpenAPI document. */
export const Problem = Type.Object({
  type: Type.String(),
  title: Type.String(),
  status: Type.Integer(),
  detail: Type.String(),
  code: Type.String({ enum: Object.keys(PROBLEMS) }),
  retryable: Type.Boolean(),
  request_id: Type.String(),
  errors: Type.Optional(Type.Array(Type.Object({ pointer: Type.String(), detail: Type.String() })))
}, { $id: 'Problem', description: 'RFC 9457. Decide by `code`; `retryable`: the same request may succeed later.' })

/** Statuses of invalid_request for a request that came too slowly, or whose head is too large. */
const UNREADABLE: number[] = [408, 431]

/** The answers for the OpenAPI document: every status in the table, with an example for each of its codes. */
export function problemResponses () {
  const codes = Object.keys(PROBLEMS) as ProblemCode[]
  const statuses = new Set([...codes.map(code => PROBLEMS[code].status), ...UNREADABLE])
  return Object.fromEntries(Array.from(statuses, status => {
    const here = codes.filter(code => (UNREADABLE.includes(status) ? 400 : status) === PROBLEMS[code].status)
    const extras = status === 400 ? { errors: [{ pointer: '/anon_id', detail: 'is required' }] } : {}
    const examples = Object.fromEntries(here.map(code =>
      [code, { value: problemBody(code, 'req-1', { ...extras, status }) }]))
    const content = { 'application/problem+json': { schema: Type.Ref('Problem'), examples } }
    const isLater = status === 429 || status === 503
    const headers = isLater && { headers: { 'retry-after': { type: 'integer', description: 'seconds' } } }
    return [status, { description: here.join(', '), ...headers, content }]
  }))
}

/** One error for each pointer, in the order given. */
function byPointer (errors: FieldError[]): FieldError[] {
  const details = new Map<string, string>()
  for (const { pointer, detail } of errors) {
    details.set(pointer, details.has(pointer) ? `${details.get(pointer)}; ${detail}` : detail)
  }
  return Array.from(details, ([pointer, detail]) => ({ pointer, detail }))
}
