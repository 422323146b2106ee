import type { IncomingMessage } from 'node:http'
import fp from 'fastify-plugin'
import { MAX_HEADERS } from '../connections.ts'

/** Refuses requests that two servers could read differently, and bodies that are not plain UTF-8. */
export const framing = fp(async app => {
  app.addHook('onRequest', (request, reply, done) => {
    if (!hasOneHost(request.raw)) {
      const errors = [{ pointer: '', detail: 'must name an HTTP version and exactly one Host' }]
      return reply.header('connection', 'close').problem('invalid_request', { errors })
    }
    if (request.raw.rawHeaders.length >= 2 * MAX_HEADERS) {
      const errors = [{ pointer: '', detail: `must have fewer than ${MAX_HEADERS} headers` }]
      return reply.header('connection', 'close').problem('invalid_request', { errors, status: 431 })
    }
    const {
      'transfer-encoding': coding, 'content-encoding': encoding = '', 'content-type': type = ''
    } = request.headers
    if (coding !== undefined && (coding.toLowerCase() !== 'chunked' || request.raw.httpVersion === '1.0')) {
      const errors = [{ pointer: '', detail: 'must have no transfer encoding but chunked, and none in HTTP/1.0' }]
      return reply.header('connection', 'close').problem('invalid_request', { errors })
    }
    const isEncoded = encoding !== '' && encoding.toLowerCase() !== 'identity'
    return isEncoded || hasOtherCharset(type) ? reply.problem('unsupported_media_type') : done()
  })
})

/** Returns true for a media type whose charset is not UTF-8, the only one for JSON (RFC 8259). */
function hasOtherCharset (type: string): boolean {
  const charset = /;\s*charset\s*=\s*"?([^\s";]*)/i.exec(type)?.[1]
  return charset !== undefined && !/^utf-?8$/i.test(charset)
}

function hasOneHost ({ rawHeaders, httpVersion }: IncomingMessage): boolean {
  let hosts = 0
  for (let index = 0; index < rawHeaders.length; index += 2) {
    const name = rawHeaders[index] as string
    if (name.length === 4 && name.toLowerCase() === 'host') hosts++
  }
  return hosts === 1 || (hosts === 0 && httpVersion === '1.0')
}
