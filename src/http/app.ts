import { isUtf8 } from 'node:buffer'
import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import type { Logger } from 'pino'
import type { Config } from '../config.ts'
import { draining } from './plugins/shutdown.ts'
import { framing } from './plugins/framing.ts'
import { limits } from './plugins/rate-limit.ts'
import { origins } from './plugins/origins.ts'
import { answerBadUrl, answerClientError, problems } from './plugins/problems.ts'
import { requestId, requests } from './plugins/request-log.ts'
import { Problem } from './problem.ts'
import type { Redis } from '../redis.ts'
import type { Relay } from '../relay/relay.ts'
import { batch } from './routes/batch.ts'
import { docs } from './routes/docs.ts'
import { identify } from './routes/identify.ts'
import { operations } from './routes/health.ts'

/** A valid identity has under 1 KB, or with 200 long property names some 50 KB. */
const BODY_LIMIT = 65_536

/** A request that is not complete by then is closed with 408. */
const REQUEST_TIMEOUT_MS = 10_000

/** Longer than the idle time of common load balancers (60 s), or they meet a connection that is just being closed. */
const KEEP_ALIVE_MS = 65_000

export interface Dependencies {
  relay: Relay
  /** For limits that all relays share. */
  redis?: Redis | undefined
  logger: Logger
  /** The OpenAPI document, made when somebody asks for it. */
  document: () => Promise<object>
  /** Called before there is any route. */
  prepare?: (app: FastifyInstance) => Promise<void>
}

/**
 * The path of an identity: a POST gets its id (requests) and is refused if a browser sends it from a foreign page
 * (origins), if the relay closes (draining), if two servers could read it in two ways (framing) or if its caller comes
 * too often (limits). The body is parsed here and validated by routes/identify, which hands it to the relay. There it
 * becomes an event and joins a batch (batcher), which is sent and if need be repeated (delivery), with the token
 * (mixpanel); what came back is read (verdict), and each identity's verdict becomes its answer (problem). Where there
 * is an outbox, what Mixpanel cannot take now is put there before its answer (keeper), and delivered later (drain).
 *
 * Returns the app, not yet listening; `app.close()` lets requests in flight finish and then closes the relay.
 */
export async function buildApp (config: Config, { relay, redis, logger, document, prepare }: Dependencies) {
  const app: FastifyInstance = Fastify({
    genReqId: requestId,
    requestIdHeader: false,
    trustProxy: config.TRUST_PROXY.length > 0 ? config.TRUST_PROXY : false,
    bodyLimit: BODY_LIMIT,
    requestTimeout: REQUEST_TIMEOUT_MS,
    keepAliveTimeout: KEEP_ALIVE_MS,
    // Node looks for late requests every 30 s, and swaps the two timeouts when headersTimeout is the longer. It would
    // answer a missing Host by itself, without a problem; plugins/framing does.
    http: { headersTimeout: REQUEST_TIMEOUT_MS, connectionsCheckingInterval: 500, requireHostHeader: false },
    // plugins/draining answers instead, with a problem.
    return503OnClosing: false,
    clientErrorHandler: answerClientError(logger),
    frameworkErrors: answerBadUrl(logger),
    ajv: {
      // Refuse, never coerce or drop; `verbose` leads from an error to the description of the rule.
      customOptions: { coerceTypes: false, removeAdditional: false, useDefaults: false, allErrors: true, verbose: true }
    }
  })
  app.addHook('onClose', () => relay.close())
  // Node would drop those after the thousandth in silence, an Origin among them; their size is bounded all the same.
  app.server.maxHeadersCount = 0
  // Node would answer other expectations than 100-continue by itself; a server may ignore them (RFC 9110).
  app.server.on('checkExpectation', app.routing)

  // Fastify itself logs nothing: two lines for each request would cost as much as all the rest of it.
  await app.register(requests, { logger })
  await app.register(problems, { logger })
  await app.register(origins, { config })
  await app.register(draining, { relay })
  await app.register(framing)
  await app.register(limits, { config, redis })
  await prepare?.(app)
  app.addSchema(Problem)
  app.setNotFoundHandler({ preHandler: app.rateLimit() }, async (request, reply) => {
    const url = request.url.split('?')[0] as string
    const allowed = (['GET', 'HEAD', 'POST'] as const).filter(method => app.hasRoute({ method, url }))
    return allowed.length === 0
      ? reply.problem('not_found')
      : reply.header('allow', allowed.join(', ')).problem('method_not_allowed')
  })
  // Nearly every answer is one constant or a problem; compiled serializers for the rest would only lengthen the start.
  app.setSerializerCompiler(() => data => JSON.stringify(data))
  app.removeAllContentTypeParsers()
  app.addContentTypeParser(['application/json', 'text/plain'], { parseAs: 'buffer' }, parseJson(app))

  await app.register(operations, { relay })
  await app.register(docs, { document })
  await app.register(identify, { relay })
  await app.register(batch, { relay })
  return app
}

/** JSON in UTF-8: Node would read other bytes as U+FFFD, and two users' ids could become one. */
function parseJson (app: FastifyInstance) {
  const parse = app.getDefaultJsonParser('error', 'error')
  return (request: FastifyRequest, body: Buffer, done: (error: Error | null, body?: unknown) => void) => {
    const rule = 'must be JSON in UTF-8, without __proto__ and constructor.prototype'
    const refuse = () => done(Object.assign(new Error(rule), { statusCode: 400 }))
    if (!isUtf8(body)) return refuse()
    parse(request, body.toString(), (error, value) => error === null ? done(null, value) : refuse())
  }
}
