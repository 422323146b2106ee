import { createHmac, randomBytes } from 'node:crypto'
import { makeRoom } from '../concurrency/make-room.ts'
import type { Config } from '../config.ts'
import type { PendingEvent } from '../identity/event.ts'
import type { Verdict } from '../identity/verdict.ts'
import type { Log } from '../log.ts'
import { NO_METRICS, type Metrics } from '../metrics.ts'

/** The most pairs of ids in memory, some 30 MB. Beyond that those that have not been used for longest are forgotten. */
const MAX_PAIRS = 100_000

type Settings = Pick<Config, 'MAX_ANON_PER_USER' | 'MAX_USERS_PER_ANON' | 'MERGE_GUARD_WINDOW_MS' | 'MERGE_GUARD'>

/** A user and an anonymous id that were identified together, as digests. */
interface Pair {
  user: string
  anon: string
  usedAt: number
  /** Identities with this pair that have no verdict yet. */
  inFlight: number
  /** True once Mixpanel has the pair, or may have it. */
  isKept: boolean
}

interface Options { maxPairs?: number | undefined, metrics?: Metrics }

export type MergeGuard = ReturnType<typeof createMergeGuard>

/**
 * Returns a guard against merge storms: one user id in the place of many (`identify('user_id')`), or one device with
 * many users (a kiosk). It remembers pairs for MERGE_GUARD_WINDOW_MS after their last use, in this process alone, and
 * as digests with a random key. Returns undefined if no bound is set.
 */
export function createMergeGuard (
  config: Settings, log: Log, { maxPairs = MAX_PAIRS, metrics = NO_METRICS }: Options = {}
) {
  const { MAX_ANON_PER_USER: maxAnons = Infinity, MAX_USERS_PER_ANON: maxUsers = Infinity } = config
  if (maxAnons === Infinity && maxUsers === Infinity) return undefined
  const key = randomBytes(32)
  /** The one that has not been used for longest first. */
  const pairs = new Map<string, Pair>()
  /** How many pairs each user and each anonymous id has. */
  const counts = new Map<string, number>()
  const digest = (kind: string, id: string) =>
    createHmac('sha256', key).update(`${kind}:${id}`).digest('base64').slice(0, 16)
  const countOf = (id: string) => counts.get(id) ?? 0
  const add = (id: string, difference: number) => {
    const count = countOf(id) + difference
    if (count === 0) counts.delete(id)
    else counts.set(id, count)
  }

  function remove (name: string, { user, anon }: Pair): void {
    pairs.delete(name)
    add(user, -1)
    add(anon, -1)
  }

  /** Forgets the pairs that have not been used since `time`. */
  function forgetUnused (time: number): void {
    for (const [name, pair] of pairs) {
      if (pair.usedAt > time) return
      remove(name, pair)
    }
  }

  /** Returns the variable whose bound a new pair would exceed. */
  function exceeded (user: string, anon: string): string | undefined {
    if (countOf(user) >= maxAnons) return 'MAX_ANON_PER_USER'
    return countOf(anon) >= maxUsers ? 'MAX_USERS_PER_ANON' : undefined
  }

  /** Returns the pair of an event, which counts from now on, or the verdict on one that is suspicious. */
  function reserve ({ userId, insertId }: PendingEvent, anonKey: string): Pair | Verdict {
    const user = digest('user', userId)
    const anon = digest('anon', anonKey)
    const name = user + anon
    const now = performance.now()
    const known = pairs.get(name)
    if (known !== undefined) {
      pairs.delete(name)
      pairs.set(name, known)
      known.usedAt = now
      known.inFlight++
      return known
    }
    forgetUnused(now - config.MERGE_GUARD_WINDOW_MS)
    const rule = exceeded(user, anon)
    if (rule !== undefined) {
      const isRefused = config.MERGE_GUARD === 'refuse'
      metrics.mergeGuard(rule, isRefused ? 'refused' : 'warned')
      if (isRefused) return suspicious(rule)
      log.warn({ insert_id: insertId, rule }, 'suspicious identity')
    }
    makeRoom(pairs, maxPairs, remove)
    const pair = { user, anon, usedAt: now, inFlight: 1, isKept: false }
    pairs.set(name, pair)
    add(user, 1)
    add(anon, 1)
    return pair
  }

  return {
    /** Resolves with the verdict of `send`, or of an event that merges with `suspicious_identity`, without sending. */
    async run (event: PendingEvent, send: () => Promise<Verdict>): Promise<Verdict> {
      if (event.anonKey === undefined) return send()
      const pair = reserve(event, event.anonKey)
      if ('code' in pair) return pair
      try {
        const verdict = await send()
        pair.isKept ||= verdict.taken !== 'no'
        return verdict
      } finally {
        pair.inFlight--
        const name = pair.user + pair.anon
        if (pair.inFlight === 0 && !pair.isKept && pairs.get(name) === pair) remove(name, pair)
      }
    }
  }
}

function suspicious (rule: string): Verdict {
  const reason = rule === 'MAX_ANON_PER_USER'
    ? `The user already has as many anonymous ids as ${rule} allows; nothing was sent.`
    : `The anonymous id already has as many users as ${rule} allows; nothing was sent.`
  return { code: 'suspicious_identity', taken: 'no', cause: rule, reason }
}
