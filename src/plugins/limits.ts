import rateLimit, { normalizeIP } from '@fastify/rate-limit'
import fp from 'fastify-plugin'
import type { Config } from '../config.ts'

/**
 * A caller is an address, IPv6 by /64; forwarded addresses count only from a proxy in TRUST_PROXY. Routes opt in with
 * `config: { rateLimit: {} }`; what is not found has a budget of its own.
 */
export const limits = fp<{ config: Config }>(async (app, { config }) => {
  await app.register(rateLimit, {
    global: false,
    max: config.RATE_LIMIT_MAX,
    timeWindow: config.RATE_LIMIT_WINDOW_MS,
    enableDraftSpec: true,
    // Only who is out of his limit is told of it: three headers in every answer would cost as much as the count.
    addHeadersOnExceeding: { 'ratelimit-limit': false, 'ratelimit-remaining': false, 'ratelimit-reset': false },
    // With the default of 5,000 a caller who is out of his limit is forgotten as soon as 5,000 others came.
    cache: 100_000,
    // Some proxies write address:port, and every connection would be another caller.
    ...config.TRUST_PROXY.length > 0 && { keyGenerator: ({ ip }: { ip: string }) => normalizeIP(withoutPort(ip)) }
  })
})

function withoutPort (ip: string): string {
  return /^(\d+\.\d+\.\d+\.\d+):\d+$/.exec(ip)?.[1] ?? /^\[(.+)\](?::\d+)?$/.exec(ip)?.[1] ?? ip
}
