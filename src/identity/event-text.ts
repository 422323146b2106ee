/** Where the JSON text of an SDK's event has what the relay replaces or adds, by offset. */
export interface EventText {
  /** The start and the end of each value of `properties.token`. */
  tokens: [start: number, end: number][]
  /** The offset behind the opening brace of `properties`. */
  inside: number
  /** True if `properties` has no member. */
  isEmpty: boolean
  /** A name of a member that stands twice although it decides what the event means. */
  repeated: string | undefined
  isTooDeep: boolean
}

/** Mixpanel reads three levels. */
const MAX_DEPTH = 100

/** Parsers differ in which of two members with one name counts, so an event must have each of these once. */
const DECISIVE = new Set([
  'event', 'properties', 'distinct_id', '$user_id', '$device_id', '$identified_id', '$anon_id', '$anon_distinct_id',
  'alias', 'time', '$insert_id', 'ip'
])

const [QUOTE, OPEN, CLOSE, OPEN_LIST, CLOSE_LIST] = Array.from('"{}[]', sign => sign.charCodeAt(0))
const SCALAR = /[^,\]}\s]*/y

/**
 * Returns the positions in the text of an event. The text must be JSON, an object whose `properties` are an object. It
 * is not printed again: a number beyond 2^53 keeps its digits.
 */
export function scanEvent (text: string): EventText {
  const found: EventText = { tokens: [], inside: 0, isEmpty: true, repeated: undefined, isTooDeep: false }
  const seen = new Set<string>()
  const mark = (name: string) => {
    if (seen.has(name)) found.repeated = name
    seen.add(name)
  }

  /** Calls `visit` for each member of the object at an offset. */
  function members (open: number, visit: (name: string, start: number, end: number) => void): void {
    for (let at = skipSpace(text, open + 1); text.charCodeAt(at) !== CLOSE; at = skipSpace(text, at)) {
      if (text[at] === ',') at = skipSpace(text, at + 1)
      const name = endOfString(text, at)
      const start = skipSpace(text, skipSpace(text, name) + 1)
      const end = endOfValue(start)
      visit(nameOf(text.slice(at, name)), start, end)
      at = end
    }
  }

  function endOfValue (start: number): number {
    const first = text.charCodeAt(start)
    if (first === QUOTE) return endOfString(text, start)
    if (first !== OPEN && first !== OPEN_LIST) {
      SCALAR.lastIndex = start
      return start + (SCALAR.exec(text) as RegExpExecArray)[0].length
    }
    let depth = 0
    let at = start
    do {
      const sign = text.charCodeAt(at)
      if (sign === OPEN || sign === OPEN_LIST) depth++
      if (sign === CLOSE || sign === CLOSE_LIST) depth--
      found.isTooDeep ||= depth > MAX_DEPTH
      at = sign === QUOTE ? endOfString(text, at) : at + 1
    } while (depth > 0)
    return at
  }

  members(skipSpace(text, 0), (name, start) => {
    if (!DECISIVE.has(name)) return
    mark(name)
    if (name !== 'properties' || found.repeated !== undefined) return
    found.inside = start + 1
    members(start, (inner, from, to) => {
      found.isEmpty = false
      if (inner === 'token') found.tokens.push([from, to])
      else if (DECISIVE.has(inner)) mark(`properties.${inner}`)
    })
  })
  return found
}

/** Returns a name as JSON.parse reads it: `t\u006fken` is `token`. */
const nameOf = (quoted: string): string => quoted.includes('\\') ? JSON.parse(quoted) : quoted.slice(1, -1)

function skipSpace (text: string, at: number): number {
  while (text.charCodeAt(at) <= 0x20) at++
  return at
}

/** Returns the offset behind a string that begins at an offset. */
function endOfString (text: string, start: number): number {
  let at = text.indexOf('"', start + 1)
  while (isEscaped(text, at)) at = text.indexOf('"', at + 1)
  return at + 1
}

/** Returns true if an odd number of backslashes stands before an offset. */
function isEscaped (text: string, at: number): boolean {
  let slashes = 0
  while (text[at - 1 - slashes] === '\\') slashes++
  return slashes % 2 === 1
}
