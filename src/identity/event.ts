import { hash } from 'node:crypto'
import type { Config } from '../config.ts'
import { MAX_IDENTITY_BYTES, type Identity } from './identity.ts'
import { deviceKey, withoutPrefix } from './ids.ts'
import { frozen, type PendingEvent } from './pending-event.ts'
import { storedSdkEvent } from './sdk-event.ts'

export type { PendingEvent } from './pending-event.ts'

/** The pending event of an identity. */
type PendingIdentity = PendingEvent & { readonly anonKey: string }

/** The names of the two ids in each mode. */
type MergingIds = { $identified_id: string, $anon_id: string } | { $user_id: string, $device_id: string }

/** An event that merges two ids, as Mixpanel reads it, without the token. */
export interface MergingEvent {
  event: string
  properties: Readonly<Record<string, unknown>> & { $insert_id: string, time: number } & MergingIds
}

/** Returns a function that makes the event of an identity that is validated at `now` (ms since the epoch). */
export function createToEvent (
  { MIXPANEL_ID_MERGE: mode, MERGE_EVENT: name }: Pick<Config, 'MIXPANEL_ID_MERGE' | 'MERGE_EVENT'>
): (identity: Identity, now: number) => PendingEvent {
  return mode === 'original' ? identifyEvent : (identity, now) => ordinaryEvent(identity, now, name)
}

/** Returns the `$identify` event of an identity, which merges in projects with Original ID Merge. */
export function identifyEvent (identity: Identity, now: number): PendingIdentity {
  const { identified_id: identified, anon_id: anon } = identity
  return mergingEvent('$identify', { $identified_id: identified, $anon_id: anon }, anon, identity, now)
}

/**
 * Returns the event of an identity in projects with Simplified ID Merge, which ignore `$identify`: there any other
 * event with both ids merges. Mixpanel stores a `$device_id` without its prefix, and never finds one that has two.
 */
function ordinaryEvent (identity: Identity, now: number, name: string): PendingIdentity {
  const device = withoutPrefix(identity.anon_id)
  return mergingEvent(name, { $user_id: identity.identified_id, $device_id: device }, device, identity, now)
}

/** Returns an event with these `ids`; `anon` is the anonymous id as Mixpanel stores it. */
function mergingEvent (
  event: string, ids: MergingIds, anon: string, { identified_id: identified, properties }: Identity, now: number
): PendingIdentity {
  return pending({
    event,
    properties: {
      ...properties,
      // Documented as optional, but without it Mixpanel has been seen to answer "distinct_id, missing or empty".
      distinct_id: identified,
      ...ids,
      time: Math.floor(now / 1000),
      $insert_id: insertIdOf(identified, anon, properties)
    }
  })
}

/**
 * Returns the `$insert_id` of an event, which depends only on the ids and the properties, so that Mixpanel recognizes a
 * repeat (docs: at most 36 bytes of [A-Za-z0-9-]). No valid id contains a line feed, so each identity has its own text.
 */
function insertIdOf (identified: string, anon: string, properties: Identity['properties']): string {
  const text = properties === undefined ? '{}' : JSON.stringify(properties)
  return hash('sha256', `${anon}\n${identified}${text === '{}' ? '' : `\n${text}`}`).slice(0, 32)
}

/**
 * Returns true if an event exceeds MAX_IDENTITY_BYTES plus 4096 for the repeated ids. A number may grow when it is
 * printed: 1e20 has 4 bytes in the request and 21 in the event.
 */
export const isTooLarge = ({ bytes }: PendingEvent): boolean => bytes > MAX_IDENTITY_BYTES + 4096

/** Returns the event that was stored as `json`, byte for byte; undefined if `json` is no event. */
export function storedEvent (json: string): PendingEvent | undefined {
  try {
    const parsed = parseEvent({ json })
    // `token` is a reserved name for identities.
    if ('token' in parsed.properties) return storedSdkEvent(json, parsed)
    const event = pending(parsed, json)
    return typeof event.insertId === 'string' && Number.isFinite(event.time) ? event : undefined
  } catch {
    return undefined
  }
}

/** Returns a text of Mixpanel about an event with the ids of the event masked, for the log. */
export function withoutIds (text: string, event: PendingEvent): string {
  const { $device_id: device, distinct_id: distinct } = parseEvent(event).properties
  const { userId, anonId } = idsOf(event)
  const ids = [userId, anonId, event.anonKey, device, distinct].filter(id => typeof id === 'string' && id !== '')
  return ids.reduce((masked: string, id) => masked.replaceAll(String(id), '***'), text)
}

/** Returns the two ids of an event as it carries them, whatever the mode. One that does not merge may lack both. */
export function idsOf (event: PendingEvent): { userId: string, anonId: string | undefined } {
  const properties: Record<string, unknown> = parseEvent(event).properties
  const anon = event.tokenAt !== undefined && 'alias' in properties
    ? properties.distinct_id
    : properties.$anon_id ?? properties.$anon_distinct_id ?? properties.$device_id
  return { userId: event.userId, anonId: typeof anon === 'string' ? anon : undefined }
}

/** Returns the event as an object. */
export function parseEvent ({ json }: Pick<PendingEvent, 'json'>): MergingEvent {
  return JSON.parse(json)
}

function pending ({ event, properties }: MergingEvent, json = JSON.stringify({ event, properties })): PendingIdentity {
  const { $insert_id: insertId, time } = properties
  const [userId, anonKey] = '$device_id' in properties
    ? [properties.$user_id, properties.$device_id] as [string, string]
    : [properties.$identified_id, deviceKey(properties.$anon_id)] as [string, string]
  return frozen(json, userId, anonKey, insertId, time)
}
