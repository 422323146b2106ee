/**
 * What became of an identity. `cause` is for the log (a status or an error code, never a secret); `again` says that
 * the same bytes sent once more may help right away; `retryAfter` is in seconds.
 */
export type Verdict =
  | { code: 'accepted' }
  | { code: 'refused_by_mixpanel', reason: string | undefined }
  | { code: 'mixpanel_unreachable' | 'mixpanel_misanswered' | 'mixpanel_timed_out', cause: string, again: boolean }
  | { code: 'mixpanel_rejected_credentials', cause: string }
  | { code: 'mixpanel_rate_limited', cause: string, retryAfter: number }
  | { code: 'overloaded' | 'draining', retryAfter: number }

/** Mixpanel documents no Retry-After, but a backoff that starts at 2 s and ends at 60 s. */
const RETRY_AFTER_SECONDS = { least: 1, usual: 2, most: 60 }

/** The verdict where the status alone decides; undefined for 200 and 400, where the body does. */
export function interpretStatus (status: number, retryAfter?: string | string[]): Verdict | undefined {
  const cause = `status ${status}`
  if (status === 200 || status === 400) return undefined
  if (status === 429) return { code: 'mixpanel_rate_limited', retryAfter: retryAfterSeconds(String(retryAfter)), cause }
  if (status === 401 || status === 403) return { code: 'mixpanel_rejected_credentials', cause }
  if (status === 408 || status >= 500) return { code: 'mixpanel_unreachable', cause, again: true }
  return { code: 'mixpanel_misanswered', cause, again: false }
}

/** Reads `1`, `0`, `{ error, status }` and the strict form `{ code, failed_records }`; anything else is no answer. */
export function interpretBody (status: number, text: string): Verdict {
  const answer = parse(text)
  const { status: word, code, ...words } = Object(answer) as Record<string, unknown>
  const reason = reasonOf(words)
  // Seen live: a `0` that is Mixpanel's own passing fault, which only its words tell from a refusal.
  if (reason !== undefined && /temporary failure/i.test(reason)) {
    return { code: 'mixpanel_unreachable', cause: 'temporary failure', again: true }
  }
  const refused = status === 400 || reason !== undefined || answer === 0 || word === 0
  if (refused) return { code: 'refused_by_mixpanel', reason }
  if (answer === 1 || word === 1 || code === 200) return { code: 'accepted' }
  return { code: 'mixpanel_misanswered', cause: 'neither 1 nor 0', again: true }
}

/** The verdict where no whole answer came: `error` is what undici or the socket threw. */
export function interpretError ({ name, code = name }: NodeJS.ErrnoException): Verdict {
  if (/TIMEOUT|ETIMEDOUT/.test(code)) return { code: 'mixpanel_timed_out', cause: code, again: true }
  // Bytes that are not HTTP, too many headers, too large a body: somebody else answers there.
  const foreign = /^(HPE_|HTTPParserError|UND_ERR_HEADERS_OVERFLOW|UND_ERR_RES_EXCEEDED_MAX_SIZE)/.test(code)
  return { code: foreign ? 'mixpanel_misanswered' : 'mixpanel_unreachable', cause: code, again: true }
}

function parse (text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

/** Mixpanel's words, fit to be shown: on one line, at most 500 characters. */
function reasonOf ({ error, failed_records: records }: Record<string, unknown>): string | undefined {
  // In Simplified projects the records have been seen as strings.
  const messages = (Array.isArray(records) ? records : [])
    .map(record => typeof record === 'string' ? record : record?.message).filter(message => typeof message === 'string')
  const words = messages.length > 0 ? messages.join('; ') : error
  if (typeof words !== 'string' || words === '') return undefined
  return words.replace(/\p{Cc}+/gu, ' ').slice(0, 500)
}

function retryAfterSeconds (header: string): number {
  const { least, usual, most } = RETRY_AFTER_SECONDS
  const seconds = /^\d+$/.test(header) ? Number(header) : Math.ceil((Date.parse(header) - Date.now()) / 1000)
  return Number.isNaN(seconds) ? usual : Math.min(Math.max(seconds, least), most)
}
