import type { Socket } from 'node:net'
import Fastify, { type FastifyInstance } from 'fastify'
import type { openMetrics } from '../metrics.ts'
import { problemBody, PROBLEMS } from './problem.ts'
import type { Status } from './status.ts'

/** Scrapers and probes need a few. Beyond it the oldest one is closed, so that nothing keeps Prometheus out. */
const MAX_CONNECTIONS = 64

/** A request that is incomplete after this time is refused, and so is its connection. */
const REQUEST_TIMEOUT_MS = 5000

/** One rendering serves all requests that come within this time: it takes some milliseconds of CPU. */
const MAX_AGE_MS = 250

interface Options {
  metrics: Pick<Awaited<ReturnType<typeof openMetrics>>, 'contentType' | 'render' | 'announce'>
  status: Pick<Status, 'report' | 'snapshot'>
}

/** Returns the app of METRICS_PORT, not yet listening: `/metrics` for Prometheus, and `/status`. */
export function buildMetricsApp ({ metrics, status }: Options): FastifyInstance {
  const app: FastifyInstance = Fastify({
    forceCloseConnections: true,
    requestTimeout: REQUEST_TIMEOUT_MS,
    // Node looks for late requests every 30 s.
    http: { connectionsCheckingInterval: 1000 },
    routerOptions: { ignoreTrailingSlash: true },
    // No route has a body.
    bodyLimit: 1
  })
  const connections = new Set<Socket>()
  app.server.on('connection', (socket: Socket) => {
    connections.add(socket)
    socket.on('close', () => connections.delete(socket))
    if (connections.size > MAX_CONNECTIONS) [...connections][0]?.destroy()
  })
  metrics.announce(Object.keys(PROBLEMS))
  const render = shared(async () => metrics.render(await status.snapshot()))
  const report = shared(status.report)

  app.addHook('onSend', (request, reply, payload, done) => {
    reply.headers({ 'cache-control': 'no-store', 'x-content-type-options': 'nosniff' })
    done(null, payload)
  })
  app.get('/metrics', async (request, reply) => reply.type(metrics.contentType).send(await render()))
  app.get('/status', async (request, reply) => {
    const state = await report()
    return reply.code(state.status === 'ok' ? 200 : 503).send(state)
  })

  app.setNotFoundHandler(async ({ id }, reply) => {
    const body = problemBody('not_found', id, { detail: 'This port has GET /metrics and GET /status.' })
    return reply.code(404).header('content-type', 'application/problem+json').send(Buffer.from(JSON.stringify(body)))
  })
  return app
}

/** Returns a function with the result of `work`, which runs at most once in MAX_AGE_MS. */
function shared<Result> (work: () => Promise<Result>): () => Promise<Result> {
  let result: Promise<Result> | undefined
  return () => {
    if (result === undefined) {
      result = work()
      setTimeout(() => { result = undefined }, MAX_AGE_MS).unref()
    }
    return result
  }
}
