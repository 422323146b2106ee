import { setTimeout as sleep } from 'node:timers/promises'
import { Readable } from 'node:stream'
import { createGzip, gunzipSync } from 'node:zlib'
import Fastify, { type FastifyError, type FastifyReply, type FastifyRequest } from 'fastify'
import { createEndpoints, TOO_LARGE, type Answer, type EndpointOptions, type Params } from './endpoints.ts'
import { createFaultScript, FAULTS, isFault, type Fault } from './faults.ts'
import { exportLines } from './export.ts'
import { createLedger, type LedgerOptions } from './ledger.ts'

/** A request to one of Mixpanel's paths, recorded for tests. */
export interface Received { method: string, url: string, headers: FastifyRequest['headers'], body: string }

/** The service account of the sandbox alone and of the demo, in the project 1. */
export const SANDBOX_ACCOUNT = 'sandbox-account:sandbox-secret'

export type Sandbox = ReturnType<typeof createSandbox>

/**
 * An imitation of Mixpanel, not yet listening; the caller closes `app`. endpoints.ts and ledger.ts have the known
 * behaviour of `/track` and `/import`. The ledger and the fault script are also served on `/__sandbox`.
 */
export function createSandbox (options: EndpointOptions & LedgerOptions & { exportLagMs?: number } = {}) {
  const ledger = createLedger(options)
  const endpoints = createEndpoints(options, ledger)
  const faults = createFaultScript()
  const requests: Received[] = []
  const app = Fastify({
    bodyLimit: 10 * 1024 * 1024, forceCloseConnections: true, routerOptions: { ignoreTrailingSlash: true }
  })

  /** Answers with the next fault, or as Mixpanel would. */
  async function answer (request: FastifyRequest, reply: FastifyReply, respond: () => Answer) {
    const { method, url, headers, body } = request
    requests.push({ method, url, headers, body: String(body ?? '') })
    const fault = faults.next()
    if (fault?.retry_after !== undefined) reply.header('retry-after', fault.retry_after)
    if (fault !== undefined && fault.name in FAULTS) {
      FAULTS[fault.name as keyof typeof FAULTS](reply)
      return reply
    }
    if (fault?.name === 'wait' || fault?.name === 'slow_zero') await sleep(fault.ms)
    if (fault?.name === 'slow_zero') return send(reply, { status: 200, body: '0' })
    if (fault?.name === 'reset_after') request.raw.socket.resetAndDestroy()
    if (fault?.name === 'cut') setTimeout(() => request.raw.socket.destroy(), fault.ms)
    if (fault?.name === 'close_idle') reply.raw.on('finish', () => setTimeout(() => request.raw.socket.destroy(), 20))
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

  app.get('/', async () => ({ error: 'Welcome. Get started with our API by visiting https://developer.mixpanel.com/' }))
  app.route({
    method: ['GET', 'POST'],
    url: '/track',
    handler: (request, reply) => answer(request, reply, () => {
      const body = String(request.body ?? '')
      const query = request.query as Params
      if (request.headers['content-type']?.startsWith('application/json')) return endpoints.track(query, parse(body))
      const params: Params = { ...query, ...Object.fromEntries(new URLSearchParams(body)) }
      return endpoints.track(params, params.data ? parseData(params.data) : undefined)
    })
  })
  app.post('/import', (request, reply) => answer(request, reply, () => {
    return endpoints.import(request.query as Params, basicOf(request), parseLines(String(request.body)))
  }))
  app.get('/api/2.0/export', (request, reply) => answer(request, reply, () => {
    const query = request.query as Params
    const refusal = endpoints.refuseExport(query, basicOf(request))
    if (refusal !== undefined) return refusal
    const lines = Readable.from(exportLines(ledger.rows(), query, options.exportLagMs ?? 0))
    const isGzip = request.headers['accept-encoding']?.includes('gzip') === true
    if (isGzip) reply.header('content-encoding', 'gzip')
    return { status: 200, type: 'application/octet-stream', body: isGzip ? lines.pipe(createGzip()) : lines }
  }))
  for (const url of ['/track', '/import']) {
    app.options(url, async (request, reply) => reply.code(204).header('access-control-allow-origin', '*').send())
  }
  app.setNotFoundHandler(async ({ url }, reply) =>
    reply.code(/^\/(track|import)\b/.test(url) ? 405 : 404).send({ error: 'unknown path or method', status: 0 }))

  app.get('/__sandbox/livez', async () => ({ status: 'alive' }))
  app.get('/__sandbox/events', async () => ({ events: ledger.rows(), deduplicated: ledger.deduplicated().length }))
  app.post('/__sandbox/faults', async (request, reply) => {
    const script = parse(String(request.body))
    if (!Array.isArray(script)) return reply.code(400).send({ error: 'send a JSON array of faults', status: 0 })
    const unknown = script.filter(fault => !isFault(fault))
    if (unknown.length > 0) {
      return reply.code(400).send({ error: `not a fault: ${JSON.stringify(unknown[0])}`, status: 0 })
    }
    faults.add(...script as Fault[])
    return reply.code(204).send()
  })
  app.delete('/__sandbox', async (request, reply) => {
    ledger.clear()
    faults.clear()
    return reply.code(204).send()
  })

  return { app, ledger, faults, requests }
}

function send (reply: FastifyReply, { status, body, type, location }: Answer): FastifyReply {
  if (location !== undefined) reply.header('location', location)
  if (type !== undefined || typeof body === 'string') reply.type(type ?? 'text/plain')
  return reply.code(status).send(body)
}

/** Returns the credentials of Basic auth, as `user:secret`. */
const basicOf = ({ headers }: FastifyRequest) =>
  Buffer.from(headers.authorization?.replace(/^Basic /, '') ?? '', 'base64').toString()

/** Parses plain JSON, or base64 in which a form parser may have turned `+` into a space; null if it is neither. */
function parseData (data: string): unknown {
  return parse(/^\s*[[{]/.test(data) ? data : Buffer.from(data.replaceAll(' ', '+'), 'base64').toString())
}

/** Parses the body of `/import`: an array, or one event per line. */
function parseLines (body: string): unknown {
  return /^\s*\[/.test(body) ? parse(body) : body.trim().split('\n').map(parse)
}

function parse (text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return null
  }
}
