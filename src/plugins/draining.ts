import fp from 'fastify-plugin'

declare module 'fastify' {
  interface FastifyInstance {
    /** From now on not ready, and every answer asks its connection to close; requests are still served. */
    drain: () => void
    isDraining: () => boolean
  }
}

/** How long a connection may still take to bring a request that it began before the close. */
const LAST_REQUEST_MS = 500

/** A process ends in two steps: `drain` sends callers elsewhere, `close` refuses those who come all the same. */
export const draining = fp(async app => {
  let state: 'serving' | 'draining' | 'closing' = 'serving'
  let timer: NodeJS.Timeout | undefined
  app.decorate('drain', () => { state = 'draining' })
  app.decorate('isDraining', () => state !== 'serving')
  app.addHook('preClose', async () => {
    state = 'closing'
    // Node waits for every connection, silent ones included, and looks for late requests no more once it closes.
    timer = setInterval(() => app.inFlight() === 0 && app.server.closeAllConnections(), LAST_REQUEST_MS)
  })
  app.addHook('onClose', async () => clearInterval(timer))
  app.addHook('onRequest', async (request, reply) => {
    if (state === 'closing' && request.method === 'POST') return reply.problem('draining', { retryAfter: 1 })
  })
  // On the answer, not the request: a connection whose request was in flight already would stay open for a minute.
  app.addHook('onSend', async (request, reply) => {
    if (state !== 'serving') reply.header('connection', 'close')
  })
})
