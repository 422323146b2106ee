import type { Server } from 'node:http'
import { setImmediate } from 'node:timers/promises'
import fp from 'fastify-plugin'
import type { Relay } from '../../relay/relay.ts'

declare module 'fastify' {
  interface FastifyInstance {
    /** Makes the relay not ready, and makes every response close its connection. Requests are still served. */
    beginShutdown: () => void
    /** Returns true after `beginShutdown` or `close`. */
    isShuttingDown: () => boolean
  }
}

/** How long a connection may take, after `close`, to complete a request that it has begun. */
const LAST_REQUEST_MS = 500

/** The longest time before `close` to accept pending connections, one in each turn of the event loop. */
const ACCEPT_MS = 500

/** The turns of the event loop that read and begin the request of a new connection. */
const QUIET_TURNS = 3

/** Ends the app in two steps: `beginShutdown` sends callers elsewhere, and `close` refuses further identities. */
export const shutdown = fp<{ relay: Relay }>(async (app, { relay }) => {
  let state: 'serving' | 'draining' | 'closing' = 'serving'
  let timer: NodeJS.Timeout | undefined
  app.decorate('beginShutdown', () => { state = 'draining' })
  app.decorate('isShuttingDown', () => state !== 'serving')
  app.addHook('preClose', async () => {
    await acceptPendingConnections(app.server)
    state = 'closing'
    // A closing server waits for every connection, even a silent or stalled one, and no longer times any of them out.
    let isIdle = false
    timer = setInterval(() => {
      if (isIdle) app.server.closeAllConnections()
      isIdle = relay.state().in_flight === 0
    }, LAST_REQUEST_MS / 2)
  })
  app.addHook('onClose', async () => clearInterval(timer))
  app.addHook('onRequest', (request, reply, done) => {
    const hasEffect = request.method === 'POST' || request.route.config.sdk !== undefined
    if (state === 'closing' && hasEffect) return reply.problem('draining', { retryAfter: 1 })
    done()
  })
})

/** Resolves when pending connections are accepted. After a stall, `close` may run before Node has read what came. */
async function acceptPendingConnections (server: Server): Promise<void> {
  let connections = 0
  server.on('connection', () => connections++)
  const end = performance.now() + ACCEPT_MS
  for (let quiet = 0, before = 0; quiet < QUIET_TURNS && performance.now() < end; before = connections) {
    await setImmediate()
    quiet = connections === before ? quiet + 1 : 0
  }
}
