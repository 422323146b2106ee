/** A request as RFC 9112 reads it. Header names are in lower case; each has the values of its lines. */
export interface ReadRequest { method: string, target: string, headers: Map<string, string[]>, body: string }

/**
 * The requests of a connection, and what follows the last of them. `isBegun` is true where that has a head as it should
 * be: a server may answer before it reads the body.
 */
export interface Reading { requests: ReadRequest[], rest: 'nothing' | 'incomplete' | 'refused', isBegun: boolean }

const REQUEST_LINE = /^([A-Z-]+) +([!-~\x80-\xff]+) +HTTP\/1\.([01])$/
const HEADER_LINE = /^([!#$%&'*+.^_`|~0-9A-Za-z-]+):[\t ]*([\t -~\x80-\xff]*?)[\t ]*$/
const CHUNK_LINE = /^([0-9A-Fa-f]{1,8})(?:;[\t -~\x80-\xff]*)?$/

/**
 * Returns the requests in `text` (Latin-1) that every server reads alike. The first one that two servers could read
 * differently is `refused`, and so is everything behind it. This reader knows nothing of Node's.
 */
export function readRequests (text: string): Reading {
  const requests: ReadRequest[] = []
  for (let at = 0; ;) {
    // Servers ignore empty lines before a request (RFC 9112 §2.2).
    while (text[at] === '\r' || text[at] === '\n') at++
    if (at === text.length) return { requests, rest: 'nothing', isBegun: false }
    const headEnd = text.indexOf('\r\n\r\n', at)
    if (headEnd === -1) return { requests, rest: 'incomplete', isBegun: false }
    const head = readHead(text.slice(at, headEnd))
    if (head === undefined) return { requests, rest: 'refused', isBegun: false }
    const body = readBody(text, headEnd + 4, head)
    if (typeof body === 'string') return { requests, rest: body, isBegun: true }
    requests.push({ ...head, body: body.text })
    if (head.isLast) return { requests, rest: 'nothing', isBegun: false }
    at = body.end
  }
}

type Head = Omit<ReadRequest, 'body'> & { isLast: boolean }

function readHead (text: string): Head | undefined {
  const [requestLine = '', ...lines] = text.split('\r\n')
  const [, method, target, minor] = REQUEST_LINE.exec(requestLine) ?? []
  if (method === undefined || target === undefined || method === 'CONNECT') return undefined
  const headers = new Map<string, string[]>()
  for (const line of lines) {
    const [, name, value] = HEADER_LINE.exec(line) ?? []
    if (name === undefined || value === undefined) return undefined
    const key = name.toLowerCase()
    headers.set(key, [...headers.get(key) ?? [], value])
  }
  const isOld = minor === '0'
  const hosts = headers.get('host')?.length ?? 0
  if (hosts > 1 || (hosts === 0 && !isOld)) return undefined
  const [codings = [], lengths = []] = [headers.get('transfer-encoding'), headers.get('content-length')]
  if (codings.length + lengths.length > 1) return undefined
  if (codings.some(coding => isOld || coding.toLowerCase() !== 'chunked')) return undefined
  if (lengths.some(length => !/^\d{1,15}$/.test(length))) return undefined
  const options = (headers.get('connection') ?? []).flatMap(value => value.toLowerCase().split(',').map(option => option.trim()))
  return { method, target, headers, isLast: options.includes('close') || (isOld && !options.includes('keep-alive')) }
}

function readBody (text: string, start: number, { headers }: Head): { text: string, end: number } | 'incomplete' | 'refused' {
  if (headers.has('transfer-encoding')) return readChunks(text, start)
  const end = start + Number(headers.get('content-length')?.[0] ?? 0)
  return end > text.length ? 'incomplete' : { text: text.slice(start, end), end }
}

function readChunks (text: string, start: number): { text: string, end: number } | 'incomplete' | 'refused' {
  let body = ''
  for (let at = start; ;) {
    const lineEnd = text.indexOf('\r\n', at)
    const [, digits] = CHUNK_LINE.exec(text.slice(at, lineEnd === -1 ? undefined : lineEnd)) ?? []
    if (lineEnd === -1) return 'incomplete'
    if (digits === undefined) return 'refused'
    const size = parseInt(digits, 16)
    at = lineEnd + 2
    if (size === 0) {
      const trailers = /^((?:[^\r\n]+\r\n)*)\r\n/.exec(text.slice(at))
      if (trailers === null) return 'incomplete'
      const lines = (trailers[1] as string).split('\r\n').slice(0, -1)
      return lines.every(line => HEADER_LINE.test(line)) ? { text: body, end: at + trailers[0].length } : 'refused'
    }
    if (at + size + 2 > text.length) return 'incomplete'
    if (text.slice(at + size, at + size + 2) !== '\r\n') return 'refused'
    body += text.slice(at, at + size)
    at += size + 2
  }
}
