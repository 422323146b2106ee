import { setTimeout as sleep } from 'node:timers/promises'
import { Readable } from 'node:stream'
import { createGzip, gunzipSync } from 'node:zlib'
import Fastify, { type FastifyError, type FastifyReply, type FastifyRequest } from 'fastify'
import { readImport, readTrack } from './bodies.ts'
import { createEndpoints, TOO_LARGE, type Answer, type EndpointOptions, type Params } from './endpoints.ts'
import { viewOf } from './event-view.ts'
import { createFaultScript, FAULTS, isProcessed } from './faults.ts'
import { exportLines } from './export.ts'
import { createLedger, type LedgerOptions } from './ledger.ts'
import { serveOwnRoutes } from './own-routes.ts'
import { createRefusals, type Refusal } from './refusals.ts'

/** A request to one of Mixpanel's paths, recorded for tests. */
export interface Received { method: string, url: string, headers: FastifyRequest['headers'], body: string }

/** The service account of the sandbox alone and of the demo, in the project 1. */
export const SANDBOX_ACCOUNT = 'sandbox-account:sandbox-secret'

/** The bounds on memory of a sandbox that runs for long: some 20,000 events, and as many ids. */
export const SANDBOX_BOUNDS = { maxBytes: 4 * 1024 * 1024, maxIds: 20_000 }

export type Sandbox = ReturnType<typeof createSandbox>

/** A larger body is not parsed for the page if a fault ends its request. */
const MAX_SHOWN_BODY = 64 * 1024

/**
 * An imitation of Mixpanel, not yet listening; the caller closes `app`. endpoints.ts and ledger.ts have the known
 * behaviour of `/track` and `/import`. The ledger and the fault script are also served on `/__sandbox`, and on `/` as a
 * page. With `maxBytes` it does not record requests.
 */
export function createSandbox (options: EndpointOptions & LedgerOptions & { exportLagMs?: number } = {}) {
  const ledger = createLedger(options)
  const refusals = createRefusals()
  const endpoints = createEndpoints(options, ledger, refusals)
  const faults = createFaultScript()
  const requests: Received[] = []
  const app = Fastify({
    bodyLimit: 10 * 1024 * 1024, forceCloseConnections: true, routerOptions: { ignoreTrailingSlash: true }
  })

  /** Answers with the next fault, or as Mixpanel would. `read` returns the events of the body. */
  async function answer (
    endpoint: Refusal['endpoint'], request: FastifyRequest, reply: FastifyReply, respond: () => Answer, read: Read
  ) {
    if (options.maxBytes === undefined) requests.push(recordOf(request))
    changed()
    const fault = faults.next()
    if (fault === undefined) return send(reply, respond())
    const reason = `${fault.name}: ${isProcessed(fault) ? 'processed all the same' : 'not processed'}`
    refusals.add({ endpoint, kind: 'fault', reason, events: eventsOf(request, read) })
    if (fault.retry_after !== undefined) reply.header('retry-after', fault.retry_after)
    if (fault.name in FAULTS) {
      FAULTS[fault.name as keyof typeof FAULTS](reply)
      return reply
    }
    if (fault.name === 'wait' || fault.name === 'slow_zero') await sleep(fault.ms)
    if (fault.name === 'slow_zero') return send(reply, { status: 200, body: '0' })
    if (fault.name === 'reset_after') request.raw.socket.resetAndDestroy()
    if (fault.name === 'cut') setTimeout(() => request.raw.socket.destroy(), fault.ms)
    if (fault.name === 'close_idle') reply.raw.on('finish', () => setTimeout(() => request.raw.socket.destroy(), 20))
    changed()
    return send(reply, respond())
  }

  app.addHook('onRequest', async (request, reply) => {
    // A fragment belongs to the documentation's URL, not on the wire: a client that sends one must fail.
    if (/#|%23/.test(request.url)) return reply.code(404).send({ error: 'a fragment was sent', status: 0 })
  })
  app.setErrorHandler<FastifyError>((error, request, reply) => error.statusCode === 413
    ? send(reply, TOO_LARGE)
    : reply.code(error.statusCode ?? 500).send({ error: error.message, status: 0 }))
  app.removeAllContentTypeParsers()
  app.addContentTypeParser('*', { parseAs: 'buffer' }, async (request: FastifyRequest, body: Buffer) => {
    if (request.headers['content-encoding'] !== 'gzip') return body
    try {
      return gunzipSync(body)
    } catch {
      throw Object.assign(new Error('bad gzip'), { statusCode: 400 })
    }
  })

  app.route({
    method: ['GET', 'POST'],
    url: '/track',
    handler: (request, reply) => answer('track', request, reply, () => {
      const { params, data } = readTrack(request)
      return endpoints.track(params, data)
    }, request => readTrack(request).data)
  })
  app.post('/import', (request, reply) => answer('import', request, reply, () => {
    return endpoints.import(request.query as Params, basicOf(request), readImport(request))
  }, readImport))
  app.get('/api/2.0/export', (request, reply) => answer('export', request, reply, () => {
    const query = request.query as Params
    const refusal = endpoints.refuseExport(query, basicOf(request))
    if (refusal !== undefined) return refusal
    const lines = Readable.from(exportLines(ledger.rows(), query, options.exportLagMs ?? 0))
    const isGzip = request.headers['accept-encoding']?.includes('gzip') === true
    if (isGzip) reply.header('content-encoding', 'gzip')
    return { status: 200, type: 'application/octet-stream', body: isGzip ? lines.pipe(createGzip()) : lines }
  }, () => []))
  for (const url of ['/track', '/import']) {
    app.options(url, async (request, reply) => reply.code(204).header('access-control-allow-origin', '*').send())
  }
  app.setNotFoundHandler(async ({ url }, reply) =>
    reply.code(/^\/(track|import)\b/.test(url) ? 405 : 404).send({ error: 'unknown path or method', status: 0 }))

  const changed = serveOwnRoutes(app, { mode: options.mode ?? 'original', ledger, refusals, faults })
  return { app, ledger, faults, requests }
}

type Body = Pick<FastifyRequest, 'query' | 'headers' | 'body'>
type Read = (request: Body) => unknown

function recordOf ({ method, url, headers, body }: FastifyRequest): Received {
  return { method, url, headers, body: String(body ?? '') }
}

/** Returns a function that parses the events of a request. It holds the body, but not the request. */
function eventsOf ({ query, headers, body }: FastifyRequest, read: Read): Refusal['events'] {
  if (((body as Buffer | undefined)?.length ?? 0) > MAX_SHOWN_BODY) return () => []
  return () => [read({ query, headers, body })].flat().map(event => viewOf(event as object))
}

function send (reply: FastifyReply, { status, body, type, location }: Answer): FastifyReply {
  if (location !== undefined) reply.header('location', location)
  if (type !== undefined || typeof body === 'string') reply.type(type ?? 'text/plain')
  return reply.code(status).send(body)
}

/** Returns the credentials of Basic auth, as `user:secret`. */
const basicOf = ({ headers }: FastifyRequest) =>
  Buffer.from(headers.authorization?.replace(/^Basic /, '') ?? '', 'base64').toString()
