import type { FastifyPluginAsync, FastifyReply } from 'fastify'
import type { Slices } from '../../concurrency/slices.ts'
import type { Config } from '../../config.ts'
import type { IdentityRules } from '../../identity/identity.ts'
import { throttled, type Log } from '../../log.ts'
import type { Metrics } from '../../metrics.ts'
import type { Relay } from '../../relay/relay.ts'
import { BodyError, type Bodies } from '../body.ts'
import { answerProblem, sendAnswer } from './answers.ts'
import { isFromOtherSite, readRequest } from './request.ts'
import { createTrack } from './track.ts'

export { createAnswerHead } from './answers.ts'

/** Mixpanel's own bound on a body. */
const BODY_LIMIT = 10 * 1024 * 1024

/** The rest of MAX_BYTES_IN_FLIGHT is left to identities. */
const BODY_SHARE = 0.75

/** The paths of services that the relay does not offer. Their SDKs read JSON. */
const NOT_SERVED = ['/import', '/flags', '/settings', '/record']

export interface CompatOptions {
  relay: Relay
  config: Config
  rules: IdentityRules
  bodies: Bodies
  nextSlice: Slices
  metrics: Metrics
  logger: Log
}

/** The paths that Mixpanel's SDKs call. Every answer has a form that an SDK reads. */
export const compat: FastifyPluginAsync<CompatOptions> = async (app, options) => {
  const { bodies, logger } = options
  const sdk = { answerProblem }
  app.decorateRequest('parameters')
  bodies.accept(app, { types: ['*'], limit: BODY_LIMIT, share: BODY_SHARE, parse: (body, done) => done(null, body) })
  app.setErrorHandler((error, request, reply) => {
    if (!(error instanceof BodyError)) throw error
    return refuseBody(reply, error)
  })

  app.addHook('onRequest', (request, reply, done) => {
    // A page sends no Origin with an image, a script or a link. A pixel is for mails: track refuses it if it merges.
    const mayBePixel = request.method === 'GET' && /[?&]img=1(?:&|$)/.test(request.raw.url as string)
    return isFromOtherSite(request) && !mayBePixel
      ? reply.problem('forbidden', { detail: OTHER_SITE })
      : done()
  })

  const warnOfToken = throttled(logger, 'warn', 'events with the token of another project')
  const track = createTrack({
    ...options,
    countIdentities: app.countIdentities,
    onToken: token => { if (options.relay.isForeignToken(token)) warnOfToken({}) }
  })

  app.all('/track', { config: { sdk, callers: 'all' }, schema: { hide: true } }, async (request, reply) => {
    if (request.method !== 'GET' && request.method !== 'POST') return refuseMethod(reply)
    const data = await readRequest(request, reply, BODY_LIMIT)
    return track(request, reply, data)
  })

  for (const path of ['/engage', '/groups']) {
    app.all(path, { config: { sdk }, schema: { hide: true } }, async (request, reply) => {
      if (request.method !== 'GET' && request.method !== 'POST') return refuseMethod(reply)
      await readRequest(request, reply, BODY_LIMIT)
      // A status of 4xx would make the SDKs of phones hold back their events too.
      return sendAnswer(reply, 200, false, `The relay does not forward ${path}.`)
    })
  }

  for (const path of [...NOT_SERVED.flatMap(path => [path, `${path}/*`]), '/track/*', '/engage/*', '/groups/*']) {
    app.all(path, { config: { sdk }, schema: { hide: true } }, async (request, reply) => {
      request.parameters = { verbose: '1' }
      return reply.problem('not_found', { detail: `The relay does not forward ${path.replace('/*', '')}.` })
    })
  }

  function refuseBody (reply: FastifyReply, { problem, message }: BodyError): FastifyReply {
    if (problem === 'invalid_request') return reply.problem(problem, { errors: [{ pointer: 'body', detail: message }] })
    return reply.problem(problem, problem === 'overloaded' ? { retryAfter: 1 } : {})
  }
}

const refuseMethod = (reply: FastifyReply) => reply.header('allow', 'GET, POST').problem('method_not_allowed')

const OTHER_SITE = 'A page of another site sent this request without its origin.'
