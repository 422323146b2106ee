import { createRequire } from 'node:module'
import rateLimit, { normalizeIP, type FastifyRateLimitStore, type FastifyRateLimitStoreCtor } from '@fastify/rate-limit'
import fp from 'fastify-plugin'
import { projectOf, type Config } from '../../config.ts'
import { inTime, SOON_MS, type Redis } from '../../redis.ts'

/** With the default of 5,000 a caller who is out of his limit is forgotten as soon as 5,000 others came. */
const CACHE = 100_000

/**
 * A caller is an address, IPv6 by /64; forwarded addresses count only from a proxy in TRUST_PROXY. Routes opt in with
 * `config: { rateLimit: {} }`; what is not found has a budget of its own. With `redis` all relays count together.
 */
export const limits = fp<{ config: Config, redis?: Redis | undefined }>(async (app, { config, redis }) => {
  await app.register(rateLimit, {
    global: false,
    max: config.RATE_LIMIT_MAX,
    timeWindow: config.RATE_LIMIT_WINDOW_MS,
    enableDraftSpec: true,
    // Only who is out of his limit is told of it: three headers in every answer would cost as much as the count.
    addHeadersOnExceeding: { 'ratelimit-limit': false, 'ratelimit-remaining': false, 'ratelimit-reset': false },
    cache: CACHE,
    ...redis && { store: sharedStore(redis, `identify-relay:${projectOf(config)}:limit:`) },
    // Some proxies write address:port, and every connection would be another caller.
    ...config.TRUST_PROXY.length > 0 && { keyGenerator: ({ ip }: { ip: string }) => normalizeIP(withoutPort(ip)) }
  })
})

function withoutPort (ip: string): string {
  return /^(\d+\.\d+\.\d+\.\d+):\d+$/.exec(ip)?.[1] ?? /^\[(.+)\](?::\d+)?$/.exec(ip)?.[1] ?? ip
}

/** Both of the plugin's own stores at once: where Redis does not answer, this process goes by its own count. */
function sharedStore (redis: Redis, prefix: string): FastifyRateLimitStoreCtor {
  const require = createRequire(import.meta.url)
  const LocalStore = require('@fastify/rate-limit/store/LocalStore.js')
  const RedisStore = require('@fastify/rate-limit/store/RedisStore.js')

  const both = (local: FastifyRateLimitStore, shared: FastifyRateLimitStore): FastifyRateLimitStore => ({
    incr (key, callback, timeWindow, max) {
      local.incr(key, (_, own) => {
        const common = new Promise<typeof own>((resolve, reject) => shared.incr(key, (error, count) =>
          error === null ? resolve(count) : reject(error), timeWindow, max))
        inTime(redis, SOON_MS, common).then(count => callback(null, count), () => callback(null, own))
      }, timeWindow, max)
    },
    child: options => both(local.child(options), shared.child(options))
  })
  return function () {
    return both(new LocalStore(false, false, CACHE), new RedisStore(false, false, redis, prefix))
  } as unknown as FastifyRateLimitStoreCtor
}
