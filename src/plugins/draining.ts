import fp from 'fastify-plugin'

declare module 'fastify' {
  interface FastifyInstance {
    /** From now on not ready, and every answer asks its connection to close; requests are still served. */
    drain: () => void
    isDraining: () => boolean
  }
}

/** The end of a process in two steps: `drain` sends callers elsewhere, `close` refuses the ones who come all the same. */
export const draining = fp(async app => {
  let state: 'serving' | 'draining' | 'closing' = 'serving'
  app.decorate('drain', () => { state = 'draining' })
  app.decorate('isDraining', () => state !== 'serving')
  app.addHook('preClose', async () => { state = 'closing' })
  app.addHook('onRequest', async (request, reply) => {
    if (state === 'serving') return
    reply.header('connection', 'close')
    if (state === 'closing' && request.method === 'POST') return reply.problem('draining', { retryAfter: 1 })
  })
})
