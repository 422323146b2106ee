import { hash } from 'node:crypto'
import type { Identity } from './identity.ts'

/** A `$identify` event as accepted: without the token, and never changed afterwards, so that a repeat is harmless. */
export interface IdentifyEvent {
  event: '$identify'
  properties: Readonly<Record<string, unknown>> & { $anon_id: string, $insert_id: string, time: number }
}

/**
 * The event of an identity accepted at `now` (ms since the epoch). `$insert_id` depends on nothing but the two ids, so
 * that Mixpanel can tell a repeat (docs: at most 36 bytes of [A-Za-z0-9-]).
 */
export function identifyEvent (identity: Identity, now: number): IdentifyEvent {
  const { identified_id: identified, anon_id: anon, properties } = identity
  return {
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
  }
}

/** Events of one key claim the same anonymous id: Mixpanel's SDKs add `$device:`, and a UUID has no case. */
export function claimOf ({ properties }: IdentifyEvent): string {
  return properties.$anon_id.replace('$device:', '').toLowerCase()
}
