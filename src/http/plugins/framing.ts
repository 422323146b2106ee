import type { IncomingMessage } from 'node:http'
import fp from 'fastify-plugin'

/** Refuses what two servers on the way could read in two ways, and bodies that would have to be decoded first. */
export const framing = fp(async app => {
  app.addHook('onRequest', (request, reply, done) => {
    if (!hasOneHost(request.raw)) {
      const errors = [{ pointer: '', detail: 'must name an HTTP version and exactly one Host' }]
      return reply.header('connection', 'close').problem('invalid_request', { errors })
    }
    const encoding = request.headers['content-encoding']
    if (encoding !== undefined && encoding.toLowerCase() !== 'identity') return reply.problem('unsupported_media_type')
    done()
  })
})

function hasOneHost ({ rawHeaders, httpVersion }: IncomingMessage): boolean {
  let hosts = 0
  for (let index = 0; index < rawHeaders.length; index += 2) {
    const name = rawHeaders[index] as string
    if (name.length === 4 && name.toLowerCase() === 'host') hosts++
  }
  return hosts === 1 || (hosts === 0 && httpVersion === '1.0')
}
