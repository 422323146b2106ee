/** What Mixpanel makes of two ids. */
export type MergeOutcome =
  | 'merged' | 'repeat'
  | 'errSameIDs' | 'errAnonDistinctIdNonGUIDForm' | 'errAnonDistinctIdAssignedAlready' | 'errManyIDs'

export interface Merge { outcome: MergeOutcome, failure_description?: string }

/** An anonymous id and the user that it merges with. */
export interface Pair { anon: string, user: string }
export interface RefusedPair extends Pair { reason: MergeOutcome, times: number }

/** The ids that Mixpanel takes for one user. */
export interface Cluster {
  id: number
  ids: Set<string>
  /** In the order of the merges. */
  pairs: Pair[]
  /** The last refused merges, each once. */
  refused: Map<string, RefusedPair>
  /** Larger than that of every cluster that changed earlier. */
  changed: number
}

export interface ClusterOptions { clusterMax?: number, maxIds?: number }

/** Refused merges that a cluster remembers. */
const MAX_REFUSED = 20

/**
 * The clusters of identities: the first user of an anonymous id wins, and merges are final. The limit of a cluster is
 * assumed: a live probe stopped at 501 members, not the documented 500. Beyond `maxIds` the clusters that have not
 * changed for longest are forgotten.
 */
export function createClusters ({ clusterMax = 501, maxIds = Infinity }: ClusterOptions = {}) {
  const owner = new Map<string, string>() // anonymous id → user
  const clusterOf = new Map<string, Cluster>()
  const byChange = new Set<Cluster>()
  let changes = 0
  let created = 0
  let held = 0 // ids and refused merges

  function ensure (id: string): Cluster {
    const found = clusterOf.get(id)
    if (found !== undefined) return found
    return include({ id: ++created, ids: new Set(), pairs: [], refused: new Map(), changed: 0 }, id)
  }

  function include (cluster: Cluster, id: string): Cluster {
    clusterOf.set(id, cluster)
    cluster.ids.add(id)
    held++
    return cluster
  }

  function touch (cluster: Cluster): void {
    byChange.delete(cluster)
    cluster.changed = ++changes
    byChange.add(cluster)
    for (const oldest of byChange) {
      if (held > maxIds && oldest !== cluster) forget(oldest)
      else break
    }
  }

  function forget (cluster: Cluster): void {
    byChange.delete(cluster)
    held -= cluster.ids.size + cluster.refused.size
    for (const id of cluster.ids) clusterOf.delete(id)
    for (const { anon } of cluster.pairs) owner.delete(anon)
  }

  function addRefused (cluster: Cluster, refused: RefusedPair): void {
    const { refused: known } = cluster
    held -= known.size
    const key = JSON.stringify([refused.anon, refused.user, refused.reason])
    const times = (known.get(key)?.times ?? 0) + refused.times
    known.delete(key)
    known.set(key, { ...refused, times })
    for (const oldest of known.keys()) {
      if (known.size <= MAX_REFUSED) break
      known.delete(oldest)
    }
    held += known.size
  }

  /** Moves the smaller of two clusters into the larger one, and returns that. */
  function unite (one: Cluster, other: Cluster): Cluster {
    if (one === other) return one
    const [large, small] = one.ids.size > other.ids.size ? [one, other] : [other, one]
    for (const id of small.ids) {
      large.ids.add(id)
      clusterOf.set(id, large)
    }
    large.pairs.push(...small.pairs)
    held -= small.refused.size
    for (const refused of small.refused.values()) addRefused(large, refused)
    byChange.delete(small)
    return large
  }

  function refuse (pair: Pair, reason: MergeOutcome, description: string): Merge {
    // An anonymous id that has a user shows there which other users claimed it.
    const cluster = ensure(owner.has(pair.anon) ? pair.anon : pair.user)
    addRefused(cluster, { ...pair, reason, times: 1 })
    touch(cluster)
    return { outcome: reason, failure_description: description }
  }

  return {
    refuse,

    merge (anon: string, user: string): Merge {
      const pair = { anon, user }
      const current = owner.get(anon)
      if (current === user) return { outcome: 'repeat' }
      if (current !== undefined) {
        return refuse(pair, 'errAnonDistinctIdAssignedAlready', `$anon_distinct_id already identified: ${anon}`)
      }
      const [one, other] = [clusterOf.get(anon), clusterOf.get(user)]
      const members = one !== undefined && one === other ? 0 : (one?.ids.size ?? 1) + (other?.ids.size ?? 1)
      if (members > clusterMax) {
        const description = `too many distinctIDs mapped together, Cluster size: ${members} Max limit: 500`
        return refuse(pair, 'errManyIDs', description)
      }
      owner.set(anon, user)
      // Nearly every anonymous id is new, and needs no cluster of its own first.
      const cluster = one === undefined ? include(ensure(user), anon) : unite(one, ensure(user))
      cluster.pairs.push(pair)
      touch(cluster)
      return { outcome: 'merged' }
    },

    /** Returns the number of clusters and the last `count` that changed, oldest change first. */
    recent (count: number): { total: number, clusters: Cluster[] } {
      return { total: byChange.size, clusters: [...byChange].slice(-count) }
    },

    clear (): void {
      for (const map of [owner, clusterOf, byChange]) map.clear()
      held = 0
    }
  }
}
