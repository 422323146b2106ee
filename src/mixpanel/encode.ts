import type { Config } from '../config.ts'
import type { PendingEvent } from '../identity/event.ts'
import type { Credentials } from './credentials.ts'

/** A request to Mixpanel, ready to be sent any number of times. */
export interface EncodedRequest { path: string, headers: Record<string, string>, body: Buffer }

/** The most bytes of a request. Mixpanel documents 2 MiB and 10 MB; gateways often accept 1 MiB. */
export const MAX_REQUEST_BYTES = 1_048_576

/** Returns the most bytes that an event has on the wire: percent-encoding may turn one byte into three. */
export function wireBytes ({ bytes, tokenAt }: PendingEvent, { MIXPANEL_TOKEN: token }: Config): number {
  // The token is sent as `,"token":"…"`, escaped, with a comma before the next event. An SDK's event may repeat it.
  return 3 * (bytes + (tokenAt?.length ?? 1) * 2 * token.length + 12)
}

export interface EncodeOptions {
  /** Overrides MIXPANEL_ENDPOINT. */
  endpoint?: 'track' | 'import' | undefined
  /** Asks Mixpanel to validate the events. */
  strict?: boolean
  /** Asks `/track` for its reason instead of a bare `0`. */
  verbose?: boolean
}

/**
 * Returns the request for some events. `/track` gets one event as an object, several as an array. `/import` always gets
 * an array, always validates, and always gives its reason.
 */
export function encodeRequest (
  events: PendingEvent[], options: EncodeOptions, credentials: Credentials, config: Config
): EncodedRequest {
  const { endpoint = config.MIXPANEL_ENDPOINT, strict = false, verbose = false } = options
  if (endpoint === 'import') {
    return importRequest('strict=1', events.map(credentials.withToken).join(), credentials.basic(), config)
  }
  const isStrict = strict || config.MIXPANEL_STRICT === '1'
  // Events are percent-encoded one by one. %5B, %2C and %5D make an array of them.
  const list = events.map(credentials.encodedWithToken).join('%2C')
  const data = events.length === 1 ? list : `%5B${list}%5D`
  return {
    // ip=0 keeps Mixpanel from taking the relay's address for the user's location.
    path: `/track?ip=0${verbose ? '&verbose=1' : ''}`,
    headers: { 'content-type': 'application/x-www-form-urlencoded' },
    // Given a string, undici would keep a buffer as well.
    body: Buffer.from(`data=${data}${isStrict ? '&strict=1' : ''}`, 'latin1')
  }
}

/**
 * Returns a request to `/import` with an empty record, which stores nothing. Mixpanel checks the credentials first:
 * 401 or 403 if they are wrong, otherwise `data, missing or empty`.
 */
export const encodeNothing = ({ basic }: Credentials, config: Config): EncodedRequest =>
  importRequest('strict=0&verbose=1', '{}', basic(), config)

function importRequest (
  query: string, list: string, authorization: string, { MIXPANEL_PROJECT_ID: project }: Config
): EncodedRequest {
  return {
    path: `/import?${query}${project === undefined ? '' : `&project_id=${project}`}`,
    headers: { 'content-type': 'application/json', authorization },
    body: Buffer.from(`[${list}]`)
  }
}
