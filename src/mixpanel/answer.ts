import type { Verdict } from '../identity/verdict.ts'

/** Mixpanel documents no Retry-After, but a backoff from 2 s to 60 s. */
const RETRY_AFTER_SECONDS = { min: 1, fallback: 2, max: 60 }

/** Returns the verdict if the status alone decides; undefined for 1xx, and for 200 and 400, whose body decides. */
export function interpretStatus (status: number, retryAfter?: string | string[]): Verdict | undefined {
  const cause = `status ${status}`
  if (status === 200 || status === 400 || status < 200) return undefined
  if (status === 429) return { code: 'mixpanel_rate_limited', retryAfter: retryAfterSeconds(String(retryAfter)), cause }
  if (status === 401 || status === 403) return { code: 'mixpanel_rejected_credentials', cause }
  if (status === 408 || status >= 500) return { code: 'mixpanel_unreachable', cause, isTransient: true }
  return { code: 'mixpanel_misanswered', cause, isTransient: false }
}

/** The cause of a verdict when Mixpanel's own answer reports a temporary failure. */
export const TEMPORARY = 'temporary failure'

/**
 * Returns the verdict of a 200 or a 400. Reads `1`, `0`, `{ error, status }` and the strict form
 * `{ code, failed_records }`; any other 200 is `mixpanel_misanswered`. `mask` hides secrets in the reasons.
 */
export function interpretBody (status: number, text: string, mask: Mask = reason => reason): Verdict {
  const answer = parse(text)
  const { status: result, code, ...fields } = Object(answer) as Record<string, unknown>
  const records = Array.isArray(fields.failed_records) ? fields.failed_records : []
  const reason = reasonOf(records, fields.error, mask)
  // Seen live: a `0` for a temporary failure of Mixpanel. Only the reason tells it from a refusal.
  if (reason !== undefined && /temporary failure/i.test(reason)) {
    return { code: 'mixpanel_unreachable', cause: TEMPORARY, isTransient: true, isUndelivered: true }
  }
  const isRefused = status === 400 || reason !== undefined || answer === 0 || result === 0
  const imported = fields.num_records_imported
  if (isRefused) return { code: 'refused_by_mixpanel', reason, records: reasonsByIndex(records, mask), imported }
  if (answer === 1 || result === 1 || (code === 200 && imported !== 0)) return { code: 'accepted' }
  return { code: 'mixpanel_misanswered', cause: 'neither 1 nor 0', isTransient: true }
}

/** Returns the verdict when no complete answer came, by the error of undici or of the socket. */
export function interpretError ({ name, code = name }: NodeJS.ErrnoException): Verdict {
  if (/TIMEOUT|ETIMEDOUT/.test(code)) return { code: 'mixpanel_timed_out', cause: code, isTransient: true }
  // Bytes that are not HTTP, too many headers or too large a body come from another server.
  const isForeign = /^(HPE_|HTTPParserError|UND_ERR_HEADERS_OVERFLOW|UND_ERR_RES_EXCEEDED_MAX_SIZE)/.test(code)
  return {
    code: isForeign ? 'mixpanel_misanswered' : 'mixpanel_unreachable',
    cause: code,
    isTransient: true,
    // These errors come before the connection is made.
    isUndelivered: /^(ECONNREFUSED|ENOTFOUND|EAI_AGAIN|UND_ERR_CONNECT_TIMEOUT)$/.test(code)
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

function retryAfterSeconds (header: string): number {
  const { min, fallback, max } = RETRY_AFTER_SECONDS
  const seconds = /^\d+$/.test(header) ? Number(header) : Math.ceil((Date.parse(header) - Date.now()) / 1000)
  return Number.isNaN(seconds) ? fallback : Math.min(Math.max(seconds, min), max)
}
