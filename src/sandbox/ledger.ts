/** The outcome of an event at Mixpanel, by Mixpanel's own name if it has one. Never part of an HTTP answer. */
export type LedgerOutcome =
  | 'stored' | 'ignored' | 'unknown_token' | 'wrong_region' | 'identify_incomplete'
  | 'ignored_simplified' | 'not_applicable'
  | 'merged' | 'repeat'
  | 'errSameIDs' | 'errAnonDistinctIdNonGUIDForm' | 'errAnonDistinctIdAssignedAlready' | 'errManyIDs'

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

export interface LedgerOptions { mode?: Mode, anonFormat?: 'strict' | 'lenient', clusterMax?: number }

const ANON_FORMATS = {
  // The pattern of the official PHP library: until 2025, JavaScript ids had five groups but were no UUIDs.
  lenient: /^(\$device:)?[a-z0-9]+-[a-z0-9]+-[a-z0-9]+-[a-z0-9]+-[a-z0-9]+$/i,
  strict: /^(\$device:)?[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/i
}

/**
 * The identity rules: the first user of an anonymous id wins, merges are final, refusals are silent. With Original ID
 * Merge only `$identify` merges, with Simplified ID Merge only other events do. `add` takes events that an endpoint
 * accepted. The cluster limit is assumed: a live probe stopped at 501 members, not the documented 500.
 */
export function createLedger ({ mode = 'original', anonFormat = 'lenient', clusterMax = 501 }: LedgerOptions = {}) {
  let rows: Row[] = []
  const owner = new Map<string, string>() // anon_id → identified_id
  const parent = new Map<string, string>()
  const size = new Map<string, number>()

  function root (id: string): string {
    let top = id
    for (let next = parent.get(top); next !== undefined; next = parent.get(top)) top = next
    return top
  }

  function identify (properties: Record<string, unknown>): Pick<Row, 'outcome' | 'failure_description'> {
    const identified = properties.$identified_id
    const anon = properties.$anon_id ?? properties.$anon_distinct_id
    if (mode === 'simplified') return { outcome: 'ignored_simplified' }
    if (mode === 'legacy') return { outcome: 'not_applicable' }
    // Assumption: Mixpanel's real answer to an incomplete $identify is unknown.
    if (typeof identified !== 'string' || typeof anon !== 'string') return { outcome: 'identify_incomplete' }
    if (anon === identified) {
      return failure('errSameIDs', `Identified and anon ID are same in the identify request ${anon}`)
    }
    if (!ANON_FORMATS[anonFormat].test(anon)) {
      return failure('errAnonDistinctIdNonGUIDForm', `$anon_distinct_id didn't match expected GUID pattern: ${anon}`)
    }
    return merge(anon, identified)
  }

  /** Mixpanel strips one prefix. An event without both ids merges nothing. */
  function associate (properties: Record<string, unknown>): Pick<Row, 'outcome' | 'failure_description'> {
    const { $user_id: user, $device_id: device } = properties
    const isPair = typeof user === 'string' && user !== '' && typeof device === 'string' && device !== ''
    return mode === 'simplified' && isPair ? merge(device.replace(/^\$device:/, ''), user) : { outcome: 'stored' }
  }

  function merge (anon: string, identified: string): Pick<Row, 'outcome' | 'failure_description'> {
    const current = owner.get(anon)
    if (current === identified) return { outcome: 'repeat' }
    if (current !== undefined) {
      return failure('errAnonDistinctIdAssignedAlready', `$anon_distinct_id already identified: ${anon}`)
    }
    const [one, other] = [root(anon), root(identified)]
    const members = one === other ? 0 : (size.get(one) ?? 1) + (size.get(other) ?? 1)
    if (members > clusterMax) {
      return failure('errManyIDs', `too many distinctIDs mapped together, Cluster size: ${members} Max limit: 500`)
    }
    owner.set(anon, identified)
    if (one !== other) {
      parent.set(one, other)
      size.set(other, members)
    }
    return { outcome: 'merged' }
  }

  return {
    add (endpoint: Row['endpoint'], { event, properties = {} }: MixpanelEvent, outcome?: LedgerOutcome): void {
      const { token, ...visible } = properties
      const stored = Object.fromEntries(Object.entries(visible)
        .map(([name, value]) => [name, typeof value === 'string' ? value.slice(0, 255) : value]))
      const found = outcome !== undefined
        ? { outcome }
        : event === '$identify' ? identify(visible) : associate(visible)
      rows.push({ endpoint, event, properties: stored, ...found, arrived: Date.now() })
    },
    /** Returns every row, in order of arrival. */
    rows: (): readonly Row[] => rows,
    /** Returns the rows as queries see them: the first of those with equal event, distinct_id, time and $insert_id. */
    deduplicated (): Row[] {
      const seen = new Set<string>()
      return rows.filter(({ event, properties: { distinct_id: id, time, $insert_id: insertId } }) => {
        const key = JSON.stringify([event, id, time, insertId])
        return !seen.has(key) && seen.add(key)
      })
    },
    clear (): void {
      rows = []
      for (const map of [owner, parent, size]) map.clear()
    }
  }
}

function failure (outcome: LedgerOutcome, description: string) {
  return { outcome, failure_description: description }
}
