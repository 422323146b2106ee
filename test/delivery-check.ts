import { isDeepStrictEqual } from 'node:util'
import type { Row } from '#src/sandbox/ledger.js'

/** One request as its caller saw it; without a status the outcome is unknown to the caller. */
export interface Call {
  identity: { identified_id: string, anon_id: string, properties: Record<string, unknown> }
  status?: number
  /** That of a problem. A balancer's own answer has none. */
  code?: string | undefined
}

/**
 * What a run may bring about: `repeats`, how many duplicate events may arrive (retries, and what was in flight when the
 * relay was killed); `dead`, the identified ids of the dead letters; `doubtful`, how many identities that got 503 may
 * have arrived, because the store died between the write and its answer.
 */
export interface Allowance { repeats?: number, dead?: Iterable<string>, doubtful?: number }

/**
 * "Nothing lost", in one place. Compares the answers of all calls, in order, with the events that Mixpanel received, in
 * order. Returns a sentence for each violation of these rules:
 *
 * - An identity that got 200 or 202 has arrived, or is a dead letter, and its payload is unchanged.
 * - An identity that got 4xx or 503 has not arrived.
 * - Duplicates are equal to the last byte, and no more than allowed.
 * - The first identity of an anonymous id that got 200 or 202 arrived before all others of that id.
 */
export function violations (calls: Call[], rows: readonly Row[], { repeats = 0, dead = [], doubtful = 0 }: Allowance = {}): string[] {
  const found: string[] = []
  const letters = new Set(dead)
  const arrived = new Map<string, Row[]>()
  const firsts = new Map<unknown, unknown>()
  for (const row of rows) {
    const id = String(row.properties.$identified_id)
    arrived.set(id, [...arrived.get(id) ?? [], row])
    if (!firsts.has(row.properties.$anon_id)) firsts.set(row.properties.$anon_id, id)
  }

  const taken = new Set<string>()
  let extra = 0
  let doubts = 0
  for (const { identity: { identified_id: id, anon_id: anon, properties }, status } of calls) {
    const [first, ...others] = arrived.get(id) ?? []
    const isPromised = status === 200 || status === 202
    if (isPromised && first === undefined && !letters.has(id)) found.push(`${id} got ${status} and is lost`)
    if (status === 503 && first !== undefined && doubts < doubtful) doubts++
    else if (status !== undefined && first !== undefined && ((status >= 400 && status < 500) || status === 503)) {
      found.push(`${id} got ${status} and has arrived`)
    }
    if (first !== undefined) {
      const { time, $insert_id: insertId, ...rest } = first.properties
      const sent = { ...properties, distinct_id: id, $identified_id: id, $anon_id: anon }
      if (!isDeepStrictEqual(rest, sent) || first.event !== '$identify') found.push(`${id} arrived as ${JSON.stringify(first)}`)
      if (others.some(other => JSON.stringify(other.properties) !== JSON.stringify(first.properties))) {
        found.push(`${id} arrived in two forms`)
      }
      extra += others.length
    }
    // After an earlier identity with an unknown outcome the order is unknown.
    if (!taken.has(anon) && isPromised && !letters.has(id) && firsts.get(anon) !== id) {
      found.push(`${id} was the first with ${anon}, but ${firsts.get(anon)} arrived first`)
    }
    if (isPromised || status === undefined || status >= 500) taken.add(anon)
  }
  if (extra > repeats) found.push(`${extra} duplicates arrived, ${repeats} were allowed`)
  const known = new Set(calls.map(({ identity }) => identity.identified_id))
  for (const id of arrived.keys()) if (!known.has(id)) found.push(`${id} arrived and was never sent`)
  return found
}
