import { isDeepStrictEqual } from 'node:util'
import type { Row } from '../src/sandbox/ledger.ts'

/** One request as its caller saw it; without a status he does not know what became of it. */
export interface Call {
  identity: { identified_id: string, anon_id: string, properties: Record<string, unknown> }
  status?: number
}

/**
 * What a run may bring about: `repeats`, how many events more than one of an identity may have come (the relay's own
 * repeats, and what was in flight at a kill); `dead`, the identified ids that are dead letters; `doubtful`, how many 503
 * may have arrived all the same, because the outbox's store died between keeping and saying so.
 */
export interface Allowance { repeats?: number, dead?: Iterable<string>, doubtful?: number }

/**
 * "Nothing lost", in one place: what the callers were told, in the order in which they were told it, against what
 * Mixpanel got, in the order in which it came. A sentence for everything that is not true of
 *
 * - who was told 200 or 202 has arrived (or is a dead letter, by its identified id), with the very same payload;
 * - who was told that it was not sent, nor kept (4xx, 429, 503), has not;
 * - what came more than once is the same to the last byte, and no more often than allowed;
 * - the first who was told 200 or 202 for an anonymous id is the first of whom Mixpanel heard.
 */
export function violations (calls: Call[], rows: readonly Row[], { repeats = 0, dead = [], doubtful = 0 }: Allowance = {}): string[] {
  const broken: string[] = []
  const letters = new Set(dead)
  const arrived = new Map<string, Row[]>()
  const firsts = new Map<unknown, unknown>()
  for (const row of rows) {
    const id = String(row.properties.$identified_id)
    arrived.set(id, [...arrived.get(id) ?? [], row])
    if (!firsts.has(row.properties.$anon_id)) firsts.set(row.properties.$anon_id, id)
  }

  const claimed = new Set<string>()
  let extra = 0
  let doubts = 0
  for (const { identity: { identified_id: id, anon_id: anon, properties }, status } of calls) {
    const [first, ...others] = arrived.get(id) ?? []
    const isKept = status === 200 || status === 202
    if (isKept && first === undefined && !letters.has(id)) broken.push(`${id} was told ${status} and is lost`)
    if (status === 503 && first !== undefined && doubts < doubtful) doubts++
    else if (status !== undefined && first !== undefined && ((status >= 400 && status < 500) || status === 503)) {
      broken.push(`${id} was told ${status} and has arrived`)
    }
    if (first !== undefined) {
      const { time, $insert_id: insertId, ...rest } = first.properties
      const sent = { ...properties, distinct_id: id, $identified_id: id, $anon_id: anon }
      if (!isDeepStrictEqual(rest, sent) || first.event !== '$identify') broken.push(`${id} arrived as ${JSON.stringify(first)}`)
      if (others.some(other => JSON.stringify(other.properties) !== JSON.stringify(first.properties))) {
        broken.push(`${id} arrived in two forms`)
      }
      extra += others.length
    }
    // Where an earlier claim ended unknown, nobody can say who must be first.
    if (!claimed.has(anon) && isKept && !letters.has(id) && firsts.get(anon) !== id) {
      broken.push(`${id} claimed ${anon} first, but ${firsts.get(anon)} arrived first`)
    }
    if (isKept || status === undefined || status >= 500) claimed.add(anon)
  }
  if (extra > repeats) broken.push(`${extra} arrived once more, ${repeats} were allowed`)
  const known = new Set(calls.map(({ identity }) => identity.identified_id))
  for (const id of arrived.keys()) if (!known.has(id)) broken.push(`${id} arrived, and nobody sent it`)
  return broken
}
