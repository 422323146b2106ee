import type { Verdict } from '../identity/verdict.ts'

/** Mixpanel documents no Retry-After, but a backoff that starts at 2 s and ends at 60 s. */
const RETRY_AFTER_SECONDS = { least: 1, usual: 2, most: 60 }

/** The verdict where the status alone decides; undefined for 200 and 400, where the body does (and for 1xx). */
export function interpretStatus (status: number, retryAfter?: string | string[]): Verdict | undefined {
  const cause = `status ${status}`
  if (status === 200 || status === 400 || status < 200) return undefined
  if (status === 429) return { code: 'mixpanel_rate_limited', retryAfter: retryAfterSeconds(String(retryAfter)), cause }
  if (status === 401 || status === 403) return { code: 'mixpanel_rejected_credentials', cause }
  if (status === 408 || status >= 500) return { code: 'mixpanel_unreachable', cause, isTransient: true }
  return { code: 'mixpanel_misanswered', cause, isTransient: false }
}

/** The cause of a verdict that Mixpanel itself gave, in so many words, and not the way to it. */
export const TEMPORARY = 'temporary failure'

/**
 * Reads `1`, `0`, `{ error, status }` and the strict form `{ code, failed_records }`; anything else is no answer.
 * `mask` takes out of Mixpanel's words what nobody may see.
 */
export function interpretBody (status: number, text: string, mask: Mask = words => words): Verdict {
  const answer = parse(text)
  const { status: word, code, ...words } = Object(answer) as Record<string, unknown>
  const records = Array.isArray(words.failed_records) ? words.failed_records : []
  const reason = reasonOf(records, words.error, mask)
  // Seen live: a `0` that is Mixpanel's own passing fault, which only its words tell from a refusal.
  if (reason !== undefined && /temporary failure/i.test(reason)) {
    return { code: 'mixpanel_unreachable', cause: TEMPORARY, isTransient: true, isUndelivered: true }
  }
  const refused = status === 400 || reason !== undefined || answer === 0 || word === 0
  const imported = words.num_records_imported
  if (refused) return { code: 'refused_by_mixpanel', reason, records: reasonsByIndex(records, mask), imported }
  if (answer === 1 || word === 1 || (code === 200 && imported !== 0)) return { code: 'accepted' }
  return { code: 'mixpanel_misanswered', cause: 'neither 1 nor 0', isTransient: true }
}

/** The verdict where no whole answer came: `error` is what undici or the socket threw. */
export function interpretError ({ name, code = name }: NodeJS.ErrnoException): Verdict {
  if (/TIMEOUT|ETIMEDOUT/.test(code)) return { code: 'mixpanel_timed_out', cause: code, isTransient: true }
  // Bytes that are not HTTP, too many headers, too large a body: somebody else answers there.
  const foreign = /^(HPE_|HTTPParserError|UND_ERR_HEADERS_OVERFLOW|UND_ERR_RES_EXCEEDED_MAX_SIZE)/.test(code)
  return {
    code: foreign ? 'mixpanel_misanswered' : 'mixpanel_unreachable',
    cause: code,
    isTransient: true,
    // There was no connection yet.
    isUndelivered: /^(ECONNREFUSED|ENOTFOUND|EAI_AGAIN|UND_ERR_CONNECT_TIMEOUT)$/.test(code)
  }
}

type Mask = (words: string) => string

function parse (text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

/** Mixpanel's words, fit to be shown: on one line, at most 500 characters. */
function reasonOf (records: unknown[], error: unknown, mask: Mask): string | undefined {
  // In Simplified projects the records have been seen as strings.
  const messages = records.map(record => typeof record === 'string' ? record : Object(record).message)
  const words = messages.length > 0 ? messages.join('; ') : error
  if (typeof words !== 'string' || words === '') return undefined
  // Masked before it is cut: half a secret would be none to the mask.
  return mask(words).replace(/\p{Cc}+/gu, ' ').slice(0, 500)
}

/** The reasons by the records' index; undefined where Mixpanel did not say which records it means. */
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
  const { least, usual, most } = RETRY_AFTER_SECONDS
  const seconds = /^\d+$/.test(header) ? Number(header) : Math.ceil((Date.parse(header) - Date.now()) / 1000)
  return Number.isNaN(seconds) ? usual : Math.min(Math.max(seconds, least), most)
}
