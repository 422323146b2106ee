import type { Config } from '../config.ts'
import type { PendingEvent } from '../identity/event.ts'
import type { Credentials } from './credentials.ts'

/** A request to Mixpanel, ready to be sent any number of times. */
export interface EncodedRequest { path: string, headers: Record<string, string>, body: Buffer }

/** The most that one request may have on the wire. Mixpanel documents 2 MiB and 10 MB; gateways often take 1 MiB. */
export const MAX_REQUEST_BYTES = 1_048_576

/** Returns how many bytes an event takes on the wire at most: percent-encoding may make three bytes of one. */
export function wireBytes ({ bytes }: PendingEvent, { MIXPANEL_TOKEN: token }: Config): number {
  // The token travels as `,"token":"…"`, escaped, with a comma before the next event.
  return 3 * (bytes + 2 * token.length + 12)
}

export interface EncodeOptions {
  /** Instead of MIXPANEL_ENDPOINT. */
  endpoint?: 'track' | 'import' | undefined
  /** Asks Mixpanel to validate the events. */
  strict?: boolean
  /** Asks `/track` for its reason in place of a bare `0`. */
  verbose?: boolean
}

/**
 * Returns the request for some events: one travels as an object, several as an array. `/import` always validates and
 * always gives its reason.
 */
export function encodeRequest (
  events: PendingEvent[], options: EncodeOptions, { basic, withToken }: Credentials, config: Config
): EncodedRequest {
  const { endpoint = config.MIXPANEL_ENDPOINT, strict = false, verbose = false } = options
  const list = events.map(({ json }) => withToken(json)).join()
  if (endpoint === 'import') {
    const { MIXPANEL_PROJECT_ID: project } = config
    return {
      path: `/import?strict=1${project === undefined ? '' : `&project_id=${project}`}`,
      headers: { 'content-type': 'application/json', authorization: basic },
      body: Buffer.from(`[${list}]`)
    }
  }
  const isStrict = strict || config.MIXPANEL_STRICT === '1'
  const json = events.length === 1 ? list : `[${list}]`
  return {
    // ip=0: the relay's own address must not become the user's location.
    path: `/track?ip=0${verbose ? '&verbose=1' : ''}`,
    headers: { 'content-type': 'application/x-www-form-urlencoded' },
    // undici would keep a buffer of its own beside a string.
    body: Buffer.from(`data=${encodeURIComponent(json)}${isStrict ? '&strict=1' : ''}`, 'latin1')
  }
}
