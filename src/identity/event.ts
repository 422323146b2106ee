import { hash } from 'node:crypto'
import { MAX_IDENTITY_BYTES, type Identity } from './identity.ts'

/** An event as Mixpanel reads it, without the token. */
export interface IdentifyEvent {
  event: '$identify'
  properties: Readonly<Record<string, unknown>> & {
    $identified_id: string, $anon_id: string, $insert_id: string, time: number
  }
}

/**
 * A `$identify` event that waits for Mixpanel: serialised once, frozen, and never changed afterwards, so that a repeat
 * is the same bytes. It holds no token; the client adds it on the way out.
 */
export interface PendingEvent {
  /** `{"event":…,"properties":{…}}`, which the client splices the token into. */
  readonly json: string
  /** The length of `json` in UTF-8. */
  readonly bytes: number
  /** Equal for all claims on one anonymous id: Mixpanel's SDKs add `$device:`, and a UUID has no case. */
  readonly anonKey: string
  readonly insertId: string
  /** Seconds since the epoch. */
  readonly time: number
}

/** An event of so many bytes is kept as bytes. */
const LARGE = 8192

/**
 * Returns the event of an identity that is validated at `now` (ms since the epoch). `insertId` depends on nothing but
 * the two ids, so that Mixpanel can tell a repeat (docs: at most 36 bytes of [A-Za-z0-9-]).
 */
export function identifyEvent (identity: Identity, now: number): PendingEvent {
  const { identified_id: identified, anon_id: anon, properties } = identity
  return pending({
    event: '$identify',
    properties: {
      ...properties,
      // Optional on paper; without it Mixpanel has been seen to answer "distinct_id, missing or empty".
      distinct_id: identified,
      $identified_id: identified,
      $anon_id: anon,
      time: Math.floor(now / 1000),
      // No valid id holds a line feed, so no two pairs join to the same text.
      $insert_id: hash('sha256', `${anon}\n${identified}`).slice(0, 32)
    }
  })
}

/**
 * True where an event is larger than an identity of MAX_IDENTITY_BYTES makes it, ids counted twice. A number may grow
 * when it is printed: 1e20 has four bytes, and then 21.
 */
export const isTooLarge = ({ bytes }: PendingEvent): boolean => bytes > MAX_IDENTITY_BYTES + 4096

/** Returns the event that was stored as `json`, byte for byte. Throws where it is none. */
export function storedEvent (json: string): PendingEvent {
  return pending(parseEvent({ json }), json)
}

/** Returns what an event says, for people. */
export function parseEvent ({ json }: Pick<PendingEvent, 'json'>): IdentifyEvent {
  return JSON.parse(json)
}

function pending (event: IdentifyEvent, json = JSON.stringify(event)): PendingEvent {
  const { $anon_id: anon, $insert_id: insertId, time } = event.properties
  const anonKey = anon.replace('$device:', '').toLowerCase()
  const bytes = Buffer.byteLength(json)
  if (bytes === json.length && bytes < LARGE) return Object.freeze({ json, bytes, anonKey, insertId, time })
  // Bytes that wait outside of V8's heap are not moved about by it; and a string takes two for each character as soon
  // as one of them is beyond Latin-1.
  const utf8 = Buffer.from(json)
  return Object.freeze({ get json () { return utf8.toString() }, bytes, anonKey, insertId, time })
}
