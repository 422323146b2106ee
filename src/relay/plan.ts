import type { Config } from '../config.ts'
import { MAX_REQUEST_BYTES, wireBytes } from '../mixpanel/encode.ts'
import { isTooLarge, type Verdict } from '../identity/verdict.ts'
import type { Entry } from '../outbox/outbox.ts'
import type { Quarantine } from './quarantine.ts'

/** How many arrays may be under way at a time, and how many with a suspect: five failures open the breaker. */
const MAX_ARRAYS = 8
const MAX_QUARANTINED = 2

/** The most identities in one round, which are in memory together. */
const MAX_ROUND = 2000

/** `/track` drops what is older than five days, and answers `1`. */
const TRACK_MAX_AGE_MS = 4.5 * 24 * 3600 * 1000

/** How many entries a round may have. */
export function maxRound ({ MAX_BATCH: maxBatch }: Config): number {
  return Math.min(MAX_ROUND, MAX_ARRAYS * maxBatch)
}

/** True for what `/track` would no longer take. */
export function isTooOld ({ event, endpoint }: Pick<Entry, 'event' | 'endpoint'>, config: Config): boolean {
  return (endpoint ?? config.MIXPANEL_ENDPOINT) === 'track' &&
    Date.now() - event.time * 1000 > TRACK_MAX_AGE_MS
}

/** One pass through the outbox. */
export interface Pass {
  /** The id of the last entry that was looked at. */
  after: string | undefined
  /** Claims of those who stay behind. */
  deferred: Set<string>
  /** Claims of which one is accepted and others stayed behind: the anonymous id is taken. */
  decided: Set<string>
  /** Something was settled. */
  madeProgress: boolean
}

export const createPass = (decided = new Set<string>()): Pass =>
  ({ after: undefined, deferred: new Set(), decided, madeProgress: false })

/**
 * Those of `entries` that may be under way together, in arrays that are as full as they may be. Of a claim only one
 * pair of ids is under way, and none while an earlier one is `held` back or left aside; whoever stays behind is added
 * to `held`. Where the claim is `decided`, order no longer matters. An array goes to one endpoint, and Mixpanel takes
 * its size; a suspect is alone. `last` is the id of the last entry that was looked at.
 */
export function planRound (
  entries: Entry[], { deferred, decided }: Pick<Pass, 'deferred' | 'decided'>, quarantine: Quarantine, config: Config
) {
  const pairs = new Map<string, string>()
  const arrays: Entry[][] = []
  const quarantined: Entry[][] = []
  /** The array that may take more. */
  let open: Entry[] = []
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
      const fits = open.length < config.MAX_BATCH && bytes + size <= MAX_REQUEST_BYTES &&
        open[0]?.endpoint === entry.endpoint
      if (isQuarantined) {
        quarantined.push([entry])
      } else if (fits) {
        open.push(entry)
        bytes += size
      } else {
        if (arrays.length === MAX_ARRAYS - MAX_QUARANTINED) break
        arrays.push(open = [entry])
        bytes = size
      }
      pairs.set(anonKey, pair)
    }
    last = entry.id
  }
  // Suspects last: when only one may be sent, to probe, it is not one of them.
  return { arrays: [...arrays, ...quarantined], last }
}

/** Why an entry with this verdict will never be delivered; undefined if it is, or may be. */
export function finalReason ({ endpoint }: Entry, verdict: Verdict): string | undefined {
  if (verdict.code === 'refused_by_mixpanel') return verdict.reason ?? 'refused by Mixpanel, without a reason'
  if (isTooLarge(verdict)) return 'too large for Mixpanel'
  // An operator's replay: its credentials are not those of the rest, which must not wait for them.
  if (endpoint === 'import' && verdict.code === 'mixpanel_rejected_credentials') {
    return '/import rejected the credentials of this relay'
  }
  return undefined
}
