import type { LedgerOutcome, Row } from './ledger.ts'

/** The properties that Mixpanel adds to a stored event. Where they stand in an export is documented only as "all". */
function addedProperties ({ outcome, failure_description: description, properties }: Row): Record<string, unknown> {
  if (outcome.startsWith('err')) {
    return '$device_id' in properties
      ? { $identity_failure_reason: outcome }
      : { $failure_reason: outcome, $failure_description: description }
  }
  // Seen live after a merge: the export has the canonical id, and the id of the request in this property.
  return outcome === 'merged' ? { $distinct_id_before_identity: properties.distinct_id } : {}
}

/** Events that never reach the project, or that it drops. */
const LOST: LedgerOutcome[] = ['unknown_token', 'wrong_region', 'ignored']

/** Returns the event of a row as an export has it; undefined if the project does not have it. */
export function exported (row: Row): { event: unknown, properties: Record<string, unknown> } | undefined {
  const { event, properties, outcome } = row
  return LOST.includes(outcome) ? undefined : { event, properties: { ...properties, ...addedProperties(row) } }
}

interface Query { from_date?: string, to_date?: string, event?: string }

/**
 * Returns the lines of a raw export: the rows of the days `from_date` to `to_date` (UTC) with one of the names in
 * `event`, a JSON array. Like Mixpanel it has duplicates, and not yet the rows of the last `lagMs`.
 */
export function * exportLines (rows: readonly Row[], query: Query, lagMs: number): Generator<string> {
  const names = query.event === undefined ? undefined : JSON.parse(query.event) as unknown[]
  const until = Date.now() - lagMs
  for (const row of rows) {
    const { event, properties, arrived } = row
    const day = new Date(Number(properties.time) * 1000).toISOString().slice(0, 10)
    const isAsked = names === undefined || names.includes(event)
    const isInRange = day >= String(query.from_date) && day <= String(query.to_date)
    const line = exported(row)
    if (isAsked && isInRange && line !== undefined && arrived <= until) yield `${JSON.stringify(line)}\n`
  }
}
