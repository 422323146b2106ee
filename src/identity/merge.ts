import type { Config } from '../config.ts'

/** How an event of an SDK merges two ids. */
export type MergeKind = 'identify' | 'alias' | 'association'

/** An event as JSON has it. */
export interface SdkEvent { event: string, properties: Record<string, unknown> }

/** The two ids that an event merges, as `POST /identify` would get them, and the properties that hold them. */
export interface Merge {
  kind: MergeKind
  identity: { identified_id?: unknown, anon_id?: unknown }
  names: { identified_id: string, anon_id: string }
  /** Two properties that hold the same id and differ. */
  conflict?: [one: string, other: string] | undefined
}

/** The events with a meaning of their own, which `/import` refuses in projects with Simplified ID Merge. */
const VERBS = new Set(['$identify', '$create_alias', '$merge'])

/** Returns true for an event with a meaning of its own at Mixpanel. */
export const isVerb = ({ event }: Pick<SdkEvent, 'event'>) => VERBS.has(event)

/**
 * Returns how an event merges two ids; undefined for one that does not. With Original ID Merge only `$identify` and
 * `$create_alias` merge, with Simplified ID Merge every event that has both ids.
 */
export function mergeOf (
  { event, properties }: SdkEvent, { MIXPANEL_ID_MERGE: mode }: Pick<Config, 'MIXPANEL_ID_MERGE'>
): Merge | undefined {
  if (mode === 'simplified') return associationOf(properties)
  if (event === '$identify') return identifyOf(properties)
  if (event !== '$create_alias') return undefined
  return {
    kind: 'alias',
    identity: pick(properties, 'alias', 'distinct_id'),
    names: { identified_id: 'alias', anon_id: 'distinct_id' }
  }
}

/** The JavaScript, Swift and Android SDKs name the ids otherwise than the PHP library. */
function identifyOf (properties: SdkEvent['properties']): Merge {
  const users = given(properties, ['$identified_id', 'distinct_id', '$user_id'])
  const anons = given(properties, ['$anon_id', '$anon_distinct_id'])
  const [user = 'distinct_id', anon = '$anon_distinct_id'] = [users[0], anons[0]]
  const different = [users, anons].flatMap(([first = '', ...others]) =>
    others.filter(other => properties[other] !== properties[first]).map((other): [string, string] => [first, other]))
  return {
    kind: 'identify',
    identity: pick(properties, user, anon),
    names: { identified_id: user, anon_id: anon },
    conflict: different[0]
  }
}

/** Mixpanel takes a `distinct_id` with the prefix of devices for a `$device_id`. */
function associationOf (properties: SdkEvent['properties']): Merge | undefined {
  const { distinct_id: distinct, $device_id: given, $user_id: user } = properties
  const isDevice = typeof distinct === 'string' && /^\$device:/i.test(distinct)
  const device = isAbsent(given) && isDevice ? 'distinct_id' : '$device_id'
  if (isAbsent(user) || isAbsent(properties[device])) return undefined
  return {
    kind: 'association',
    identity: pick(properties, '$user_id', device),
    names: { identified_id: '$user_id', anon_id: device }
  }
}

const isAbsent = (value: unknown) => value === undefined || value === null

const given = (properties: SdkEvent['properties'], names: string[]) =>
  names.filter(name => Object.hasOwn(properties, name))

function pick (properties: SdkEvent['properties'], user: string, anon: string): Merge['identity'] {
  return {
    ...Object.hasOwn(properties, user) && { identified_id: properties[user] },
    ...Object.hasOwn(properties, anon) && { anon_id: properties[anon] }
  }
}
