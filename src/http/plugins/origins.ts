import fp from 'fastify-plugin'
import type { Config } from '../../config.ts'
import type { CallerText } from '../caller-text.ts'

const EXPOSED = 'x-request-id, retry-after, ratelimit-limit, ratelimit-remaining, ratelimit-reset'
const PREFLIGHT = {
  'access-control-allow-methods': 'GET, POST',
  // Pages with Sentry or OpenTelemetry add tracing headers to every request.
  'access-control-allow-headers': 'content-type, prefer, x-request-id, authorization, x-api-key, traceparent, ' +
    'tracestate, baggage, sentry-trace, x-requested-with',
  // Chromium caches no longer than two hours.
  'access-control-max-age': '7200'
}

/** What an SDK may add to its requests: the option `xhr_headers` of the JavaScript SDK takes any header. */
const HEADER_NAMES = /^[\w-]{1,64}(?:, ?[\w-]{1,64}){0,31}$/

interface Options { config: Pick<Config, 'CORS_ORIGINS'> }

/** Lets pages of CORS_ORIGINS read every response, including those of later hooks. */
export const corsHeaders = fp<Options>(async (app, { config }) => {
  const allowed = new Set(config.CORS_ORIGINS)
  app.addHook('onRequest', ({ headers: { origin } }, reply, done) => {
    if (origin !== undefined && allowed.has(origin)) {
      reply.headers({
        'access-control-allow-origin': origin,
        // Beacons with JSON and `credentials: 'include'` are not sent without it. No cookie has an effect.
        'access-control-allow-credentials': 'true',
        'access-control-expose-headers': EXPOSED,
        vary: 'Origin'
      })
    }
    done()
  })
})

/**
 * Refuses requests from foreign origins. Without CORS headers a browser hides the response from a foreign page, but it
 * still sends the request (a beacon, a text/plain POST), which merges two ids. @fastify/cors does not refuse requests,
 * and could only replace a few headers here.
 */
export const origins = fp<Options & { callerText: CallerText }>(async (app, { config, callerText }) => {
  const allowed = new Set(config.CORS_ORIGINS)
  app.addHook('onRequest', ({ headers, method, route: { config: { sdk } } }, reply, done) => {
    const { origin } = headers
    if (origin === undefined) return done()
    if (!allowed.has(origin)) {
      if ((method === 'GET' || method === 'HEAD') && sdk === undefined) return done()
      reply.logLine.details = { ...reply.logLine.details, origin: callerText.forLog(origin) }
      return reply.problem('forbidden')
    }
    const isPreflight = method === 'OPTIONS' && 'access-control-request-method' in headers
    if (!isPreflight) return done()
    const asked = headers['access-control-request-headers']
    if (sdk !== undefined && asked !== undefined && HEADER_NAMES.test(asked)) {
      return reply.code(204).headers({ ...PREFLIGHT, 'access-control-allow-headers': asked }).send()
    }
    reply.code(204).headers(PREFLIGHT).send()
  })
})
