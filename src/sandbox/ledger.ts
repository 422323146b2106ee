import { createClusters, type ClusterOptions, type Merge, type MergeOutcome } from './clusters.ts'

/** The outcome of an event at Mixpanel, by Mixpanel's own name if it has one. Never part of an HTTP answer. */
export type LedgerOutcome =
  | 'stored' | 'ignored' | 'unknown_token' | 'wrong_region' | 'identify_incomplete'
  | 'ignored_simplified' | 'not_applicable' | MergeOutcome

export type Mode = 'original' | 'simplified' | 'legacy'
export const isMode = (text: string): text is Mode => ['original', 'simplified', 'legacy'].includes(text)

export interface MixpanelEvent { event?: unknown, properties?: Record<string, unknown> }

/** An event that an endpoint accepted: without the token, strings cut to 255 characters as Mixpanel stores them. */
export interface Row {
  endpoint: 'track' | 'import'
  event: unknown
  properties: Record<string, unknown>
  outcome: LedgerOutcome
  failure_description?: string
  /** When it arrived, in ms since the epoch. */
  arrived: number
}

/** Beyond `maxBytes` of JSON the oldest rows are dropped. */
export interface LedgerOptions extends ClusterOptions {
  mode?: Mode
  anonFormat?: 'strict' | 'lenient'
  maxBytes?: number
}

type Outcome = Pick<Row, 'outcome' | 'failure_description'>

const ANON_FORMATS = {
  // The pattern of the official PHP library: until 2025, JavaScript ids had five groups but were no UUIDs.
  lenient: /^(\$device:)?[a-z0-9]+-[a-z0-9]+-[a-z0-9]+-[a-z0-9]+-[a-z0-9]+$/i,
  strict: /^(\$device:)?[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/i
}

/**
 * The identity rules: refusals are silent. With Original ID Merge only `$identify` merges, with Simplified ID Merge
 * only other events do. `add` takes events that an endpoint accepted.
 */
export function createLedger (options: LedgerOptions = {}) {
  const { mode = 'original', anonFormat = 'lenient', maxBytes = Infinity } = options
  const clusters = createClusters(options)
  let rows: Row[] = []
  let sizes: number[] = []
  let bytes = 0
  let dropped = 0

  function identify (properties: Record<string, unknown>): Outcome {
    const { $identified_id: identified, $anon_distinct_id: previous, distinct_id: distinct } = properties
    // The JavaScript SDK and those of phones name the user by distinct_id alone.
    const user = identified ?? (previous === undefined ? undefined : distinct)
    const anon = properties.$anon_id ?? previous
    if (mode === 'simplified') return { outcome: 'ignored_simplified' }
    if (mode === 'legacy') return { outcome: 'not_applicable' }
    // Assumption: Mixpanel's real answer to an incomplete $identify is unknown.
    if (typeof user !== 'string' || typeof anon !== 'string') return { outcome: 'identify_incomplete' }
    if (anon === user) {
      const description = `Identified and anon ID are same in the identify request ${anon}`
      return clusters.refuse({ anon, user }, 'errSameIDs', description)
    }
    if (!ANON_FORMATS[anonFormat].test(anon)) {
      const description = `$anon_distinct_id didn't match expected GUID pattern: ${anon}`
      return clusters.refuse({ anon, user }, 'errAnonDistinctIdNonGUIDForm', description)
    }
    return clusters.merge(anon, user)
  }

  /** Mixpanel strips one prefix. An event without both ids merges nothing. */
  function associate (properties: Record<string, unknown>): Merge | { outcome: 'stored' } {
    return mode === 'simplified' && hasBothIds(properties)
      ? clusters.merge(properties.$device_id.replace(/^\$device:/, ''), properties.$user_id)
      : { outcome: 'stored' }
  }

  /** Drops a quarter of the bytes at once, because each removal moves all other rows. */
  function dropOldest (): void {
    let count = 0
    for (const size of sizes) {
      if (bytes <= maxBytes * 0.75) break
      bytes -= size
      count++
    }
    rows.splice(0, count)
    sizes.splice(0, count)
    dropped += count
  }

  return {
    add (endpoint: Row['endpoint'], { event, properties = {} }: MixpanelEvent, outcome?: LedgerOutcome): void {
      const { token, ...visible } = properties
      const stored = Object.fromEntries(Object.entries(visible)
        .map(([name, value]) => [name, typeof value === 'string' ? cut(value) : value]))
      const found = outcome !== undefined
        ? { outcome }
        : event === '$identify' ? identify(stored) : associate(stored)
      rows.push({ endpoint, event, properties: stored, ...found, arrived: Date.now() })
      if (maxBytes === Infinity) return
      const size = JSON.stringify([event, stored]).length
      sizes.push(size)
      bytes += size
      if (bytes > maxBytes) dropOldest()
    },
    /** Returns every row that is kept, in order of arrival. `clear` replaces the array. */
    rows: (): readonly Row[] => rows,
    /** Returns the number of rows that were dropped since the start or the last `clear`. */
    dropped: (): number => dropped,
    /** Returns the rows as queries see them: the first of those with equal event, distinct_id, time and $insert_id. */
    deduplicated (): Row[] {
      const seen = new Set<string>()
      return rows.filter(row => {
        const key = keyOf(row)
        return !seen.has(key) && seen.add(key)
      })
    },
    clusters: clusters.recent,
    clear (): void {
      [rows, sizes, bytes, dropped] = [[], [], 0, 0]
      clusters.clear()
    }
  }
}

/** Returns what is equal for two rows that queries count once. */
export const keyOf = ({ event, properties: { distinct_id: id, time, $insert_id: insertId } }: Row): string =>
  JSON.stringify([event, id, time, insertId])

interface BothIds { $user_id: string, $device_id: string }

/** Returns true for properties with both ids of Simplified ID Merge. */
export function hasBothIds (properties: Record<string, unknown>): properties is Record<string, unknown> & BothIds {
  return [properties.$user_id, properties.$device_id].every(id => typeof id === 'string' && id !== '')
}

/** Returns the first 255 characters. A slice would keep the whole text in memory, so they are a copy. */
export const cut = (text: string): string =>
  text.length <= 255 ? text : Buffer.from(text.slice(0, 255), 'utf16le').toString('utf16le')
