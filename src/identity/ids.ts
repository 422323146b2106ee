/** Values that Mixpanel does not treat as ids, and the results of common mistakes in JavaScript; in lower case. */
const JUNK_IDS = new Set([
  '', 'anon', 'anonymous', 'nil', 'none', 'null', 'n/a', 'na', 'nan', 'undefined', 'unknown', '<nil>', '-1', 'true',
  'false', '[]', '{}'
])

/** The start of a placeholder that may be long: wrapped, an object, or zeros. The others are shorter than LONG. */
const LONG_START = /^[\s"'([0-]/
const LONG = 16

/** Mixpanel cuts ids and names there, and two long ids would become one. */
export const MAX_ID_BYTES = 255

/** Characters that a person does not see at the end of an id, for a character class with the flag `u`. */
export const INVISIBLE = '\\s\\u00AD\\u180E\\u200B-\\u200F\\u202A-\\u202E\\u2060-\\u206F\\u2800\\uFEFF'

/** A rule of both ids, for their schemas. */
export const NO_CONTROL_CHARACTERS = {
  pattern: '^[^\\p{Cc}\\p{Cs}]*$', description: 'must not contain control characters or lone surrogates'
}

/**
 * Returns true for a placeholder that many users would share: a junk value, `[object …]`, only zeros, or any of these
 * in one pair of quotes or parentheses. A schema refuses white space at the end.
 */
export function isJunkId (id: string): boolean {
  // Nearly all ids end here.
  if (id.length >= LONG && !LONG_START.test(id)) return false
  const text = unwrap(id.toLowerCase())
  return JUNK_IDS.has(text) || /^\[object .*\]$/.test(text) || /^(?:0x)?[0-]*0[0-]*$/.test(text)
}

/** Returns true if both ids name one device: the prefix and the case make no difference. */
export function isSameDevice (one: string, other: string): boolean {
  return deviceKey(one) === deviceKey(other)
}

/** Returns an anonymous id without the prefix that Mixpanel's SDKs add. */
export function withoutPrefix (id: string): string {
  return id.startsWith('$device:') ? id.slice('$device:'.length) : id
}

/** Returns an anonymous id without its prefix, in lower case. */
export function deviceKey (id: string): string {
  return withoutPrefix(id.toLowerCase())
}

/** Returns true if `text` is too long for Mixpanel, which counts bytes. */
export const isTooLong = (text: string) => text.length * 3 > MAX_ID_BYTES && Buffer.byteLength(text) > MAX_ID_BYTES

function unwrap (text: string): string {
  return (/^(?:"(.*)"|'(.*)'|\((.*)\))$/s.exec(text)?.slice(1).find(inner => inner !== undefined) ?? text).trim()
}
