/** What a request of an SDK has beside its events. Each is as it came. */
export interface Parameters { verbose?: string, ip?: string, img?: string }

/** The fields of a query, or of a form. */
export interface Form extends Parameters {
  /** The value of `data`, decoded: JSON if it is any. */
  data?: Buffer
}

/** A form with more fields is none of an SDK. */
const MAX_FIELDS = 100

/** Far longer than the value of any parameter. */
const MAX_PARAMETER = 16

const NAMES = new Set(['verbose', 'ip', 'img'])

const [AND, EQUALS, PERCENT, PLUS, SPACE] = Array.from('&=%+ ', sign => sign.charCodeAt(0)) as
  [number, number, number, number, number]

/**
 * Returns the fields of a query or a form that the relay knows. Of two fields with one name the first counts. `data`
 * may be JSON, or base64 of it: standard or URL-safe, padded or not, with spaces in place of `+`.
 */
export function readForm (bytes: Buffer): Form {
  const form: Form = {}
  let start = 0
  for (let field = 0; field < MAX_FIELDS && start < bytes.length; field++) {
    const found = bytes.indexOf(AND, start)
    const end = found === -1 ? bytes.length : found
    const equals = bytes.subarray(start, Math.min(end, start + MAX_PARAMETER)).indexOf(EQUALS)
    const name = equals === -1 ? '' : bytes.toString('latin1', start, start + equals)
    const value = bytes.subarray(start + equals + 1, end)
    if (name === 'data') form.data ??= decodeData(value)
    else if (NAMES.has(name)) form[name as keyof Parameters] ??= value.toString('latin1', 0, MAX_PARAMETER)
    start = end + 1
  }
  return form
}

/** Returns the fields of a body: a form, or JSON, whatever its type says. */
export const readBody = (body: Buffer): Form => isJson(body) ? { data: body } : readForm(body)

/** Returns the query of a request as bytes. */
export function queryOf (url: string): Buffer {
  const at = url.indexOf('?')
  return Buffer.from(at === -1 ? '' : url.slice(at + 1), 'latin1')
}

function decodeData (value: Buffer): Buffer {
  if (isJson(percentDecode(value.subarray(0, MAX_PARAMETER), true))) return percentDecode(value, true)
  // A form parser, or the caller, may have turned `+` into a space. In base64 both are the same.
  return Buffer.from(percentDecode(value, false).toString('latin1').replaceAll(' ', '+'), 'base64')
}

/** Returns true for bytes that begin with a bracket of JSON. */
export const isJson = (bytes: Buffer): boolean => '{['.includes(firstSign(bytes) ?? ' ')

/** Returns the first sign of a text; undefined if its beginning is blank. */
export const firstSign = (bytes: Buffer): string | undefined =>
  bytes.toString('latin1', 0, MAX_PARAMETER).replace(/^\xef\xbb\xbf/, '').trimStart()[0]

/** Returns percent-encoded bytes decoded; a `%` that begins no byte stays. */
function percentDecode (bytes: Buffer, isPlusSpace: boolean): Buffer {
  const decoded = Buffer.allocUnsafe(bytes.length)
  let length = 0
  for (let index = 0; index < bytes.length; index++) {
    const byte = bytes[index] as number
    const code = byte === PERCENT ? hex(bytes[index + 1]) * 16 + hex(bytes[index + 2]) : NaN
    if (!Number.isNaN(code)) index += 2
    decoded[length++] = Number.isNaN(code) ? (isPlusSpace && byte === PLUS ? SPACE : byte) : code
  }
  return decoded.subarray(0, length)
}

function hex (byte = 0): number {
  if (byte >= 0x30 && byte <= 0x39) return byte - 0x30
  const letter = byte | 0x20
  return letter >= 0x61 && letter <= 0x66 ? letter - 0x57 : NaN
}
