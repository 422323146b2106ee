import fp from 'fastify-plugin'
import type { Config } from '../../config.ts'

const EXPOSED = 'x-request-id, retry-after, ratelimit-limit, ratelimit-remaining, ratelimit-reset'
const PREFLIGHT = {
  'access-control-allow-methods': 'GET, POST',
  'access-control-allow-headers': 'content-type, prefer, x-request-id',
  'access-control-max-age': '600'
}

interface Options { config: Pick<Config, 'CORS_ORIGINS'> }

/** Lets the pages of CORS_ORIGINS read every answer, those of the hooks that follow among them. */
export const corsHeaders = fp<Options>(async (app, { config }) => {
  const allowed = new Set(config.CORS_ORIGINS)
  app.addHook('onRequest', ({ headers: { origin } }, reply, done) => {
    if (origin !== undefined && allowed.has(origin)) {
      reply.headers({ 'access-control-allow-origin': origin, 'access-control-expose-headers': EXPOSED, vary: 'Origin' })
    }
    done()
  })
})

/**
 * Decides which pages may call. A foreign origin is turned away, not merely left without CORS headers: a browser hides
 * an answer from a foreign page, but does not stop the request (a beacon, a text/plain POST) that merges two ids. So
 * @fastify/cors is not enough, and what is left for it to do is a few headers.
 */
export const origins = fp<Options>(async (app, { config }) => {
  const allowed = new Set(config.CORS_ORIGINS)
  app.addHook('onRequest', ({ headers, method }, reply, done) => {
    const { origin } = headers
    if (origin === undefined) return done()
    if (!allowed.has(origin)) return method === 'GET' || method === 'HEAD' ? done() : reply.problem('forbidden')
    const isPreflight = method === 'OPTIONS' && 'access-control-request-method' in headers
    return isPreflight ? reply.code(204).headers(PREFLIGHT).send() : done()
  })
})
