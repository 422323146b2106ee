import { randomBytes } from 'node:crypto'
import type { IncomingMessage } from 'node:http'
import fp from 'fastify-plugin'
import type { AccessLine } from '../../log.ts'

/** What a handler adds to the access log. An accepted identity has no details, which are dearer to print. */
export type LogLine = Pick<AccessLine, 'insertId' | 'sent'> & { details: Details | undefined }

/** `code` and `cause` belong to a problem, counts to a batch. */
export interface Details {
  code?: string
  cause?: string
  /** The broken fields of a 400. */
  pointers?: string[]
  /** The trace of the caller's `traceparent` (W3C Trace Context). */
  trace_id?: string
  identities?: number
  queued?: number
  failed?: number
  /** The `$insert_id` of each identity that was accepted or queued. */
  insert_ids?: string[]
}

declare module 'fastify' {
  interface FastifyReply { logLine: LogLine }
  interface FastifyRequest {
    /** The value of `routeOptions`, read once: Fastify makes a new object on each access. */
    route: FastifyRequest['routeOptions']
    /** When the request began, by performance.now(). */
    since: number
  }
  /** `unlogged`: requests of this route are neither logged nor rate limited. */
  interface FastifyContextConfig { unlogged?: boolean }
}

const instance = randomBytes(8).toString('hex')
let count = 0

/** Returns the caller's `x-request-id` when it is safe in logs and headers, otherwise a new id. */
export function requestId ({ headers }: Pick<IncomingMessage, 'headers'>): string {
  const given = headers['x-request-id']
  return typeof given === 'string' && /^[\w.:=@/+-]{1,128}$/.test(given) ? given : `${instance}-${++count}`
}

/** Returns the trace id of a `traceparent` header. */
function traceId (traceparent: unknown): string | undefined {
  return traceparent === undefined ? undefined : /^00-([0-9a-f]{32})-[0-9a-f]{16}-/.exec(String(traceparent))?.[1]
}

/**
 * Gives every request an id, and a log line when its response is ready, even when the client has disconnected. These
 * hooks run for every identity, so they create no promises.
 */
export const requestLog = fp<{ logRequest: (line: AccessLine) => void }>(async (app, { logRequest }) => {
  app.decorateReply('logLine')
  app.decorateRequest('route')
  app.decorateRequest('since', 0)

  app.addHook('onRequest', (request, reply, done) => {
    request.route = request.routeOptions
    request.since = performance.now()
    const trace = traceId(request.headers.traceparent)
    const details = trace === undefined ? undefined : { trace_id: trace }
    reply.logLine = { insertId: undefined, sent: undefined, details }
    reply.header('x-request-id', request.id)
    done()
  })

  app.addHook('onSend', ({ route, since, method, id, caller }, reply, payload, done) => {
    if (!route.config.unlogged) {
      const ms = Math.round((performance.now() - since) * 10) / 10
      const { insertId, sent, details } = reply.logLine
      const { statusCode: status } = reply
      const { label } = caller
      logRequest({ method, route: route.url, status, ms, requestId: id, caller: label, insertId, sent, details })
    }
    done(null, payload)
  })
})
