import { gzipSync } from 'node:zlib'
import type { FastifyReply } from 'fastify'

/** The known failures of Mixpanel, its edge and the network. The request is not processed. */
export const FAULTS = {
  rate_limited: answer(429, 'application/json', JSON.stringify({
    code: 429,
    error: 'Project exceeded rate limits. Please retry the request with exponential backoff.',
    status: 'Too Many Requests'
  })),
  rate_limited_plain: answer(429, 'application/json', JSON.stringify({
    error: 'Project exceeded rate limits. Please retry the request with exponential backoff.', status: 0
  })),
  edge_down: answer(503, 'text/plain',
    'upstream connect error or disconnect/reset before headers. reset reason: connection failure'),
  bad_gateway: answer(502, 'text/html', '<html><body><h1>502 Bad Gateway</h1></body></html>'),
  gateway_timeout: answer(504, 'text/html', '<html><body><h1>504 Gateway Time-out</h1></body></html>'),
  internal: answer(500, 'application/json', '{"error":"internal error","status":0}'),
  request_timeout: answer(408, 'text/plain', 'Request Timeout'),
  temporary_failure: zero('a temporary failure occurred'),
  refused: zero('event, invalid'),
  echo (reply: FastifyReply) {
    reply.send({ error: `refused: ${decodeURIComponent(String(reply.request.body))}\n`, status: 0 })
  },
  long_echo (reply: FastifyReply) {
    const body = decodeURIComponent(String(reply.request.body))
    reply.send({ error: 'y'.repeat(500 - body.indexOf('"token":') - 20) + body, status: 0 })
  },
  mute_zero: answer(200, 'text/plain', '0'),
  null_body: answer(200, 'application/json', 'null'),
  empty: answer(200, 'text/plain', ''),
  no_content: answer(204, 'text/plain', ''),
  html: answer(200, 'text/html', '<html><body>Welcome to the hotel WiFi</body></html>'),
  gzip: answer(200, 'text/plain', gzipSync('1'), { 'content-encoding': 'gzip' }),
  bad_request: answer(400, 'text/html', '<html><title>400 Bad Request</title></html>'),
  huge_refusal: answer(400, 'text/html', Buffer.alloc(4_000_000, 'x')),
  names_one_takes_none: answer(400, 'application/json', JSON.stringify({
    code: 400, error: 'some failed', failed_records: [{ index: 0, message: 'bad' }], num_records_imported: 0
  })),
  imports_none: answer(200, 'application/json', JSON.stringify({ code: 200, num_records_imported: 0, status: 'OK' })),
  unauthorized: answer(401, 'application/json', '{"code":401,"error":"Invalid credentials","status":"Unauthorized"}'),
  forbidden: answer(403, 'text/html', '<html><title>403 Forbidden</title>Your client does not have permission</html>'),
  too_large: answer(413, 'text/html', '<html><title>413 Request Entity Too Large</title></html>'),
  uri_too_long: answer(414, 'text/html', '<html><title>414 Request-URI Too Large</title></html>'),
  redirect: answer(302, 'text/html', '', { location: '/elsewhere' }),
  redirect_keeping_method: answer(307, 'text/html', '', { location: '/elsewhere' }),
  huge: answer(200, 'text/html', Buffer.alloc(4_000_000, 'x')),
  huge_failure: answer(503, 'text/html', Buffer.alloc(4_000_000, 'x')),
  garbage: raw('SSH-2.0-OpenSSH_9.2\r\n'),
  bad_chunk: raw('HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n1\r\n'),
  short_body: raw('HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n1'),
  many_headers: raw(`HTTP/1.1 200 OK\r\nx-long: ${'x'.repeat(40_000)}\r\ncontent-length: 1\r\n\r\n1`),
  reset: (reply: FastifyReply) => { reply.hijack().raw.socket?.resetAndDestroy() },
  hang: (reply: FastifyReply) => { reply.hijack() },
  drip (reply: FastifyReply) {
    const { raw } = reply.hijack()
    raw.writeHead(200, { 'content-type': 'text/plain' })
    const timer = setInterval(() => raw.write(' '), 100)
    raw.on('close', () => clearInterval(timer))
  }
}

/** Faults that delay the answer, or that process the request and then break the connection. */
export const LATE_FAULTS = ['reset_after', 'close_idle', 'cut', 'wait', 'slow_zero'] as const

/** `times` defaults to 1; `retry_after` becomes a header of the answer; `ms` is for `cut`, `wait` and `slow_zero`. */
export interface Fault {
  name: keyof typeof FAULTS | typeof LATE_FAULTS[number]
  times?: number
  retry_after?: string
  ms?: number
}

/** Returns true for an object with the name of a fault. */
export function isFault (value: unknown): value is Fault {
  const { name } = Object(value) as { name?: unknown }
  return typeof name === 'string' && (Object.hasOwn(FAULTS, name) || (LATE_FAULTS as readonly string[]).includes(name))
}

/** Returns true if a fault only concerns the answer: Mixpanel has the events. */
export const isProcessed = ({ name }: Fault): boolean => !(name in FAULTS) && name !== 'slow_zero'

/** A queue of faults, one for each request. Without a fault the request succeeds. */
export function createFaultScript () {
  let script: Fault[] = []
  return {
    add: (...faults: Fault[]) => { script.push(...faults.map(fault => ({ ...fault }))) },
    clear: () => { script = [] },
    /** Returns the faults that wait, each with the number of its requests. */
    pending: () => script.map(({ name, times = 1 }) => ({ name, times })),
    next (): Fault | undefined {
      const [fault] = script
      if (fault === undefined) return undefined
      fault.times = (fault.times ?? 1) - 1
      if (fault.times < 1) script.shift()
      return fault
    }
  }
}

function answer (status: number, type: string, body: string | Buffer, headers: Record<string, string> = {}) {
  return (reply: FastifyReply) => { reply.code(status).headers(headers).type(type).send(body) }
}

/** Answers `0`, with the reason only for `verbose=1`. */
function zero (error: string) {
  return (reply: FastifyReply) => {
    const verbose = 'verbose' in (reply.request.query as object)
    reply.type(verbose ? 'application/json' : 'text/plain').send(verbose ? { error, status: 0 } : '0')
  }
}

function raw (text: string) {
  return (reply: FastifyReply) => { reply.hijack().raw.socket?.end(text) }
}
