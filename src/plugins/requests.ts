import { randomUUID } from 'node:crypto'
import type { IncomingMessage } from 'node:http'
import fp from 'fastify-plugin'

/** What the log says of an answer besides its status: the problem's code, its cause, the event's $insert_id. */
export interface Outcome { code?: string, cause?: string, insert_id?: string }

declare module 'fastify' {
  interface FastifyReply { outcome: Outcome }
  /** How many requests wait for their answer. */
  interface FastifyInstance { inFlight: () => number }
  /** `quiet`: the route's requests are not logged. */
  interface FastifyContextConfig { quiet?: boolean }
}

/** The caller's `x-request-id` where it is fit for logs and headers, else a new one. */
export function requestId ({ headers }: Pick<IncomingMessage, 'headers'>): string {
  const given = headers['x-request-id']
  return typeof given === 'string' && /^[\w.:=@/+-]{1,128}$/.test(given) ? given : randomUUID()
}

/** What holds for every request: its id, one log line, and no request that two servers could read in two ways. */
export const requests = fp(async app => {
  let inFlight = 0
  app.decorate('inFlight', () => inFlight)
  app.decorateReply('outcome', null as unknown as Outcome)

  app.addHook('onRequest', async (request, reply) => {
    inFlight++
    reply.outcome = {}
    reply.header('x-request-id', request.id)
    if (request.method === 'POST') reply.header('cache-control', 'no-store')
    const { rawHeaders, httpVersion } = request.raw
    const hosts = rawHeaders.filter((name, index) => index % 2 === 0 && name.toLowerCase() === 'host').length
    if (httpVersion === '0.9' || hosts > 1 || (hosts === 0 && httpVersion === '1.1')) {
      const errors = [{ pointer: '', detail: 'must name an HTTP version and exactly one Host' }]
      return reply.header('connection', 'close').problem('invalid_request', { errors })
    }
    const encoding = request.headers['content-encoding'] ?? 'identity'
    if (encoding !== 'identity') return reply.problem('unsupported_media_type')
  })

  app.addHook('onResponse', async (request, reply) => {
    inFlight--
    const { url, config } = request.routeOptions
    if (config.quiet) return
    request.log.info({
      method: request.method,
      route: url ?? null,
      status: reply.statusCode,
      ms: Math.round(reply.elapsedTime * 10) / 10,
      request_id: request.id,
      caller: 'anonymous',
      ...reply.outcome
    }, 'answered')
  })
})
