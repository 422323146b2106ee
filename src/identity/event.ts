import { hash } from 'node:crypto'
import type { Config } from '../config.ts'
import { createEventTemplate, type EventTemplate } from './event-template.ts'
import { MAX_IDENTITY_BYTES, type Identity } from './identity.ts'
import { deviceKey, withoutPrefix } from './ids.ts'
import { frozen, type PendingEvent } from './pending-event.ts'
import { isPlain, PlainEvent } from './plain-event.ts'
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

const IDENTIFY = createEventTemplate('$identify', '$identified_id', '$anon_id')

/** Returns a function that makes the event of an identity that is validated at `now` (ms since the epoch). */
export function createToEvent (
  { MIXPANEL_ID_MERGE: mode, MERGE_EVENT: name }: Pick<Config, 'MIXPANEL_ID_MERGE' | 'MERGE_EVENT'>
): (identity: Identity, now: number) => PendingEvent {
  if (mode === 'original') return identifyEvent
  // Projects with Simplified ID Merge ignore `$identify`: there any other event with both ids merges.
  const template = createEventTemplate(name, '$user_id', '$device_id')
  return (identity, now) => {
    // Mixpanel stores a `$device_id` without its prefix, and never finds one that has two.
    const device = withoutPrefix(identity.anon_id)
    return mergingEvent(template, device, device, identity, now)
  }
}

/** Returns the `$identify` event of an identity, which merges in projects with Original ID Merge. */
export function identifyEvent (identity: Identity, now: number): PendingIdentity {
  return mergingEvent(IDENTIFY, identity.anon_id, deviceKey(identity.anon_id), identity, now)
}

/** Returns an event of a template; `anon` is the anonymous id as Mixpanel stores it. */
function mergingEvent (
  template: EventTemplate, anon: string, anonKey: string, { identified_id: user, properties }: Identity, now: number
): PendingIdentity {
  const own = properties === undefined ? '' : JSON.stringify(properties).slice(1, -1)
  const insertId = insertIdOf(user, anon, own)
  const time = Math.floor(now / 1000)
  if (own === '' && isPlain(user) && isPlain(anon)) return new PlainEvent(template, user, anon, anonKey, insertId, time)
  return frozen(template.json(user, anon, time, insertId, own), user, anonKey, insertId, time)
}

/**
 * Returns the `$insert_id` of an event, which depends only on the ids and the properties (JSON without its braces), so
 * that Mixpanel recognizes a repeat (docs: at most 36 bytes of [A-Za-z0-9-]). No valid id contains a line feed, so each
 * identity has its own text.
 */
function insertIdOf (user: string, anon: string, properties: string): string {
  return hash('sha256', `${anon}\n${user}${properties === '' ? '' : `\n{${properties}}`}`).slice(0, 32)
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
    const event = stored(json, parsed)
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

/** Returns an identity's event that was stored as `json`. */
function stored (json: string, { properties }: MergingEvent): PendingIdentity {
  const { $insert_id: insertId, time } = properties
  const [userId, anonKey] = '$device_id' in properties
    ? [properties.$user_id, properties.$device_id] as [string, string]
    : [properties.$identified_id, deviceKey(properties.$anon_id)] as [string, string]
  return frozen(json, userId, anonKey, insertId, time)
}
