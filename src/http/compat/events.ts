import { isUtf8 } from 'node:buffer'
import type { FastifyRequest } from 'fastify'
import { isOpenLoopback, type Config } from '../../config.ts'
import type { PendingEvent } from '../../identity/event.ts'
import { scanEvent } from '../../identity/event-text.ts'
import type { IdentityRules } from '../../identity/identity.ts'
import { isVerb, mergeOf, type SdkEvent } from '../../identity/merge.ts'
import { refuseMerge } from '../../identity/merge-rules.ts'
import { sdkEvent } from '../../identity/sdk-event.ts'
import type { EventKind } from '../../metrics.ts'
import { outline } from '../json.ts'
import { checkIdentity } from '../validation.ts'
import { firstSign, isJson } from './form.ts'

/** Mixpanel's own bounds on one request and on one event. */
export const MAX_EVENTS = 2000
const MAX_EVENT_BYTES = 1_000_000

/** An event that repeats its token more often is longer with the real one than any bound says. */
const MAX_TOKENS = 10

/** An event of an SDK, or why it is refused. */
export interface Parsed { kind: EventKind, event?: PendingEvent, refusal?: EventRefusal }

interface EventRefusal {
  code: 'invalid_event' | 'not_forwarded' | 'invalid_identity' | 'forbidden'
  reason: string
}

/**
 * Returns where each event is in `data`, which is one object or an array: its start and its end, two numbers each. It
 * does not parse them.
 */
export function locateEvents (data: Buffer): number[] | 'unreadable' | 'too_many' {
  if (!isJson(data)) return 'unreadable'
  if (firstSign(data) === '{') return [0, data.length]
  const found = outline(data, MAX_EVENTS, 1)
  if (found === undefined) return 'too_many'
  return isList(found.text) ? found.bounds : 'unreadable'
}

/** Returns true for the text of a list of numbers, which stand for events. */
const isList = (text: string) => /^\[[\d,\s]*\]$/.test(text.trim())

interface Options {
  config: Config
  rules: IdentityRules
  /** Called with each token that an event names. */
  onToken: (token: string) => void
}

/** Returns a function that reads one event and decides whether it may go on. `ip` is for an event without one. */
export function createEventReader ({ config, rules, onToken }: Options) {
  const isOpen = isOpenLoopback(config)
  const needsInsertId = config.MIXPANEL_ENDPOINT === 'import'

  return (request: FastifyRequest, bytes: Buffer, ip: string | undefined): Parsed => {
    if (bytes.length > MAX_EVENT_BYTES) return invalid(`must have at most ${MAX_EVENT_BYTES} bytes`)
    const utf8 = isUtf8(bytes) ? bytes : joinSurrogates(bytes)
    // Node would decode other bytes as U+FFFD, and two ids could become one.
    if (!isUtf8(utf8)) return invalid('must be UTF-8')
    const text = utf8.toString().trim()
    const event = parse(text)
    if (event === undefined) return invalid('must be JSON, an object with event and properties')
    const found = scanEvent(text)
    if (found.repeated !== undefined) return invalid(`${found.repeated} must stand once`)
    if (found.isTooDeep) return invalid('must not be nested so deep')
    if (found.tokens.length > MAX_TOKENS) return invalid(`properties.token must stand at most ${MAX_TOKENS} times`)
    if (event.event === '$merge') return refused('ordinary', 'not_forwarded', '$merge is not an event of this path')
    if (needsInsertId && config.MIXPANEL_ID_MERGE === 'simplified' && isVerb(event)) {
      return refused('ordinary', 'not_forwarded', `${event.event} has no effect with Simplified ID Merge`)
    }
    const merge = mergeOf(event, config)
    const kind = merge?.kind ?? 'ordinary'
    if (merge === undefined && config.COMPAT === 'identify') {
      return refused(kind, 'not_forwarded', 'COMPAT=identify forwards events that merge alone')
    }
    const { userId, kind: callerKind } = request.caller
    const merger = { userId, isService: isOpen || callerKind === 'key' }
    const refusal = merge && refuseMerge(merge, identity => checkIdentity(request, rules, identity), merger)
    if (refusal !== undefined) return { kind, refusal }
    if (typeof event.properties.token === 'string') onToken(event.properties.token)
    return { kind, event: sdkEvent(text, found, event, { merge, ip, needsInsertId, now: Date.now() }) }
  }
}

const refused = (kind: EventKind, code: EventRefusal['code'], reason: string): Parsed =>
  ({ kind, refusal: { code, reason } })
const invalid = (reason: string) => refused('invalid', 'invalid_event', reason)

/** Returns the event in a text; undefined if it has none. */
function parse (text: string): SdkEvent | undefined {
  try {
    const value = JSON.parse(text)
    const { event, properties } = Object(value)
    const isEvent = typeof event === 'string' && event !== '' && typeof properties === 'object' &&
      properties !== null && !Array.isArray(properties) && !Array.isArray(value)
    return isEvent ? value : undefined
  } catch {
    return undefined
  }
}

/**
 * Returns bytes in which each character beyond the BMP has its UTF-8 form: the JavaScript SDK encodes its two halves.
 * Half a character, which remains where it cuts a string, becomes an escape of JSON.
 */
function joinSurrogates (bytes: Buffer): Buffer {
  const text = bytes.toString('latin1').replace(SURROGATES, found => {
    const units = Array.from(found.matchAll(/\xed([\xa0-\xbf])([\x80-\xbf])/g), ([, high = '', low = '']) =>
      0xD000 | (high.charCodeAt(0) & 0x3F) << 6 | (low.charCodeAt(0) & 0x3F))
    return units.length === 2
      ? Buffer.from(String.fromCharCode(...units)).toString('latin1')
      : `\\u${Number(units[0]).toString(16)}`
  })
  return Buffer.from(text, 'latin1')
}

const SURROGATES = /\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]|\xed[\xa0-\xbf][\x80-\xbf]/g
