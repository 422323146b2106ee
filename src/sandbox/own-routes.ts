import type { FastifyInstance } from 'fastify'
import { parse } from './bodies.ts'
import { createFeed, type Sources } from './feed.ts'
import { isFault, type Fault } from './faults.ts'
import { requireOwnOrigin } from './own-origin.ts'
import { servePage, setPageHeaders } from './page.ts'
import { createStreams } from './streams.ts'

/** Faults that may wait. */
const MAX_SCRIPT = 1000

/**
 * Serves the page, and the sandbox's own paths on `/__sandbox`, which imitate nothing. Returns a function that tells
 * the open pages that something has changed.
 */
export function serveOwnRoutes (app: FastifyInstance, sources: Sources): () => void {
  const { ledger, refusals, faults } = sources
  const streams = createStreams(createFeed(sources))
  app.addHook('onClose', async () => streams.close())
  const own = { onRequest: [setPageHeaders, requireOwnOrigin] }

  servePage(app)
  app.get('/__sandbox/livez', async () => ({ status: 'alive' }))
  app.get('/__sandbox/events', own, async () => ({
    events: ledger.rows(), deduplicated: ledger.deduplicated().length
  }))
  // A HEAD request would keep a stream that nothing reads.
  app.get('/__sandbox/stream', { ...own, exposeHeadRoute: false }, async (request, reply) => streams.open(reply))
  app.post('/__sandbox/faults', own, async (request, reply) => {
    const script = parse(String(request.body))
    if (!Array.isArray(script)) return reply.code(400).send({ error: 'send a JSON array of faults', status: 0 })
    const unknown = script.filter(fault => !isFault(fault))
    if (unknown.length > 0) {
      return reply.code(400).send({ error: `not a fault: ${JSON.stringify(unknown[0])}`, status: 0 })
    }
    if (faults.pending().length + script.length > MAX_SCRIPT) {
      return reply.code(400).send({ error: `more than ${MAX_SCRIPT} faults`, status: 0 })
    }
    faults.add(...script as Fault[])
    streams.changed()
    return reply.code(204).send()
  })
  app.delete('/__sandbox/faults', own, async (request, reply) => {
    faults.clear()
    streams.changed()
    return reply.code(204).send()
  })
  app.delete('/__sandbox', own, async (request, reply) => {
    for (const part of [ledger, refusals, faults]) part.clear()
    streams.changed()
    return reply.code(204).send()
  })
  return streams.changed
}
