import fp from 'fastify-plugin'
import type { Config } from '../../config.ts'

const EXPOSED = 'x-request-id, retry-after, ratelimit-limit, ratelimit-remaining, ratelimit-reset'
const PREFLIGHT = {
  'access-control-allow-methods': 'GET, POST',
  'access-control-allow-headers': 'content-type, prefer, x-request-id',
  'access-control-max-age': '600'
}

/**
 * Who may call from a browser. A foreign origin is turned away, not merely left without CORS headers: a browser hides
 * an answer from a foreign page, but does not stop the request (a beacon, a text/plain POST) that merges two ids. So
 * @fastify/cors is not enough, and what is left for it to do is a few headers.
 */
export const origins = fp<{ config: Config }>(async (app, { config }) => {
  const allowed = new Set(config.CORS_ORIGINS)

  app.addHook('onRequest', (request, reply, done) => {
    const { origin } = request.headers
    if (origin === undefined) return done()
    const { method } = request
    if (!allowed.has(origin)) return method === 'GET' || method === 'HEAD' ? done() : reply.problem('forbidden')
    reply.headers({ 'access-control-allow-origin': origin, 'access-control-expose-headers': EXPOSED, vary: 'Origin' })
    const isPreflight = method === 'OPTIONS' && 'access-control-request-method' in request.headers
    return isPreflight ? reply.code(204).headers(PREFLIGHT).send() : done()
  })
})
