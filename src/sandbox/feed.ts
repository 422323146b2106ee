import { viewOf, type EventView } from './event-view.ts'
import { exported } from './export.ts'
import type { createFaultScript } from './faults.ts'
import { hasBothIds, keyOf, type createLedger, type LedgerOutcome, type Mode, type Row } from './ledger.ts'
import type { Refusal, Refusals } from './refusals.ts'
import type { Cluster, Pair, RefusedPair } from './clusters.ts'

/** A row of the page's table. */
export interface FeedRow extends EventView {
  id: string
  arrived: number
  endpoint: string
  outcome: LedgerOutcome | 'fault' | 'refused'
  detail: string
  isDuplicate: boolean
  /** The first characters of the event in an export, as JSON; empty if Mixpanel has no such event. */
  filed: string
}

/** A cluster as the page draws it: its last pairs and refused merges, and how many pairs are before them. */
export interface ClusterView { id: number, pairs: Pair[], more: number, user: string, refused: RefusedPair[] }

/** `unmerged` are refused merges; `refused` are requests with a fault, and events that Mixpanel did not take. */
export interface Counts { events: number, duplicates: number, merged: number, unmerged: number, refused: number }

/** What changed since the last update, or everything. */
export interface Update {
  isWhole: boolean
  mode: Mode
  counts: Counts
  /** Oldest first. */
  rows: FeedRow[]
  /** `shown` has the id of every cluster that the page shows. */
  clusters: { total: number, shown: number[], changed: ClusterView[] }
  faults: { name: string, times: number }[]
  /** The setting to change if events arrive that the mode of the project ignores; else empty. */
  hint: string
}

export interface Sources {
  mode: Mode
  ledger: ReturnType<typeof createLedger>
  refusals: Refusals
  faults: ReturnType<typeof createFaultScript>
}

/** Bounds on what a page shows. */
const MAX_ROWS = 500
const MAX_CLUSTERS = 200
const MAX_PAIRS = 12
const MAX_FAULTS = 20
const MAX_FILED = 1000

const DETAILS: Record<LedgerOutcome, string> = {
  stored: 'An event that merges nothing.',
  merged: 'The ids are one user.',
  repeat: 'These ids had merged before.',
  ignored: 'Dropped, because of $ignore.',
  unknown_token: 'Lost: Mixpanel answers 1 to a wrong token too.',
  wrong_region: 'Lost: the project is in another region.',
  identify_incomplete: 'Nothing merged: an id is missing.',
  ignored_simplified: 'Nothing merged: Simplified ID Merge ignores $identify.',
  not_applicable: 'Nothing merged: the project has Legacy ID management.',
  errSameIDs: 'Not merged: the ids are equal.',
  errAnonDistinctIdNonGUIDForm: 'Not merged: the anonymous id has no known form.',
  errAnonDistinctIdAssignedAlready: 'Not merged: the anonymous id has another user.',
  errManyIDs: 'Not merged: the cluster has as many ids as Mixpanel permits.'
}

const HINTS: Record<Mode, string> = {
  original: 'This project has Original ID Merge, where only $identify merges: set MIXPANEL_ID_MERGE=original.',
  simplified: 'This project has Simplified ID Merge, which ignores $identify: set MIXPANEL_ID_MERGE=simplified.',
  legacy: 'This project has Legacy ID management, where the relay can merge nothing.'
}

/** What has been read from the sources. */
interface Position {
  rows: readonly Row[]
  nextRow: number
  dropped: number
  nextRefusal: number
  keys: Set<string>
  recent: FeedRow[]
  /** The clusters that the page shows, with their last change. */
  shown: Map<number, number>
  counts: Counts
  hint: string
}

/** The state of the sandbox for its pages. Between two calls it does no work. */
export function createFeed ({ mode, ledger, refusals, faults }: Sources) {
  let position: Position | undefined

  /** Reads what is new, and returns the last of it. */
  function readRows (at: Position): FeedRow[] {
    const dropped = ledger.dropped()
    const first = Math.max(at.nextRow - dropped, 0)
    // Without this the keys of dropped rows would stay for as long as a page is open.
    if (dropped > at.dropped) at.keys = new Set(at.rows.slice(0, first).map(keyOf))
    at.dropped = dropped
    const rows: FeedRow[] = []
    for (const [index, row] of at.rows.slice(first).entries()) {
      const key = keyOf(row)
      const isDuplicate = at.keys.has(key)
      at.keys.add(key)
      if (isDuplicate) at.counts.duplicates++
      if (row.outcome === 'merged') at.counts.merged++
      if (row.outcome.startsWith('err')) at.counts.unmerged++
      if (isForOtherMode(row)) at.hint = HINTS[mode]
      const number = dropped + first + index
      if (first + index >= at.rows.length - MAX_ROWS) rows.push(rowView(row, `row-${number}`, isDuplicate))
    }
    at.nextRow = dropped + at.rows.length
    return rows
  }

  function readRefusals (at: Position): FeedRow[] {
    const found = refusals.after(at.nextRefusal)
    at.nextRefusal = refusals.total()
    const first = at.nextRefusal - found.length
    return found.map((refusal, index) => refusalView(refusal, `refusal-${first + index}`))
  }

  function isForOtherMode ({ outcome, properties }: Row): boolean {
    if (mode === 'original') return outcome === 'stored' && hasBothIds(properties)
    return outcome === 'ignored_simplified' || outcome === 'not_applicable'
  }

  return {
    /** Returns what changed since the last call; everything after `clear` of the ledger, or if `isWhole`. */
    update (isWhole: boolean): Update {
      const isNew = position?.rows !== ledger.rows()
      const at = position = isNew || position === undefined ? start(ledger.rows()) : position
      const rows = [...readRows(at), ...readRefusals(at)]
        .sort((one, other) => one.arrived - other.arrived).slice(-MAX_ROWS)
      at.recent = [...at.recent, ...rows].slice(-MAX_ROWS)
      at.counts.events = at.nextRow
      at.counts.refused = at.nextRefusal
      const { total, clusters } = ledger.clusters(MAX_CLUSTERS)
      const changed = clusters.filter(({ id, changed }) => isWhole || at.shown.get(id) !== changed)
      at.shown = new Map(clusters.map(({ id, changed }) => [id, changed]))
      return {
        isWhole: isWhole || isNew,
        mode,
        counts: { ...at.counts },
        rows: isWhole ? at.recent : rows,
        clusters: { total, shown: [...at.shown.keys()], changed: changed.map(clusterView) },
        faults: faults.pending().slice(0, MAX_FAULTS),
        hint: at.hint
      }
    },
    /** Forgets what has been read. The next update is whole. */
    stop (): void {
      position = undefined
    }
  }
}

function start (rows: readonly Row[]): Position {
  const counts = { events: 0, duplicates: 0, merged: 0, unmerged: 0, refused: 0 }
  return {
    rows, nextRow: 0, dropped: 0, nextRefusal: 0, keys: new Set(), recent: [], shown: new Map(), counts, hint: ''
  }
}

function rowView (row: Row, id: string, isDuplicate: boolean): FeedRow {
  const { outcome, arrived, endpoint } = row
  const event = exported(row)
  const filed = event === undefined ? '' : JSON.stringify(event, null, 1).slice(0, MAX_FILED)
  return { ...viewOf(row), id, arrived, endpoint, outcome, detail: DETAILS[outcome], isDuplicate, filed }
}

function refusalView ({ kind, reason, endpoint, arrived, events }: Refusal, id: string): FeedRow {
  const views = events()
  const [view = viewOf({})] = views
  const many = views.length > 1 ? ` This is the first of ${views.length} events.` : ''
  return { ...view, id, arrived, endpoint, outcome: kind, detail: `${reason}.${many}`, isDuplicate: false, filed: '' }
}

function clusterView ({ id, ids, pairs, refused }: Cluster): ClusterView {
  const shown = pairs.slice(-MAX_PAIRS)
  const user = String(shown.at(-1)?.user ?? [...ids][0])
  return { id, user, pairs: shown, more: pairs.length - shown.length, refused: [...refused.values()] }
}
