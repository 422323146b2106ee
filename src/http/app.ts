import Fastify, { type FastifyInstance } from 'fastify'
import type { Logger } from 'pino'
import { createSlices } from '../concurrency/slices.ts'
import type { Config } from '../config.ts'
import { isLoopback } from '../environment.ts'
import { throttled, type AccessLine } from '../log.ts'
import { NO_METRICS, type Metrics } from '../metrics.ts'
import { createIdentityRules } from '../identity/identity.ts'
import { redisOutage, type Redis, type RedisOutage } from '../redis.ts'
import type { Relay } from '../relay/relay.ts'
import { createBodies } from './body.ts'
import { createCallerText } from './caller-text.ts'
import type { UserTokens } from './callers/user-tokens.ts'
import { createConnections } from './connections.ts'
import { authorization, callers } from './plugins/callers.ts'
import { framing } from './plugins/framing.ts'
import { corsHeaders, origins } from './plugins/origins.ts'
import { handleFrameworkError, handleClientError, problems } from './plugins/problems.ts'
import { rateLimits } from './plugins/rate-limit.ts'
import { requestId, requestLog } from './plugins/request-log.ts'
import { securityHeaders } from './plugins/security-headers.ts'
import { shutdown } from './plugins/shutdown.ts'
import { isSdkPath } from './sdk-paths.ts'
import { batch } from './routes/batch.ts'
import { docs } from './routes/docs.ts'
import { health } from './routes/health.ts'
import { identify } from './routes/identify.ts'

/** Time in one turn of the event loop for all large bodies together. */
const SLICE_MS = 5

const NO_COMPAT = 'This relay does not take the place of api.mixpanel.com. Identities go to POST /identify; ' +
  'with COMPAT=events it serves the SDKs of Mixpanel.'

declare module 'fastify' {
  interface FastifyInstance {
    /** Takes the secrets of a changed configuration, from the next request on. */
    useSecrets: (config: Config) => void
    /** Returns the open connections, and the bytes of all bodies in flight. */
    load: () => { connections: number, bytes_in_flight: number }
  }
}

export interface Dependencies {
  relay: Relay
  redis?: Redis | undefined
  /** Required if the configuration has user tokens. */
  tokens?: UserTokens | undefined
  metrics?: Metrics | undefined
  logger: Logger
  logRequest: (line: AccessLine) => void
  document: () => Promise<object>
  /** Called before any route is registered. */
  prepare?: (app: FastifyInstance) => Promise<void>
}

/**
 * The path of an identity. A connection within the bounds (connections) carries a POST request, which gets an id
 * (request-log). Its caller is found by its credentials (callers). The request is refused when its caller exceeds the
 * rate limit (rate-limit), when a browser sends it from a foreign page (origins), when its caller may not use the route
 * (callers), when the relay is closing (shutdown), or when two servers could read it differently (framing). Its body is
 * read within a bound on all bodies (body), parsed, and validated (routes/identify). The relay
 * turns the identity into an event and adds it to a batch (batcher). The batch is sent with the token (client) and
 * retried if need be (delivery). The response is read (answer) and becomes a verdict for each identity (verdict), which
 * becomes the response to the caller (routes/responses, problem). With an outbox, an event that Mixpanel cannot accept
 * now is stored before the response (store-and-forward) and delivered later (forwarder).
 *
 * Returns the app, not yet listening. `app.close()` lets requests in flight finish and then stops the relay.
 */
export async function buildApp (config: Config, dependencies: Dependencies) {
  const { relay, redis, tokens, metrics = NO_METRICS, logger, logRequest, document, prepare } = dependencies
  const callerText = createCallerText(config)
  const logAcceptError = throttled(logger, 'error', 'accepting connections failed')
  const connections = createConnections({
    config,
    charge: (address, count) => app.charge(address, count),
    onError: ({ message }) => logAcceptError({ cause: message })
  })
  const compat = config.COMPAT === 'off' ? undefined : await import('./compat/routes.ts')
  const app: FastifyInstance = Fastify({
    serverFactory: connections.serverFactory,
    genReqId: requestId,
    requestIdHeader: false,
    routerOptions: { ignoreTrailingSlash: true },
    trustProxy: config.TRUST_PROXY.length > 0 ? config.TRUST_PROXY : false,
    // plugins/shutdown responds instead, with a problem.
    return503OnClosing: false,
    clientErrorHandler: handleClientError(logger, connections, metrics, compat?.createAnswerHead(config.CORS_ORIGINS)),
    frameworkErrors: handleFrameworkError(logger, metrics),
    ajv: {
      // Nothing is coerced or dropped. With `verbose` an error carries the description of its rule. `npm run lint`
      // validates the schemas, as openapi.yaml has them; here it would take a tenth of the time of a start.
      customOptions: {
        coerceTypes: false,
        removeAdditional: false,
        useDefaults: false,
        allErrors: true,
        verbose: true,
        validateSchema: false
      }
    }
  })
  app.addHook('onClose', () => relay.stop())
  const methods = collectMethods(app)

  // Fastify's own logging is off: its two lines for each request cost as much as the rest of the request.
  await app.register(requestLog, { logRequest, metrics })
  await app.register(securityHeaders)
  await app.register(problems, { logger })
  await app.register(corsHeaders, { config })
  await app.register(callers, { config, tokens })
  await app.register(rateLimits, { config, redis, log: logger })
  await app.register(origins, { config, callerText })
  await app.register(authorization, { config })
  await app.register(shutdown, { relay })
  await app.register(framing)
  await app.register(connections.hooks)
  await prepare?.(app)
  app.setNotFoundHandler(async ({ url }, reply) => {
    const path = url.split('?')[0] as string
    const allowed = methods.get(path.replace(/(?<=.)\/$/, ''))
    if (allowed !== undefined) return reply.header('allow', allowed.join(', ')).problem('method_not_allowed')
    reply.logLine.details = { ...reply.logLine.details, path: callerText.forLog(path) }
    return reply.problem('not_found', { detail: isSdkPath(path) ? NO_COMPAT : undefined })
  })
  // Nearly every response is a constant or a problem, so compiled serializers would only lengthen the start.
  app.setSerializerCompiler(() => data => JSON.stringify(data))
  // The identity routes have their own parsers. The body of a request without a route is not read.
  app.removeAllContentTypeParsers()

  const bodies = createBodies({ config, recordCost: connections.recordCost })
  const load = () => ({ connections: connections.count(), bytes_in_flight: bodies.bytesInFlight() })
  const parts = () => ({
    ...load(), jwks: tokens?.state(), redis: redis && stateOf(redisOutage(redis)), ...relay.state()
  })
  app.decorate('load', load)
  app.decorate('useSecrets', changed => {
    app.useApiKeys(changed)
    tokens?.useSecret(changed)
    callerText.use(changed)
  })
  await app.register(health, { parts })
  if (config.DOCS ?? isLoopback(config.HOST)) await app.register(docs, { document })
  const nextSlice = createSlices(SLICE_MS)
  const rules = createIdentityRules(config)
  const routes = { relay, config, rules, bodies, nextSlice }
  await app.register(identify, routes)
  await app.register(batch, routes)
  if (compat !== undefined) await app.register(compat.compat, { ...routes, metrics, logger })
  return app
}

/** Returns the state of Redis, for people. */
function stateOf (outage: RedisOutage | undefined) {
  return outage === undefined
    ? { state: 'connected' }
    : { state: 'away', since: outage.since.toISOString(), cause: outage.cause }
}

/** Returns the methods by path, filled as routes register. `hasRoute` would parse a caller's path as a pattern. */
function collectMethods (app: FastifyInstance): ReadonlyMap<string, string[]> {
  const methods = new Map<string, string[]>()
  app.addHook('onRoute', ({ url, method }) => {
    methods.set(url, [...methods.get(url) ?? [], ...[method].flat()])
  })
  return methods
}
