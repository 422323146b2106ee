import { hash } from 'node:crypto'
import { MAX_IDENTITY_BYTES, type Identity } from './identity.ts'
import { deviceKey } from './ids.ts'

/** An event as Mixpanel reads it, without the token. */
export interface IdentifyEvent {
  event: '$identify'
  properties: Readonly<Record<string, unknown>> & {
    $identified_id: string, $anon_id: string, $insert_id: string, time: number
  }
}

/**
 * A `$identify` event that waits for Mixpanel. It is serialised once and frozen, so a repeat has the same bytes. It
 * holds no token; the client adds it to each request.
 */
export interface PendingEvent {
  /** `{"event":…,"properties":{…}}` */
  readonly json: string
  /** The length of `json` in UTF-8. */
  readonly bytes: number
  /** The user's id, as the caller gave it. */
  readonly userId: string
  /** Equal for all spellings of an anonymous id: Mixpanel's SDKs add `$device:`, and a UUID has no case. */
  readonly anonKey: string
  readonly insertId: string
  /** Seconds since the epoch. */
  readonly time: number
}

/** An event of this many bytes is held in a buffer. */
const LARGE_BYTES = 8192

/**
 * Returns the event of an identity that is validated at `now` (ms since the epoch). `insertId` depends only on the ids
 * and the properties, so that Mixpanel recognizes a repeat (docs: at most 36 bytes of [A-Za-z0-9-]).
 */
export function identifyEvent (identity: Identity, now: number): PendingEvent {
  const { identified_id: identified, anon_id: anon, properties } = identity
  const text = properties === undefined ? '{}' : JSON.stringify(properties)
  return pending({
    event: '$identify',
    properties: {
      ...properties,
      // Documented as optional, but without it Mixpanel has been seen to answer "distinct_id, missing or empty".
      distinct_id: identified,
      $identified_id: identified,
      $anon_id: anon,
      time: Math.floor(now / 1000),
      // No valid id contains a line feed, so no two identities have the same text.
      $insert_id: hash('sha256', `${anon}\n${identified}${text === '{}' ? '' : `\n${text}`}`).slice(0, 32)
    }
  })
}

/**
 * Returns true if an event exceeds MAX_IDENTITY_BYTES plus 4096 for the repeated ids. A number may grow when it is
 * printed: 1e20 has 4 bytes in the request and 21 in the event.
 */
export const isTooLarge = ({ bytes }: PendingEvent): boolean => bytes > MAX_IDENTITY_BYTES + 4096

/** Returns the event that was stored as `json`, byte for byte; undefined if `json` is no event. */
export function storedEvent (json: string): PendingEvent | undefined {
  try {
    const event = pending(parseEvent({ json }), json)
    return typeof event.insertId === 'string' && Number.isFinite(event.time) ? event : undefined
  } catch {
    return undefined
  }
}

/** Returns the event as an object. */
export function parseEvent ({ json }: Pick<PendingEvent, 'json'>): IdentifyEvent {
  return JSON.parse(json)
}

function pending (event: IdentifyEvent, json = JSON.stringify(event)): PendingEvent {
  const { $identified_id: userId, $anon_id: anon, $insert_id: insertId, time } = event.properties
  const anonKey = deviceKey(anon)
  const bytes = Buffer.byteLength(json)
  if (bytes === json.length && bytes < LARGE_BYTES) {
    return Object.freeze({ json, bytes, userId, anonKey, insertId, time })
  }
  // V8 does not move bytes outside its heap. A string with any character beyond Latin-1 has two bytes per character.
  const utf8 = Buffer.from(json)
  return Object.freeze({ get json () { return utf8.toString() }, bytes, userId, anonKey, insertId, time })
}
