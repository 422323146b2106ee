import type { Server } from 'node:http'
import { setImmediate } from 'node:timers/promises'
import fp from 'fastify-plugin'
import type { Relay } from '../../relay/relay.ts'

declare module 'fastify' {
  interface FastifyInstance {
    /** From now on not ready, and every answer closes its connection; requests are still served. */
    beginShutdown: () => void
    isShuttingDown: () => boolean
  }
}

/** How long a connection may still take, once we close, to bring a request that it began before. */
const LAST_REQUEST_MS = 500

/** How long we may take, before we close, to accept the connections that wait, one in a turn of the event loop. */
const LAST_LOOK_MS = 500

/** In so many turns a new connection's request is read and begun. */
const QUIET_TURNS = 3

/** A process ends in two steps: `drain` sends callers elsewhere, `close` refuses those who come all the same. */
export const shutdown = fp<{ relay: Relay }>(async (app, { relay }) => {
  let state: 'serving' | 'draining' | 'closing' = 'serving'
  let timer: NodeJS.Timeout | undefined
  app.decorate('beginShutdown', () => { state = 'draining' })
  app.decorate('isShuttingDown', () => state !== 'serving')
  app.addHook('preClose', async () => {
    await acceptPendingConnections(app.server)
    state = 'closing'
    // Node waits for every connection, silent and stalled ones included, and once it closes it times none of them out.
    let isIdle = false
    timer = setInterval(() => {
      if (isIdle) app.server.closeAllConnections()
      isIdle = relay.state().in_flight === 0
    }, LAST_REQUEST_MS / 2)
  })
  app.addHook('onClose', async () => clearInterval(timer))
  app.addHook('onRequest', (request, reply, done) => {
    if (state === 'closing' && request.method === 'POST') return reply.problem('draining', { retryAfter: 1 })
    done()
  })
})

/** Where the process got no time for a while, it is told to close before it has read what came meanwhile. */
async function acceptPendingConnections (server: Server): Promise<void> {
  let connections = 0
  server.on('connection', () => connections++)
  const end = performance.now() + LAST_LOOK_MS
  for (let quiet = 0, before = 0; quiet < QUIET_TURNS && performance.now() < end; before = connections) {
    await setImmediate()
    quiet = connections === before ? quiet + 1 : 0
  }
}
