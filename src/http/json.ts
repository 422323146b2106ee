import { isUtf8 } from 'node:buffer'
import { BodyError } from './body.ts'
import { jsonFault } from './json-fault.ts'

/** Returns a body without its byte order mark. Throws a BodyError when it is not UTF-8. */
export function checkUtf8 (body: Buffer): Buffer {
  // Node would decode other bytes as U+FFFD, and two users' ids could become one.
  if (!isUtf8(body)) throw notJson(body)
  const hasByteOrderMark = body[0] === 0xEF && body[1] === 0xBB && body[2] === 0xBF
  return hasByteOrderMark ? body.subarray(3) : body
}

/** Returns the value of the JSON between two offsets, as `JSON.parse` does. Throws a BodyError when it is not JSON. */
export function parseJson (body: Buffer, start = 0, end = body.length): unknown {
  try {
    return JSON.parse(body.toString('utf8', start, end))
  } catch {
    throw notJson(body.subarray(start, end))
  }
}

const notJson = (bytes: Buffer) => new BodyError('invalid_request', jsonFault(bytes))

/** The positions of list elements in a body, and the JSON text around them. */
export interface Outline {
  /** The body with each list element replaced by its number. */
  text: string
  /** The start and the end of each element, two numbers each. */
  bounds: number[]
}

const [QUOTE, BACKSLASH, COMMA, OPEN, CLOSE, OPEN_LIST, CLOSE_LIST] = Array.from('"\\,{}[]', sign => sign.charCodeAt(0))

/**
 * Returns the elements of the lists on one level of a JSON text: 1 (`[…]`) or 2 (`{"identities":[…]}`). It does not
 * parse them, so that each can be parsed alone: JSON.parse of a hostile megabyte takes 100 ms and 30 MB. The body is
 * JSON if and only if `text` and every element are. Returns undefined when there are more than `max` elements.
 */
export function outline (body: Buffer, max: number, level: 1 | 2 = 2): Outline | undefined {
  const bounds: number[] = []
  let text = ''
  let depth = 0
  /** The start of the text after the last element, and of the current element (-1 outside a list). */
  let from = 0
  let start = -1
  const close = (end: number) => {
    if (isBlank(body, start, end) && body[start - 1] === OPEN_LIST && body[end] === CLOSE_LIST) return
    text += `${body.toString('utf8', from, start)}${bounds.length / 2}`
    bounds.push(start, end)
    from = end
  }
  for (let index = 0; index < body.length; index++) {
    const byte = body[index]
    if (byte === QUOTE) {
      for (index++; index < body.length && body[index] !== QUOTE; index++) if (body[index] === BACKSLASH) index++
    } else if (byte === OPEN || byte === OPEN_LIST) {
      depth++
      if (depth === level && byte === OPEN_LIST) start = index + 1
    } else if (byte === CLOSE || byte === CLOSE_LIST) {
      if (depth === level && start !== -1) close(index)
      if (depth === level) start = -1
      depth--
    } else if (byte === COMMA && depth === level && start !== -1) {
      close(index)
      start = index + 1
    }
    if (bounds.length > 2 * max) return undefined
  }
  return { text: text + body.toString('utf8', from), bounds }
}

function isBlank (body: Buffer, start: number, end: number): boolean {
  for (let index = start; index < end; index++) {
    const byte = body[index]
    if (byte !== 0x20 && byte !== 0x09 && byte !== 0x0A && byte !== 0x0D) return false
  }
  return true
}
