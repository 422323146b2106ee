import { randomBytes } from 'node:crypto'
import type { IncomingMessage } from 'node:http'
import type { FastifyReply } from 'fastify'
import fp from 'fastify-plugin'
import type { AccessLine } from '../../log.ts'
import type { IdentityOutcome, Metrics } from '../../metrics.ts'

/** What a handler adds to the access log. An accepted identity has no details, which are dearer to print. */
export type LogLine = Pick<AccessLine, 'insertId' | 'sent'> & {
  details: Details | undefined
  /** The outcome of each identity of a batch, for the metrics. Other requests have one identity. */
  outcomes: Outcome[] | undefined
}

/** What became of so many identities. */
export interface Outcome { outcome: IdentityOutcome, code: string, count: number }

/** `code` and `cause` belong to a problem, counts to a batch. */
export interface Details {
  code?: string
  cause?: string
  /** The broken fields of a 400. */
  pointers?: string[]
  /** The trace of the caller's `traceparent` (W3C Trace Context). */
  trace_id?: string
  /** Of an SDK's request: how many events it has, and how many of them a rule or Mixpanel refused. */
  events?: number
  refused?: number
  identities?: number
  queued?: number
  failed?: number
  /** The `$insert_id` of each identity that was accepted or queued. */
  insert_ids?: string[]
  /** Of a request without a route, and of one from a foreign page: masked, and at most 100 characters. */
  path?: string
  origin?: string
}

declare module 'fastify' {
  interface FastifyReply { logLine: LogLine }
  interface FastifyRequest {
    /** The value of `routeOptions`, read once: Fastify makes a new object on each access. */
    route: FastifyRequest['routeOptions']
    /** When the request began, by performance.now(). */
    since: number
  }
  interface FastifyContextConfig {
    /** Requests of this route are neither logged nor counted nor rate limited. */
    unlogged?: boolean
    /** How many identities a request of this route has. */
    identities?: 'one' | 'many'
  }
}

/** Counts the identities of a request. Those of a batch that was refused before it was read are unknown. */
function countIdentities (
  { statusCode, logLine: { outcomes = [], insertId, details } }: FastifyReply, identities: 'one' | 'many',
  metrics: Metrics
): void {
  for (const { outcome, code, count } of outcomes) metrics.identities(outcome, code, count)
  if (identities === 'many') return
  if (statusCode === 202) metrics.identities('queued', 'queued')
  else if (statusCode !== 200) metrics.identities('failed', String(details?.code))
  else if (insertId === undefined) metrics.identities('dry_run', 'dry_run')
  else metrics.identities('accepted', 'accepted')
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

interface Options { logRequest: (line: AccessLine) => void, metrics: Metrics }

/**
 * Gives every request an id, and counts and logs it when its response is ready, even when the client has disconnected.
 * These hooks run for every identity, so they create no promises.
 */
export const requestLog = fp<Options>(async (app, { logRequest, metrics }) => {
  app.decorateReply('logLine')
  app.decorateRequest('route')
  app.decorateRequest('since', 0)

  app.addHook('onRequest', (request, reply, done) => {
    request.route = request.routeOptions
    request.since = performance.now()
    const trace = traceId(request.headers.traceparent)
    const details = trace === undefined ? undefined : { trace_id: trace }
    reply.logLine = { insertId: undefined, sent: undefined, details, outcomes: undefined }
    reply.header('x-request-id', request.id)
    done()
  })

  app.addHook('onSend', ({ route, since, method, id, caller }, reply, payload, done) => {
    if (!route.config.unlogged) {
      const ms = Math.round((performance.now() - since) * 10) / 10
      const { insertId, sent, details } = reply.logLine
      const { statusCode: status } = reply
      const { label } = caller
      metrics.request(method, route.url, status, ms)
      if (status === 429) metrics.rateLimited(caller.kind)
      if (route.config.identities !== undefined) countIdentities(reply, route.config.identities, metrics)
      logRequest({ method, route: route.url, status, ms, requestId: id, caller: label, insertId, sent, details })
    }
    done(null, payload)
  })
})
