import type { IncomingHttpHeaders } from 'node:http'
import fp from 'fastify-plugin'
import { hasCredentials, isOpenLoopback, type Config } from '../../config.ts'
import { createApiKeys } from '../callers/api-keys.ts'
import { ANONYMOUS, type Caller } from '../callers/caller.ts'
import type { UserTokens } from '../callers/user-tokens.ts'

declare module 'fastify' {
  interface FastifyInstance {
    /** Takes the API keys of a changed configuration, from the next request on. */
    useApiKeys: (config: Config) => void
  }
  interface FastifyRequest {
    caller: Caller
    /** Why the credentials of the request are wrong; its caller is then anonymous. Never the credentials themselves. */
    wrongCredentials: string | undefined
  }
  interface FastifyContextConfig {
    /** The callers of a route: `services` are those with an API key, `all` are users and services. */
    callers?: 'all' | 'services'
  }
}

interface Options { config: Config, tokens: UserTokens | undefined }

/**
 * Finds the caller of every request, before its rate limit is counted and its body is read. Credentials that are wrong
 * leave the caller anonymous, so that guesses count against the address.
 */
export const callers = fp<Options>(async (app, { config, tokens }) => {
  app.decorateRequest('caller')
  app.decorateRequest('wrongCredentials')
  let findService = createApiKeys(config.API_KEYS)
  app.decorate('useApiKeys', changed => { findService = createApiKeys(changed.API_KEYS) })
  const isChecked = hasCredentials(config)

  app.addHook('onRequest', (request, reply, done) => {
    request.caller = ANONYMOUS
    const credential = isChecked && !request.route.config.unlogged ? credentialOf(request.headers) : undefined
    if (credential === undefined) return done()
    const known = findService(credential.text) ?? (credential.isBearer ? tokens?.find(credential.text) : undefined)
    if (known !== undefined) {
      request.caller = known
      return done()
    }
    if (tokens === undefined || !credential.isBearer) {
      request.wrongCredentials = 'unknown key'
      return done()
    }
    tokens.verify(credential.text).then(caller => {
      request.caller = caller
    }, ({ message }: Error) => {
      request.wrongCredentials = message
    }).then(() => done())
  })
})

/** Refuses a request whose caller may not use its route, before its body is read. */
export const authorization = fp<{ config: Config }>(async (app, { config }) => {
  const allowed = {
    all: { key: true, user: true, anonymous: config.ALLOW_ANONYMOUS || isOpenLoopback(config) },
    // A batch merges many users at once, so that needs a key even where anonymous callers may identify.
    services: { key: true, user: false, anonymous: isOpenLoopback(config) }
  }
  app.addHook('onRequest', (request, reply, done) => {
    const { caller: { kind }, wrongCredentials, route } = request
    const required = route.config.callers
    if (required === undefined) return done()
    if (wrongCredentials !== undefined) {
      reply.logLine.details = { ...reply.logLine.details, cause: wrongCredentials }
      return refuse('The API key or token is wrong or has expired.')
    }
    if (allowed[required][kind]) return done()
    if (kind === 'user') return reply.problem('forbidden', { detail: 'This path needs an API key; a user has none.' })
    refuse(required === 'all' ? 'Send an API key or a token as Authorization: Bearer.' : 'This path needs an API key.')

    function refuse (detail: string): void {
      reply.header('www-authenticate', 'Bearer').problem('unauthenticated', { detail })
    }
  })
})

/** Returns the credential of a request. Other schemes than Bearer belong to a proxy, or to Mixpanel's SDKs. */
function credentialOf (
  { authorization, 'x-api-key': apiKey }: IncomingHttpHeaders
): { text: string, isBearer: boolean } | undefined {
  const text = authorization?.replace(/^Bearer(?: +|$)/i, '')
  if (text !== undefined && text !== authorization) return { text, isBearer: true }
  return apiKey === undefined ? undefined : { text: String(apiKey), isBearer: false }
}
