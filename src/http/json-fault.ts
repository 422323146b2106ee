import { isUtf8 } from 'node:buffer'

const COMPRESSED = [[0x1F, 0x8B], [0x28, 0xB5, 0x2F, 0xFD], [0x78, 0x9C], [0x78, 0x01]]

/**
 * Returns the rule that some bytes break which are not JSON in UTF-8, without a word of the bytes themselves. It names
 * common mistakes only, and reads each byte once.
 */
export function jsonFault (bytes: Buffer): string {
  if (COMPRESSED.some(magic => magic.every((byte, index) => bytes[index] === byte))) return 'must not be compressed'
  if (!isUtf8(bytes)) return 'must be UTF-8'
  const text = bytes.toString()
  if (text.trim() === '') return 'must not be empty'
  let depth = 0
  let isAfterComma = false
  for (let index = 0; index < text.length; index++) {
    const char = text[index] as string
    if (char === '"') {
      const end = endOfString(text, index + 1)
      if (end === -1) return 'must not end inside a string'
      if (end === -2) return 'must escape control characters in strings'
      index = end
    } else if (char === "'") {
      return 'must have double quotes around names and strings'
    } else if (char === '/' || char === '#') {
      return 'must not contain comments'
    } else if (isAfterComma && (char === '}' || char === ']')) {
      return 'must not have a comma before a closing bracket'
    } else if (/[A-Za-z_$]/.test(char)) {
      const [word] = /^[\w$]+/.exec(text.slice(index, index + 32)) as RegExpExecArray
      if (/^(?:NaN|Infinity|undefined)$/.test(word)) return 'must not contain NaN, Infinity or undefined'
      if (!/^(?:true|false|null|[eE]\d*)$/.test(word)) return 'must have double quotes around names and strings'
      index += word.length - 1
    }
    if (char === '{' || char === '[') depth++
    if (char === '}' || char === ']') depth--
    if (!/\s/.test(char)) isAfterComma = char === ','
  }
  return depth > 0 ? 'must not end before its last bracket' : 'must be JSON'
}

/** Returns the offset of the closing quote; -1 if there is none, -2 if a control character comes first. */
function endOfString (text: string, start: number): number {
  for (let index = start; index < text.length; index++) {
    if (text[index] === '\\') index++
    else if (text[index] === '"') return index
    else if (text.charCodeAt(index) < 0x20) return -2
  }
  return -1
}
