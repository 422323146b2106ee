import { isUtf8 } from 'node:buffer'
import { BodyError } from './body.ts'

/** JSON in UTF-8: Node would read other bytes as U+FFFD, and two users' ids could become one. Throws a BodyError. */
export function checkUtf8 (body: Buffer): Buffer {
  if (!isUtf8(body)) throw notJson()
  const hasMark = body[0] === 0xEF && body[1] === 0xBB && body[2] === 0xBF
  return hasMark ? body.subarray(3) : body
}

/** Returns what some of the bytes say in JSON, as `JSON.parse` does. Throws a BodyError where they are no JSON. */
export function parseJson (body: Buffer, start = 0, end = body.length): unknown {
  try {
    return JSON.parse(body.toString('utf8', start, end))
  } catch {
    throw notJson()
  }
}

const notJson = () => new BodyError('invalid_request', 'must be JSON in UTF-8')

/** Where the elements of a list stand in a body, and the JSON text around them. */
export interface Outline {
  /** The body with each element of its lists replaced by the element's number. */
  text: string
  /** The bounds of the elements, two numbers each. */
  bounds: number[]
}

const [QUOTE, BACKSLASH, COMMA, OPEN, CLOSE, OPEN_LIST, CLOSE_LIST] = Array.from('"\\,{}[]', sign => sign.charCodeAt(0))

/**
 * Finds the elements of the lists on the second level of a JSON text (`{"identities":[…]}`) without parsing them, so
 * that each can be parsed by itself: JSON.parse of a hostile megabyte takes a tenth of a second and 30 MB. Where the
 * text around them and every element are JSON, so is the body, and the other way round. Undefined where there are more
 * than `most`.
 */
export function outline (body: Buffer, most: number): Outline | undefined {
  const bounds: number[] = []
  let text = ''
  let depth = 0
  /** Where the text since the last element begins; where the element that is open does. */
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
      if (depth === 2 && byte === OPEN_LIST) start = index + 1
    } else if (byte === CLOSE || byte === CLOSE_LIST) {
      if (depth === 2 && start !== -1) close(index)
      if (depth === 2) start = -1
      depth--
    } else if (byte === COMMA && depth === 2 && start !== -1) {
      close(index)
      start = index + 1
    }
    if (bounds.length > 2 * most) return undefined
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
