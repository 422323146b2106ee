import { hash, randomUUID } from 'node:crypto'
import { scanEvent, type EventText } from './event-text.ts'
import { deviceKey, withoutPrefix } from './ids.ts'
import { mergeOf, type Merge, type MergeKind, type SdkEvent } from './merge.ts'
import { frozen, type PendingEvent } from './pending-event.ts'

/** What stands for the token in the text of an SDK's event. It tells how the event merges. All have one length. */
const MARKS = { ordinary: '"o"', identify: '"i"', alias: '"a"', association: '"d"' } as const
export const MARK_LENGTH = MARKS.ordinary.length

interface SdkOptions {
  /** How it merges, if it does. */
  merge?: Pick<Merge, 'kind'> | undefined
  /** The value of its `ip`, unless it has one. */
  ip?: string | undefined
  /** True if each event must have an `$insert_id`, as on `/import`. */
  needsInsertId?: boolean
  /** When it arrived, in ms since the epoch. */
  now: number
}

/**
 * Returns the event of an SDK, byte for byte but for the token. It gets the time of its arrival if it has none, and an
 * `$insert_id` made of its bytes if something in them is unique: then a repeat of the SDK is harmless.
 */
export function sdkEvent (
  text: string, found: EventText, { event, properties, ...siblings }: SdkEvent,
  { merge, ip, needsInsertId = false, now }: SdkOptions
): PendingEvent {
  const mark = MARKS[merge?.kind ?? 'ordinary']
  const { tokens, inside, isEmpty } = found
  const added: string[] = []
  if (!Object.hasOwn(properties, 'time')) added.push(`"time":${Math.floor(now / 1000)}`)
  let { $insert_id: insertId } = properties
  if (!Object.hasOwn(properties, '$insert_id')) {
    if (isUnique(properties, siblings)) insertId = hash('sha256', withoutTokens(text, found)).slice(0, 32)
    else if (needsInsertId) insertId = randomUUID()
    if (insertId !== undefined) added.push(`"$insert_id":"${insertId}"`)
  }
  if (ip !== undefined && !Object.hasOwn(properties, 'ip')) added.push(`"ip":${JSON.stringify(ip)}`)

  const tokenAt: number[] = []
  let json = text.slice(0, inside)
  const putMark = () => {
    tokenAt.push(json.length)
    json += mark
  }
  if (tokens.length === 0) {
    json += '"token":'
    putMark()
  }
  json += `${tokens.length === 0 && added.length > 0 ? ',' : ''}${added.join()}`
  if (!isEmpty && json.length > inside) json += ','
  let from = inside
  for (const [start, end] of tokens) {
    json += text.slice(from, start)
    putMark()
    from = end
  }
  json += text.slice(from)
  return pendingSdkEvent(json, tokenAt, { event, properties, insertId, now }, merge?.kind)
}

/** Returns true if no other event has the same bytes: it has an id of its own, or a time finer than a second. */
function isUnique ({ time }: SdkEvent['properties'], { $mp_metadata: metadata }: Record<string, unknown>): boolean {
  const hasId = typeof (metadata as { $mp_event_id?: unknown } | null | undefined)?.$mp_event_id === 'string'
  return hasId || (typeof time === 'number' && (time > MAX_SECONDS || !Number.isInteger(time)))
}

/** Returns the text of an event without its tokens, which may change between two repeats. */
function withoutTokens (text: string, { tokens }: EventText): string {
  let rest = ''
  let from = 0
  for (const [start, end] of tokens) {
    rest += text.slice(from, start)
    from = end
  }
  return rest + text.slice(from)
}

/** A larger time is in milliseconds. */
const MAX_SECONDS = 1e11

function pendingSdkEvent (
  json: string, tokenAt: number[], { insertId, now, ...event }: SdkEvent & { insertId: unknown, now: number },
  kind: MergeKind | undefined
): PendingEvent {
  const { time: given, $user_id: user, distinct_id: distinct } = event.properties
  const seconds = typeof given === 'number' ? Math.floor(given > MAX_SECONDS ? given / 1000 : given) : now / 1000
  const mode = kind === 'association' ? 'simplified' : 'original'
  const merge = kind && mergeOf(event, { MIXPANEL_ID_MERGE: mode })
  const ids = (merge?.identity ?? {}) as { identified_id?: string, anon_id?: string }
  const anonKey = ids.anon_id && (kind === 'association' ? withoutPrefix(ids.anon_id) : deviceKey(ids.anon_id))
  const userId = ids.identified_id ?? [user, distinct].find(id => typeof id === 'string') as string | undefined ?? ''
  return frozen(json, userId, anonKey, typeof insertId === 'string' ? insertId : '', Math.floor(seconds), tokenAt)
}

/** Returns the event of an SDK that was stored as `json`. */
export function storedSdkEvent (json: string, event: SdkEvent): PendingEvent {
  const mark = JSON.stringify(event.properties.token)
  const kind = (['identify', 'alias', 'association'] as const).find(name => MARKS[name] === mark)
  const { event: name, properties } = event
  const facts = { event: name, properties, insertId: properties.$insert_id, now: Date.now() }
  return pendingSdkEvent(json, scanEvent(json).tokens.map(([start]) => start), facts, kind)
}
