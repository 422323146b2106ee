import type { MixpanelEvent } from './ledger.ts'

/** A record that fails Mixpanel's strict validation, with Mixpanel's message. */
export interface FailedRecord { index: number, insert_id: unknown, field: string, message: string }

const INVALID_IDS = new Set([
  '00000000-0000-0000-0000-000000000000', 'anon', 'anonymous', 'nil', 'none', 'null', 'n/a', 'na', 'undefined',
  'unknown', '<nil>', '0', '-1', 'true', 'false', '[]', '{}'
])
const YEAR_1971 = 31_536_000
const HOUR = 3600

/** Returns the records that strict validation refuses, with one reason each. `now` is in seconds since the epoch. */
export function failedRecords (events: MixpanelEvent[], now: number): FailedRecord[] {
  return events.flatMap((event, index) => {
    const [field, message] = fault(event, now) ?? []
    return field === undefined || message === undefined
      ? []
      : [{ index, insert_id: event.properties?.$insert_id, field, message }]
  })
}

function fault ({ event, properties: given }: MixpanelEvent, now: number): [string, string] | undefined {
  const properties = Object(given) as Record<string, unknown>
  const { time, distinct_id: id, $insert_id: insertId } = properties
  if (typeof event !== 'string' || event.trim() === '') return ['event', "'event' must not be missing or blank"]
  if (JSON.stringify({ event, properties }).length > 1_000_000) return ['event', 'event is larger than 1 MB']
  if (time === undefined) return ['properties.time', "'properties.time' is invalid: must not be missing"]
  const seconds = typeof time === 'number' && time > 1e11 ? time / 1000 : time
  if (typeof seconds !== 'number' || seconds < YEAR_1971) {
    return ['properties.time', "'properties.time' is invalid: must be specified as seconds since epoch"]
  }
  if (seconds > now + HOUR) return ['properties.time', "'properties.time' is invalid: must not be in the future"]
  if (id === undefined) return ['properties.distinct_id', "'properties.distinct_id' is invalid: must not be missing"]
  if (isInvalidId(id)) return ['properties.distinct_id', "'properties.distinct_id' is invalid: invalid id"]
  if (insertId === undefined) return ['$insert_id', "'$insert_id' is invalid: must not be missing"]
  if (typeof insertId !== 'string' || isInvalidId(insertId) || !/^[A-Za-z0-9-]{1,36}$/.test(insertId)) {
    return ['$insert_id', "'$insert_id' is invalid: must only contain alphanumeric or hyphen '-' characters"]
  }
  // Assumption: Mixpanel's messages for too many or too deep properties have not been recorded.
  return nestedFault(properties, 'properties', 1)
}

function nestedFault (value: unknown, field: string, depth: number): [string, string] | undefined {
  if (typeof value === 'string' && !value.isWellFormed()) {
    return [field, `${field} is invalid: string should be valid utf8`]
  }
  if (typeof value !== 'object' || value === null) return undefined
  if (depth > 4) return [field, `${field} is invalid: must not be nested deeper than 3 levels`]
  const entries = Object.entries(value)
  if (entries.length >= 255) return [field, `${field} is invalid: must have fewer than 255 elements`]
  for (const [name, inner] of entries) {
    const found = nestedFault(inner, `${field}.${name}`, depth + 1)
    if (found !== undefined) return found
  }
  return undefined
}

function isInvalidId (id: unknown): boolean {
  return INVALID_IDS.has(String(id).toLowerCase())
}
