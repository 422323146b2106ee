import Fastify, { type FastifyInstance } from 'fastify'
import type { Logger } from 'pino'
import { createSlices } from '../concurrency/slices.ts'
import { isLoopback, type Config } from '../config.ts'
import { throttledError, type AccessLine } from '../log.ts'
import type { Redis } from '../redis.ts'
import type { Relay } from '../relay/relay.ts'
import { createBodies } from './body.ts'
import { createConnections } from './connections.ts'
import { framing } from './plugins/framing.ts'
import { corsHeaders, origins } from './plugins/origins.ts'
import { handleFrameworkError, handleClientError, problems } from './plugins/problems.ts'
import { rateLimits } from './plugins/rate-limit.ts'
import { requestId, requestLog } from './plugins/request-log.ts'
import { shutdown } from './plugins/shutdown.ts'
import { Problem } from './problem.ts'
import { batch } from './routes/batch.ts'
import { docs } from './routes/docs.ts'
import { health } from './routes/health.ts'
import { identify } from './routes/identify.ts'

/** So much of one turn of the event loop may be spent on large bodies, all of them together. */
const SLICE_MS = 5

/** How often it is said that connections cannot be accepted. */
const COMPLAINT_MS = 60_000

export interface Dependencies {
  relay: Relay
  /** For limits that all relays share. */
  redis?: Redis | undefined
  logger: Logger
  logRequest: (line: AccessLine) => void
  /** The OpenAPI document, made when somebody asks for it. */
  document: () => Promise<object>
  /** Called before there is any route. */
  prepare?: (app: FastifyInstance) => Promise<void>
}

/**
 * The path of an identity: a connection that may be open (connections) brings a POST. It gets its id (request-log), and
 * is refused if its caller comes too often (rate-limit), if a browser sends it from a foreign page (origins), if the
 * relay closes (shutdown), or if two servers could read it in two ways (framing). Its body is read within a bound on
 * all bodies (body), parsed, and validated by routes/identify, which hands it to the relay. There it becomes an event
 * and joins a batch (batcher), which is sent and if need be repeated (delivery), with the token (client); what came
 * back is read (verdict), and each identity's verdict becomes its answer (problem). Where there is an outbox, what
 * Mixpanel cannot take now is put there before its answer (store-and-forward), and delivered later (forwarder).
 *
 * Returns the app, not yet listening; `app.close()` lets requests in flight finish and then stops the relay.
 */
export async function buildApp (config: Config, { relay, redis, logger, logRequest, document, prepare }: Dependencies) {
  const logError = throttledError((what, message) => logger.error(what, message), COMPLAINT_MS)
  const connections = createConnections({
    config,
    charge: (address, count) => app.charge(address, count),
    onError: ({ message }) => logError({ cause: message }, 'accepting connections failed')
  })
  const app: FastifyInstance = Fastify({
    serverFactory: connections.serverFactory,
    genReqId: requestId,
    requestIdHeader: false,
    trustProxy: config.TRUST_PROXY.length > 0 ? config.TRUST_PROXY : false,
    // plugins/shutdown answers instead, with a problem.
    return503OnClosing: false,
    clientErrorHandler: handleClientError(logger, connections),
    frameworkErrors: handleFrameworkError(logger),
    ajv: {
      // Refuse, never coerce or drop; `verbose` leads from an error to the description of the rule.
      customOptions: { coerceTypes: false, removeAdditional: false, useDefaults: false, allErrors: true, verbose: true }
    }
  })
  app.addHook('onClose', () => relay.stop())
  const methods = collectMethods(app)

  // Fastify itself logs nothing: two lines for each request would cost as much as all the rest of it.
  await app.register(requestLog, { logRequest })
  await app.register(problems, { logger })
  await app.register(corsHeaders, { config })
  await app.register(rateLimits, { config, redis, log: logger })
  await app.register(origins, { config })
  await app.register(shutdown, { relay })
  await app.register(framing)
  await app.register(connections.hooks)
  await prepare?.(app)
  app.addSchema(Problem)
  app.setNotFoundHandler(async ({ url }, reply) => {
    const allowed = methods.get(url.split('?')[0] as string)
    return allowed === undefined
      ? reply.problem('not_found')
      : reply.header('allow', allowed.join(', ')).problem('method_not_allowed')
  })
  // Nearly every answer is one constant or a problem; compiled serializers for the rest would only lengthen the start.
  app.setSerializerCompiler(() => data => JSON.stringify(data))
  // The identity routes have parsers of their own. The body of what is not found is not read.
  app.removeAllContentTypeParsers()

  const bodies = createBodies({ config, spend: connections.spend })
  const parts = () => ({ connections: connections.count(), bytes_in_flight: bodies.bytesInFlight(), ...relay.state() })
  await app.register(health, { parts })
  if (config.DOCS ?? isLoopback(config.HOST)) await app.register(docs, { document })
  const nextSlice = createSlices(SLICE_MS)
  await app.register(identify, { relay, bodies, nextSlice })
  await app.register(batch, { relay, config, bodies, nextSlice })
  return app
}

/** The methods of every route by its path, as they are registered: no caller's text ever reaches a route's pattern. */
function collectMethods (app: FastifyInstance): ReadonlyMap<string, string[]> {
  const methods = new Map<string, string[]>()
  app.addHook('onRoute', ({ url, method }) => {
    methods.set(url, [...methods.get(url) ?? [], ...[method].flat()])
  })
  return methods
}
