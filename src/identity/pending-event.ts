/**
 * An event that waits for Mixpanel. It never changes, so a repeat has the same bytes. It holds no token; the client
 * adds it to each request.
 */
export interface PendingEvent {
  /** `{"event":…,"properties":{…}}` */
  readonly json: string
  /** `json` without its last two braces, percent-encoded, if the event has that at a low cost. */
  readonly encoded?: string
  /** The length of `json` in UTF-8. */
  readonly bytes: number
  /** The user's id, as the caller gave it; empty for an event without one. */
  readonly userId: string
  /**
   * Equal for all spellings of an anonymous id: Mixpanel's SDKs add `$device:`, and a UUID has no case. In projects
   * with Simplified ID Merge case matters. Undefined for an event of an SDK that does not merge: it has no order.
   */
  readonly anonKey: string | undefined
  /** Empty for an event of an SDK without one. */
  readonly insertId: string
  /** Seconds since the epoch. */
  readonly time: number
  /** Of an event of an SDK: the offsets in `json` of each mark that the token replaces. */
  readonly tokenAt?: readonly number[]
}

/** An event of this many bytes is held in a buffer. */
const LARGE_BYTES = 8192

/** Returns a pending event with these facts. A literal is cheaper than a spread: each identity makes one. */
export function frozen<Key extends string | undefined> (
  json: string, userId: string, anonKey: Key, insertId: string, time: number, tokenAt?: readonly number[]
): PendingEvent & { readonly anonKey: Key } {
  const bytes = Buffer.byteLength(json)
  const sdk = tokenAt && { tokenAt }
  if (bytes === json.length && bytes < LARGE_BYTES) {
    return Object.freeze(sdk === undefined
      ? { json, bytes, userId, anonKey, insertId, time }
      : { json, bytes, userId, anonKey, insertId, time, ...sdk })
  }
  // V8 does not move bytes outside its heap. A string with any character beyond Latin-1 has two bytes per character.
  const utf8 = Buffer.from(json)
  return Object.freeze({ get json () { return utf8.toString() }, bytes, userId, anonKey, insertId, time, ...sdk })
}
