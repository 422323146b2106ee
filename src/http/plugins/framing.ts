import fp from 'fastify-plugin'
import { hasOneHost, hasOtherCoding, hasTooManyHeaders, MAX_HEADERS } from '../framing.ts'

/** Refuses requests that two servers could read differently, and bodies that are not plain UTF-8. SDKs may use gzip. */
export const framing = fp(async app => {
  app.addHook('onRequest', (request, reply, done) => {
    if (!hasOneHost(request.raw)) {
      const errors = [{ pointer: '', detail: 'must name an HTTP version and exactly one Host' }]
      return reply.header('connection', 'close').problem('invalid_request', { errors, status: 400 })
    }
    if (hasTooManyHeaders(request.raw)) {
      const errors = [{ pointer: '', detail: `must have fewer than ${MAX_HEADERS} headers` }]
      return reply.header('connection', 'close').problem('invalid_request', { errors, status: 431 })
    }
    const { 'content-encoding': encoding = '', 'content-type': type = '' } = request.headers
    if (hasOtherCoding(request.raw)) {
      const errors = [{ pointer: '', detail: 'must have no transfer encoding but chunked, and none in HTTP/1.0' }]
      return reply.header('connection', 'close').problem('invalid_request', { errors, status: 400 })
    }
    const coding = encoding.toLowerCase()
    const isEncoded = coding !== '' && coding !== 'identity' && !(coding === 'gzip' && request.route.config.sdk)
    return isEncoded || hasOtherCharset(type) ? reply.problem('unsupported_media_type') : done()
  })
})

/** Returns true for a media type whose charset is not UTF-8, the only one for JSON (RFC 8259). */
function hasOtherCharset (type: string): boolean {
  const charset = /;\s*charset\s*=\s*"?([^\s";]*)/i.exec(type)?.[1]
  return charset !== undefined && !/^utf-?8$/i.test(charset)
}
