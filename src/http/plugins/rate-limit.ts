import rateLimit from '@fastify/rate-limit'
import type { FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import { projectOf, type Config } from '../../config.ts'
import type { Log } from '../../log.ts'
import type { Redis } from '../../redis.ts'
import { addressKey, createNetworks } from '../address.ts'
import { createRateLimitStore } from './rate-limit-store.ts'

declare module 'fastify' {
  interface FastifyInstance {
    /**
     * Counts `amount` more against the limit of a request's caller and resolves with undefined. When that exceeds the
     * limit, counts nothing and resolves with the whole seconds until the caller's window ends.
     */
    countIdentities: (request: FastifyRequest, amount: number) => Promise<number | undefined>
    /** Counts `amount` against the limit of an address, even beyond it. */
    charge: (address: string, amount: number) => void
  }
}

interface Options { config: Config, redis?: Redis | undefined, log: Log }

/**
 * Counts every request against the limit of its caller: an API key, a user, or else an address. The response makes no
 * difference; only the health routes are exempt.
 */
export const rateLimits = fp<Options>(async (app, { config, redis, log }) => {
  const { RATE_LIMIT_MAX: max, RATE_LIMIT_WINDOW_MS: windowMs } = config
  const prefix = `identify-relay:${projectOf(config).fingerprint}:limit:`
  const store = createRateLimitStore({ max, windowMs, log, redis: redis && { connection: redis, prefix } })
  const addressLimit = (address: string) => `address:${addressKey(address)}`
  const keyGenerator = ({ caller, ip }: FastifyRequest) => caller.limitKey ?? addressLimit(ip)
  await app.register(rateLimit, {
    global: false,
    max,
    timeWindow: windowMs,
    enableDraftSpec: true,
    // Only a 429 carries these headers: in every response they would cost as much as the count.
    addHeadersOnExceeding: { 'ratelimit-limit': false, 'ratelimit-remaining': false, 'ratelimit-reset': false },
    // The plugin constructs its store, and a child for each route. Both are this one store.
    store: class { incr = store.incr; child = store.child },
    keyGenerator
  })

  const isProxy = createNetworks(config.TRUST_PROXY)
  let hasWarned = false
  /** Without TRUST_PROXY all clients of a proxy share its limit, which looks like a fault of the relay. */
  function warnOfProxy ({ headers, socket }: FastifyRequest): void {
    if (headers['x-forwarded-for'] === undefined) return
    const { remoteAddress: address = '' } = socket
    if (isProxy(address)) return
    hasWarned = true
    log.warn({ address, hint: 'if it is your proxy, list it in TRUST_PROXY' }, 'X-Forwarded-For not trusted')
  }

  const limit = app.rateLimit()
  app.addHook('onRequest', (request, reply, done) => {
    if (!hasWarned) warnOfProxy(request)
    if (request.route.config.unlogged || store.countNow(keyGenerator(request))) done()
    else limit.call(app, request, reply).then(() => done(), done)
  })

  app.decorate('charge', (address, amount) => { store.charge(addressLimit(address), amount).catch(() => {}) })
  app.decorate('countIdentities', async (request, amount) => {
    const { current, ttl } = await store.add(keyGenerator(request), amount)
    return current > max ? Math.ceil(ttl / 1000) : undefined
  })
})
