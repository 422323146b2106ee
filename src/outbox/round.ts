import type { Config } from '../config.ts'
import { claimOf } from '../event.ts'
import { isTooLarge, type Verdict } from '../verdict.ts'
import type { Entry } from './outbox.ts'
import type { Suspects } from './suspects.ts'

/** How many arrays may be under way at a time. */
const ARRAYS = 8

/** The most identities in one round, which are in memory together. */
const MAX_ROUND = 2000

/** Mixpanel takes 10 MB, or by other documents 2 MiB; percent-encoding may treble what is JSON here. */
const MAX_ARRAY_CHARACTERS = 500_000

/** `/track` drops what is older than five days, and answers `1`. */
const TRACK_MAX_AGE_MS = 4.5 * 24 * 3600 * 1000

/** How many entries a round may have: eight arrays of MAX_BATCH. */
export function maxRound ({ MAX_BATCH: maxBatch }: Config): number {
  return Math.min(MAX_ROUND, ARRAYS * maxBatch)
}

/** True for what `/track` would no longer take. */
export function isTooOld ({ event, endpoint }: Pick<Entry, 'event' | 'endpoint'>, config: Config): boolean {
  return (endpoint ?? config.MIXPANEL_ENDPOINT) === 'track' &&
    Date.now() - event.properties.time * 1000 > TRACK_MAX_AGE_MS
}

/**
 * The first `size` of `entries` that may be under way together, in arrays that are as full as they may be: one of each
 * claim, and none that is left aside. An array goes to one endpoint, and Mixpanel takes its size; a suspect is alone.
 */
export function choose (entries: Entry[], size: number, suspects: Suspects, maxBatch: number): Entry[][] {
  const claims = new Set<string>()
  const arrays: Entry[][] = []
  /** The array that may take more. */
  let last: Entry[] = []
  let characters = MAX_ARRAY_CHARACTERS
  for (const entry of entries) {
    const claim = claimOf(entry.event)
    if (claims.has(claim) || suspects.isAside(claim)) continue
    claims.add(claim)
    const { length } = JSON.stringify(entry.event)
    const isSuspect = suspects.has(claim)
    const fits = last.length < maxBatch && characters + length <= MAX_ARRAY_CHARACTERS &&
      last[0]?.endpoint === entry.endpoint
    if (fits && !isSuspect) {
      last.push(entry)
      characters += length
    } else if (arrays.length === ARRAYS) {
      break
    } else {
      const array = [entry]
      arrays.push(array)
      if (!isSuspect) [last, characters] = [array, length]
    }
    if (claims.size === size) break
  }
  return arrays
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
