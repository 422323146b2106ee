import { randomBytes } from 'node:crypto'
import type { IncomingMessage } from 'node:http'
import fp from 'fastify-plugin'
import type { AccessLine } from '../../log.ts'

/** What a handler adds to the access log: the problem's code, its cause, the event's $insert_id. */
export interface LogLine {
  code?: string
  cause?: string
  insert_id?: string
  identities?: number
  queued?: number
  failed?: number
}

declare module 'fastify' {
  interface FastifyReply { logLine: LogLine }
  interface FastifyRequest {
    /** What `routeOptions` says of the route, asked once: Fastify makes a new object each time. */
    route: FastifyRequest['routeOptions']
    /** When it began, by performance.now(). */
    since: number
  }
  /** `quiet`: the route's requests are not logged. */
  interface FastifyContextConfig { unlogged?: boolean }
}

const instance = randomBytes(8).toString('hex')
let count = 0

/** The caller's `x-request-id` where it is fit for logs and headers, else a new one. */
export function requestId ({ headers }: Pick<IncomingMessage, 'headers'>): string {
  const given = headers['x-request-id']
  return typeof given === 'string' && /^[\w.:=@/+-]{1,128}$/.test(given) ? given : `${instance}-${++count}`
}

/**
 * Gives every request an id, and a log line when its response is ready, even if the client has gone by then. These
 * hooks run for every identity, so they make no promises.
 */
export const requestLog = fp<{ logRequest: (line: AccessLine) => void }>(async (app, { logRequest }) => {
  app.decorateReply('logLine')
  app.decorateRequest('route')
  app.decorateRequest('since', 0)

  app.addHook('onRequest', (request, reply, done) => {
    request.route = request.routeOptions
    request.since = performance.now()
    reply.logLine = {}
    reply.header('x-request-id', request.id)
    if (request.method === 'POST') reply.header('cache-control', 'no-store')
    done()
  })

  app.addHook('onSend', ({ route, since, method, id }, reply, payload, done) => {
    if (!route.config.unlogged) {
      const ms = Math.round((performance.now() - since) * 10) / 10
      logRequest({ method, route: route.url, status: reply.statusCode, ms, requestId: id, details: reply.logLine })
    }
    done(null, payload)
  })
})
