import { viewOf } from './event-view.ts'
import type { createLedger, MixpanelEvent, Mode } from './ledger.ts'
import { failedRecords } from './records.ts'
import type { Refusals } from './refusals.ts'

export interface EndpointOptions {
  mode?: Mode
  /** The project's token and, for `/import`, its id and service accounts as `user:secret`. */
  token?: string
  projectId?: string
  serviceAccounts?: string[]
  /** Tokens of projects in another region: answered `1`, and lost. */
  foreignTokens?: string[]
  /** Whether `1` for an array means that all events are accepted, or any; Mixpanel documents both. */
  arrayAnswer?: 'all' | 'any'
  /** Seconds since the epoch. */
  clock?: () => number
}

/** The query parameters, and for `/track` the fields of the form as well. */
export type Params = Record<string, string | undefined>

/** An answer: an object is sent as JSON, a string as plain text unless there is a `type`. */
export interface Answer { status: number, body: object | string, type?: string, location?: string }

const MAX_RECORDS = 2000
const TOO_MANY = `more than ${MAX_RECORDS} events`
const MISSING = 'data, missing or empty'
const FIVE_DAYS = 5 * 24 * 3600
const SIMPLIFIED = 'identity events are not allowed when project is using simplified identity management'
const PIXEL = Buffer.from('R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7', 'base64')

export const TOO_LARGE = failure(413, 'request exceeds max limit of 2097152 bytes', 'Request Entity Too Large')

/**
 * `/track` and `/import` as far as they are known. Each returns its answer and adds accepted events to the ledger, all
 * others to the refusals.
 */
export function createEndpoints (
  options: EndpointOptions, ledger: ReturnType<typeof createLedger>, refusals: Refusals
) {
  const { token = 'sandbox-token', projectId = '1', serviceAccounts = [], foreignTokens = [] } = options
  const clock = options.clock ?? (() => Math.floor(Date.now() / 1000))

  function store (endpoint: 'track' | 'import', event: MixpanelEvent, given: unknown): void {
    const properties = Object(event.properties) as Record<string, unknown>
    if (foreignTokens.includes(String(given))) return ledger.add(endpoint, event, 'wrong_region')
    if (given !== token) return ledger.add(endpoint, event, 'unknown_token')
    if (properties.$ignore) return ledger.add(endpoint, event, 'ignored')
    // A missing distinct_id is taken from $identified_id.
    const id = properties.distinct_id ?? (event.event === '$identify' ? properties.$identified_id : undefined)
    ledger.add(endpoint, { ...event, properties: { ...properties, distinct_id: id } })
  }

  function refuse (endpoint: 'track' | 'import', reason: string, event?: MixpanelEvent): void {
    const views = event === undefined ? [] : [viewOf(event)]
    refusals.add({ endpoint, kind: 'refused', reason, events: () => views })
  }

  /** Stores the valid events and lists the failed ones, as `strict=1` does. */
  function storeValid (
    endpoint: 'track' | 'import', events: MixpanelEvent[], tokenOf: (event: MixpanelEvent) => unknown
  ): Answer {
    const failed = failedRecords(events, clock())
    const messages = new Map(failed.map(({ index, message }) => [index, message]))
    events.forEach((event, index) => {
      const message = messages.get(index)
      if (message === undefined) store(endpoint, event, tokenOf(event))
      else refuse(endpoint, message, event)
    })
    const imported = events.length - failed.length
    return failed.length > 0
      ? refusal(failed, imported)
      : { status: 200, body: { code: 200, num_records_imported: imported, status: 'OK' } }
  }

  /** Answers a request of which no event is stored. */
  function refuseAll (endpoint: 'track' | 'import', reason: string, answer: Answer): Answer {
    refuse(endpoint, reason)
    return answer
  }

  return {
    /** `data` is the parsed body or form field: null if it is not JSON, undefined if it is missing. */
    track (params: Params, data: unknown): Answer {
      const events = (Array.isArray(data) ? data : [data]) as MixpanelEvent[]
      const refuseData = (reason: string) => refuseAll('track', reason, plain(params, reason))
      if (data === undefined || events.length === 0) return refuseData(MISSING)
      if (events.some(event => typeof event !== 'object' || event === null)) return refuseData('data, invalid')
      if (events.length > MAX_RECORDS) return refuseAll('track', TOO_MANY, TOO_LARGE)
      // Assumption: no answer of `/track` to strict=1 has been recorded; the answer of `/import` is used.
      if (params.strict === '1') return storeValid('track', events, event => event.properties?.token)
      const reasons = events.map(event => trackFault(event, clock()))
      events.forEach((event, index) => {
        const reason = reasons[index]
        if (reason === undefined) store('track', event, event.properties?.token)
        else refuse('track', reason, event)
      })
      const errors = reasons.filter(reason => reason !== undefined)
      return plain(params, options.arrayAnswer === 'any' && errors.length < events.length ? undefined : errors[0])
    },

    /** Returns the answer to an export that is not permitted, or undefined. */
    refuseExport (params: Params, credentials: string): Answer | undefined {
      if (!serviceAccounts.includes(credentials)) return failure(401, 'Invalid credentials', 'Unauthorized')
      if (params.project_id !== projectId) return failure(403, 'Project is not accessible', 'Forbidden')
      const days = [params.from_date, params.to_date]
      if (days.some(day => !/^\d{4}-\d{2}-\d{2}$/.test(day ?? ''))) return failure(400, 'invalid date', 'Bad Request')
      const today = new Date(clock() * 1000).toISOString().slice(0, 10)
      if (String(params.to_date) > today) return failure(400, 'to_date cannot be later than today', 'Bad Request')
      return undefined
    },

    /** `credentials` are those of Basic auth, as `user:secret`; `events` is the parsed body. */
    import (params: Params, credentials: string, events: unknown): Answer {
      const isAccount = serviceAccounts.includes(credentials) && params.project_id === projectId
      if (!isAccount && credentials !== `${token}:`) {
        return refuseAll('import', 'Invalid credentials', failure(401, 'Invalid credentials', 'Unauthorized'))
      }
      if (!Array.isArray(events)) {
        const reason = 'request body is not a list'
        return refuseAll('import', reason, failure(400, reason, 'Bad Request'))
      }
      if (events.length > MAX_RECORDS) return refuseAll('import', TOO_MANY, TOO_LARGE)
      if (params.strict === '0') {
        const isEmpty = events.every(event => Object.keys(Object(event)).length === 0)
        if (isEmpty) return refuseAll('import', MISSING, plain(params, MISSING))
        events.forEach(event => store('import', event, token))
        return plain(params)
      }
      const isVerb = ({ event }: MixpanelEvent) => ['$identify', '$create_alias', '$merge'].includes(String(event))
      if (options.mode === 'simplified' && events.some(isVerb)) {
        return refuseAll('import', SIMPLIFIED, refusal([SIMPLIFIED], 0))
      }
      return storeValid('import', events, () => token)
    }
  }
}

/** Returns why `/track` refuses a record, or undefined. Texts that have not been recorded are assumptions. */
function trackFault ({ event, properties }: MixpanelEvent, now: number): string | undefined {
  const { token, time, distinct_id: id } = Object(properties) as Record<string, unknown>
  if (event === undefined && properties === undefined) return MISSING
  if (event === undefined || event === '') return 'event, missing'
  if (token === undefined || token === '') return 'token, missing or empty'
  if (event === '$identify' && id === '') return 'distinct_id, missing or empty'
  const seconds = typeof time === 'number' && time > 1e11 ? time / 1000 : time
  return typeof seconds === 'number' && seconds < now - FIVE_DAYS ? 'time, too old' : undefined
}

/** Returns the plain answer: always 200, with `1` or `0` as text, or as JSON with `verbose=1`. */
function plain ({ verbose, img, callback, redirect }: Params, error?: string): Answer {
  const word = error === undefined ? 1 : 0
  if (redirect !== undefined) return { status: 302, body: '', location: redirect }
  if (img === '1') return { status: 200, body: PIXEL, type: 'image/gif' }
  if (callback !== undefined) return { status: 200, body: `${callback}(${word})`, type: 'text/javascript' }
  return { status: 200, body: verbose === '1' ? { error: error ?? null, status: word } : String(word) }
}

function failure (code: number, error: string, status: string): Answer {
  return { status: code, body: { code, error, status } }
}

function refusal (failed: unknown[], imported: number): Answer {
  const { status, body } = failure(400, 'some data points in the request failed validation', 'Bad Request')
  return { status, body: { ...body as object, failed_records: failed, num_records_imported: imported } }
}
