import { TunnelError } from '../proxy.ts'
import type { Failure, Taken, Verdict } from '../identity/verdict.ts'

/**
 * The answer to one request, which speaks of all its events.
 * - `taken` of `refused_by_mixpanel` holds for a lone event; an array may have been taken in part.
 * - `isTransient`: Mixpanel, or the path to it, failed. The request is retried, and the breaker counts it.
 * - `isForAll`: a refusal that holds for each event, because the project has another mode.
 * - `holdMs`: how long Mixpanel asks not to be sent anything.
 * - `records`: the reasons of refused events by index, if Mixpanel listed them. `imported`: how many events it took.
 */
export interface Answer {
  code: 'accepted' | Failure
  taken: Taken
  isTransient?: boolean
  cause?: string
  reason?: string
  retryAfter?: number
  holdMs?: number
  isForAll?: boolean
  records?: Map<number, string>
  imported?: unknown
}

/** Mixpanel documents no Retry-After, but a backoff from 2 s to 60 s. */
const RETRY_AFTER_SECONDS = { min: 1, fallback: 2, max: 60 }

/** Returns the answer if the status alone decides; undefined for 1xx, and for 200 and 400, whose body decides. */
export function interpretStatus (status: number, retryAfter?: string | string[]): Answer | undefined {
  const cause = `status ${status}`
  if (status === 200 || status === 400 || status < 200) return undefined
  if (status === 429) {
    const advised = retryAfterSeconds(String(retryAfter))
    const seconds = advised ?? RETRY_AFTER_SECONDS.fallback
    const holdMs = advised === undefined ? {} : { holdMs: advised * 1000 }
    return { code: 'mixpanel_rate_limited', taken: 'no', retryAfter: seconds, ...holdMs, cause }
  }
  if (status === 401 || status === 403) return { code: 'mixpanel_rejected_credentials', taken: 'no', cause }
  // A gateway may answer after Mixpanel took the request.
  if (status === 408 || status >= 500) {
    return { code: 'mixpanel_unreachable', taken: 'unknown', cause, isTransient: true }
  }
  return { code: 'mixpanel_misanswered', taken: 'unknown', cause }
}

/** Seen live from /import: one $identify refuses its whole array in projects with Simplified ID Merge. */
const OTHER_MODE = /simplified identity management/i
const OTHER_MODE_HINT = 'set MIXPANEL_ID_MERGE=simplified on the relay'

/** The cause when Mixpanel's own answer reports a temporary failure. */
export const TEMPORARY = 'temporary failure'

/**
 * Returns the answer of a 200 or a 400. Reads `1`, `0`, `{ error, status }` and the strict form
 * `{ code, failed_records }`; any other 200 is `mixpanel_misanswered`. `mask` hides secrets in the reasons.
 */
export function interpretBody (status: number, text: string, mask: Mask = reason => reason): Answer {
  const answer = parse(text)
  const { status: result, code, error, ...fields } = Object(answer) as Record<string, unknown>
  const list = Array.isArray(fields.failed_records) ? fields.failed_records : []
  const reason = reasonOf(list, error, mask)
  // Seen live: a `0` for a temporary failure of Mixpanel. Only the reason tells it from a refusal.
  if (reason !== undefined && /temporary failure/i.test(reason)) {
    return { code: 'mixpanel_unreachable', taken: 'no', cause: TEMPORARY, isTransient: true }
  }
  if (reason !== undefined && OTHER_MODE.test(reason)) {
    return { code: 'refused_by_mixpanel', taken: 'no', reason: `${reason}; ${OTHER_MODE_HINT}`, isForAll: true }
  }
  const hasError = list.length > 0 || (error !== undefined && error !== null && error !== '')
  const imported = fields.num_records_imported
  if (status === 400 || hasError || answer === 0 || result === 0) {
    const records = reasonsByIndex(list, mask)
    const details = { ...reason !== undefined && { reason }, ...records && { records } }
    return { code: 'refused_by_mixpanel', taken: 'no', imported, ...details }
  }
  if (answer === 1 || result === 1 || code === 200) return { code: 'accepted', taken: 'yes', imported }
  return { code: 'mixpanel_misanswered', taken: 'unknown', cause: 'neither 1 nor 0', isTransient: true }
}

/** Returns the answer when none came in full, by the error of undici or of the socket. */
export function interpretError (error: NodeJS.ErrnoException): Answer {
  const { name, code = name } = error
  // These errors come before the connection is made.
  const isTunnel = error instanceof TunnelError
  const isUnsent = isTunnel || /^(ECONNREFUSED|ENOTFOUND|EAI_AGAIN|UND_ERR_CONNECT_TIMEOUT)$/.test(code)
  // Bytes that are not HTTP, too many headers or too large a body come from another server.
  const isForeign = !isTunnel && /^(HPE_|HTTPParserError|UND_ERR_HEADERS_OVERFLOW|UND_ERR_RES_EXCEEDED_MAX_SIZE)/.test(code)
  const failure = isForeign ? 'mixpanel_misanswered' : 'mixpanel_unreachable'
  return {
    code: /TIMEOUT|ETIMEDOUT/.test(code) ? 'mixpanel_timed_out' : failure,
    taken: isUnsent ? 'no' : 'unknown',
    cause: isTunnel ? error.message : code,
    isTransient: true
  }
}

/** Returns true if Mixpanel reports another number of events than the request had. */
export function isPartial ({ code, imported }: Answer, count: number): boolean {
  return code === 'accepted' && imported !== undefined && imported !== count
}

/**
 * Returns the verdict of one event, by the last answer about it and by `doubt`, an earlier one after which Mixpanel may
 * have the event. Then only a success makes the outcome known. The refusal of an array is a weaker doubt: the refusal
 * of the event alone settles it, because Mixpanel would have refused it in the array too.
 */
export function settle (answer: Answer, doubt?: Answer): Verdict {
  const isSettled = answer.taken !== 'no' || doubt === undefined ||
    (doubt.code === 'refused_by_mixpanel' && answer.code === 'refused_by_mixpanel')
  if (isSettled) return toVerdict(answer)
  if (doubt.code !== 'refused_by_mixpanel') return toVerdict(doubt)
  const code = answer.code === 'mixpanel_timed_out' ? answer.code : 'mixpanel_unreachable'
  return { code, taken: 'unknown', cause: `${answer.cause ?? answer.code} after a refused array` }
}

function toVerdict ({ code, taken, cause, reason, retryAfter }: Answer): Verdict {
  return {
    code,
    taken,
    ...cause !== undefined && { cause },
    ...reason !== undefined && { reason },
    ...retryAfter !== undefined && { retryAfter }
  }
}

type Mask = (text: string) => string

function parse (text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

/** Returns Mixpanel's reason, masked, in one line of at most 500 characters; undefined if there is none. */
function reasonOf (records: unknown[], error: unknown, mask: Mask): string | undefined {
  // Projects with Simplified ID Merge have been seen to send strings as records.
  const messages = records.map(record => typeof record === 'string' ? record : Object(record).message)
  const text = messages.length > 0 ? messages.join('; ') : error
  if (typeof text !== 'string' || text === '') return undefined
  // Mask before the cut, because the mask would miss half a secret.
  return mask(text).replace(/\p{Cc}+/gu, ' ').slice(0, 500)
}

/** Returns the reasons by record index; undefined if Mixpanel did not give the index of each. */
function reasonsByIndex (records: unknown[], mask: Mask): Map<number, string> | undefined {
  const reasons = new Map<number, string>()
  for (const record of records) {
    const { index } = Object(record)
    if (!Number.isInteger(index)) return undefined
    const reason = reasonOf([record], undefined, mask)
    reasons.set(index, reasons.has(index) ? `${reasons.get(index)}; ${reason}` : String(reason))
  }
  return records.length > 0 ? reasons : undefined
}

/** Returns the whole seconds of a `Retry-After` header, within bounds; undefined if it has none. */
function retryAfterSeconds (header: string): number | undefined {
  const { min, max } = RETRY_AFTER_SECONDS
  const seconds = /^\d+$/.test(header) ? Number(header) : Math.ceil((Date.parse(header) - Date.now()) / 1000)
  return Number.isNaN(seconds) ? undefined : Math.min(Math.max(seconds, min), max)
}
