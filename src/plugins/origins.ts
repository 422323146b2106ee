import cors from '@fastify/cors'
import fp from 'fastify-plugin'
import type { Config } from '../config.ts'

/**
 * Who may call from a browser. A foreign origin is turned away here, not merely left without CORS headers: the browser
 * hides an answer, but it does not stop the request (a beacon, a text/plain POST) that merges two identities.
 */
export const origins = fp<{ config: Config }>(async (app, { config }) => {
  const allowed = new Set(config.CORS_ORIGINS)

  app.addHook('onRequest', async (request, reply) => {
    const { method, headers } = request
    if (method === 'GET' || method === 'HEAD') return
    if (headers.origin !== undefined && !allowed.has(headers.origin)) return reply.problem('forbidden')
    // @fastify/cors would answer any OPTIONS, but only a browser's question is for it.
    const preflight = headers.origin !== undefined && headers['access-control-request-method'] !== undefined
    if (method === 'OPTIONS' && !preflight) return reply.callNotFound()
  })

  await app.register(cors, {
    origin: [...allowed],
    methods: ['GET', 'POST'],
    allowedHeaders: ['content-type', 'prefer', 'x-request-id'],
    exposedHeaders: ['x-request-id', 'retry-after', 'ratelimit-limit', 'ratelimit-remaining', 'ratelimit-reset'],
    maxAge: 600
  })
})
