import type { Config } from '../config.ts'
import { MAX_REQUEST_BYTES, wireBytes } from '../mixpanel/encode.ts'
import { isTooLarge, type Verdict } from '../identity/verdict.ts'
import type { Entry } from '../outbox/outbox.ts'
import type { Quarantine } from './quarantine.ts'

/**
 * At most this many arrays are in flight. Only two may be quarantined entries, so that these alone cannot cause the
 * five failures that open the breaker.
 */
const MAX_ARRAYS = 8
const MAX_QUARANTINED = 2

/** The most entries in one round; all of them are in memory together. */
const MAX_ROUND = 2000

/** `/track` drops events older than five days, although it answers `1`. */
const TRACK_MAX_AGE_MS = 4.5 * 24 * 3600 * 1000

/** Returns how many entries a round may have. */
export function maxRound ({ MAX_BATCH: maxBatch }: Config): number {
  return Math.min(MAX_ROUND, MAX_ARRAYS * maxBatch)
}

/** Returns true for an entry that is too old to send to `/track`. */
export function isTooOld ({ event, endpoint }: Pick<Entry, 'event' | 'endpoint'>, config: Config): boolean {
  return (endpoint ?? config.MIXPANEL_ENDPOINT) === 'track' &&
    Date.now() - event.time * 1000 > TRACK_MAX_AGE_MS
}

/** The state of one pass through the outbox, from the oldest entry to the newest. */
export interface Pass {
  /** The id of the last entry that a round looked at. */
  after: string | undefined
  /** The anonKeys of entries that must wait for a later pass. */
  deferred: Set<string>
  /** AnonKeys with an accepted entry and deferred ones. The anonymous id is taken, so the order of the rest is free. */
  decided: Set<string>
  madeProgress: boolean
}

export const createPass = (decided = new Set<string>()): Pass =>
  ({ after: undefined, deferred: new Set(), decided, madeProgress: false })

/**
 * Returns the `entries` that may be in flight together, in arrays as full as possible, and the id of the `last` entry
 * that it looked at. For each anonKey only one pair of ids is in flight, and none behind a `deferred` entry. If an
 * entry must wait, its anonKey is added to `deferred`. Once an anonKey is `decided`, order no longer matters. An array
 * has one endpoint and fits MAX_REQUEST_BYTES. A quarantined entry travels alone.
 */
export function planRound (
  entries: Entry[], { deferred, decided }: Pick<Pass, 'deferred' | 'decided'>, quarantine: Quarantine, config: Config
) {
  const pairs = new Map<string, string>()
  const arrays: Entry[][] = []
  const quarantined: Entry[][] = []
  let current: Entry[] = []
  let bytes = MAX_REQUEST_BYTES
  let last: string | undefined
  for (const entry of entries) {
    const { anonKey, insertId: pair } = entry.event
    const isQuarantined = quarantine.has(anonKey)
    const mustWait = quarantine.isPaused(anonKey) || (isQuarantined && quarantined.length === MAX_QUARANTINED)
    const isSecond = !decided.has(anonKey) && (pairs.get(anonKey) ?? pair) !== pair
    if (mustWait || isSecond) deferred.add(anonKey)
    if (!deferred.has(anonKey)) {
      const size = wireBytes(entry.event, config)
      const fits = current.length < config.MAX_BATCH && bytes + size <= MAX_REQUEST_BYTES &&
        current[0]?.endpoint === entry.endpoint
      if (isQuarantined) {
        quarantined.push([entry])
      } else if (fits) {
        current.push(entry)
        bytes += size
      } else {
        if (arrays.length === MAX_ARRAYS - MAX_QUARANTINED) break
        arrays.push(current = [entry])
        bytes = size
      }
      pairs.set(anonKey, pair)
    }
    last = entry.id
  }
  // Quarantined entries come last, so the one probe that the breaker admits is an ordinary array.
  return { arrays: [...arrays, ...quarantined], last }
}

/** Returns why an entry with this verdict can never be delivered; undefined if it is delivered or still may be. */
export function finalReason ({ endpoint }: Entry, verdict: Verdict): string | undefined {
  if (verdict.code === 'refused_by_mixpanel') return verdict.reason ?? 'refused by Mixpanel, without a reason'
  if (isTooLarge(verdict)) return 'too large for Mixpanel'
  // A replay through /import may need other credentials than the other entries, which must not wait for a correction.
  if (endpoint === 'import' && verdict.code === 'mixpanel_rejected_credentials') {
    return '/import rejected the credentials of this relay'
  }
  return undefined
}
