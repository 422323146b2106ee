import type { Config } from '../config.ts'
import { MAX_REQUEST_BYTES, wireBytes } from '../mixpanel/encode.ts'
import { parseEvent } from '../identity/event.ts'
import { isVerb } from '../identity/merge.ts'
import { isTooLarge, type Verdict } from '../identity/verdict.ts'
import type { Entry } from '../outbox/outbox.ts'
import type { Suspects } from './suspects.ts'

/**
 * At most this many arrays are in flight. Only two may be culprits, so that these alone cannot cause the five failures
 * that open the breaker.
 */
const MAX_ARRAYS = 8
const MAX_CULPRITS = 2

/** The most anonKeys that wait for a later pass; beyond it a new pass begins. */
const MAX_DEFERRED = 100_000

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

/** Returns true for an event for which `/import` would refuse its whole array: it has no effect in this mode. */
export function hasNoEffect ({ event, endpoint }: Entry, { MIXPANEL_ENDPOINT, MIXPANEL_ID_MERGE }: Config): boolean {
  return (endpoint ?? MIXPANEL_ENDPOINT) === 'import' && MIXPANEL_ID_MERGE === 'simplified' &&
    isVerb(parseEvent(event))
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
  /** True after a pause for a failure; the next pass need not wait again. */
  hasPaused: boolean
}

/** Returns the anonKey of an entry, or a key of its own for an event without one, which has no order. */
export const orderKey = ({ id, event: { anonKey } }: Entry): string => anonKey ?? `\n${id}`

export const createPass = (decided = new Set<string>()): Pass =>
  ({ after: undefined, deferred: new Set(), decided, madeProgress: false, hasPaused: false })

/** Returns true if a pass takes too much memory. */
export const isTooLong = ({ deferred, decided }: Pass) => deferred.size + decided.size > MAX_DEFERRED

/**
 * Returns the `entries` that may be in flight together, in arrays as full as possible, and the id of the `last` entry
 * that it looked at. For each anonKey only one pair of ids is in flight, and none behind a `deferred` entry. If an
 * entry must wait, its anonKey is added to `deferred`. Once an anonKey is `decided`, order no longer matters. An array
 * has one endpoint, fits MAX_REQUEST_BYTES and the limits of `suspects`. A culprit travels alone.
 */
export function planRound (
  entries: Entry[], { deferred, decided }: Pick<Pass, 'deferred' | 'decided'>, suspects: Suspects, config: Config
) {
  const pairs = new Map<string, string>()
  const arrays: Entry[][] = []
  const culprits: Entry[][] = []
  let current: Entry[] = []
  let limit = 0
  let bytes = MAX_REQUEST_BYTES
  let last: string | undefined
  for (const entry of entries) {
    const anonKey = orderKey(entry)
    const { userId: pair } = entry.event
    const isCulprit = suspects.isCulprit(anonKey)
    const mustWait = suspects.isPaused(anonKey) || (isCulprit && culprits.length === MAX_CULPRITS)
    const isSecond = !decided.has(anonKey) && (pairs.get(anonKey) ?? pair) !== pair
    if (mustWait || isSecond) deferred.add(anonKey)
    if (!deferred.has(anonKey)) {
      const size = wireBytes(entry.event, config)
      const ownLimit = Math.min(config.MAX_BATCH, suspects.limit(anonKey))
      const fits = current.length < Math.min(limit, ownLimit) && bytes + size <= MAX_REQUEST_BYTES &&
        current[0]?.endpoint === entry.endpoint
      if (isCulprit) {
        culprits.push([entry])
      } else if (fits) {
        current.push(entry)
        bytes += size
        limit = Math.min(limit, ownLimit)
      } else {
        if (arrays.length === MAX_ARRAYS - MAX_CULPRITS) break
        arrays.push(current = [entry])
        bytes = size
        limit = ownLimit
      }
      pairs.set(anonKey, pair)
    }
    last = entry.id
  }
  // Culprits come last, so the one probe that the breaker admits is an ordinary array.
  return { arrays: [...arrays, ...culprits], last }
}

/** Why an entry becomes a dead letter, for operators, and the label of the reason in the metrics. */
export interface FinalReason { reason: string, label: string }

export const TOO_OLD: FinalReason = { reason: 'older than 4.5 days', label: 'too_old' }
export const NO_EFFECT: FinalReason = { reason: 'no effect with Simplified ID Merge', label: 'no_effect' }

/** Returns why an entry with this verdict can never be delivered; undefined if it is delivered or still may be. */
export function finalReason ({ endpoint }: Entry, verdict: Verdict): FinalReason | undefined {
  const { code } = verdict
  if (code === 'refused_by_mixpanel') {
    return { reason: verdict.reason ?? 'refused by Mixpanel, without a reason', label: code }
  }
  if (isTooLarge(verdict)) return { reason: 'too large for Mixpanel', label: 'too_large' }
  // A replay through /import may need other credentials than the other entries, which must not wait for a correction.
  if (endpoint === 'import' && code === 'mixpanel_rejected_credentials') {
    return { reason: '/import rejected the credentials of this relay', label: code }
  }
  return undefined
}
