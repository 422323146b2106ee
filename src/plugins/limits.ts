import rateLimit from '@fastify/rate-limit'
import fp from 'fastify-plugin'
import type { Config } from '../config.ts'

/** Every caller is counted: by address, IPv6 by /64. Forwarded addresses count only from a proxy in TRUST_PROXY. */
export const limits = fp<{ config: Config }>(async (app, { config }) => {
  await app.register(rateLimit, {
    global: false,
    max: config.RATE_LIMIT_MAX,
    timeWindow: config.RATE_LIMIT_WINDOW_MS,
    enableDraftSpec: true,
    // With the default of 5,000 a caller who is out of his limit is forgotten as soon as 5,000 others came.
    cache: 100_000
  })
})
