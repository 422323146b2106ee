import fp from 'fastify-plugin'

/**
 * For a browser that shows a response as a page: it is what its type says, loads nothing, and is in no frame. More
 * headers would only cost: JSON has no links and no scripts.
 */
export const SECURITY_HEADERS = {
  'x-content-type-options': 'nosniff',
  'content-security-policy': "default-src 'none'; frame-ancestors 'none'"
}

/** Gives every response the headers of a JSON API. A POST response must not be stored. */
export const securityHeaders = fp(async app => {
  const forPost = { ...SECURITY_HEADERS, 'cache-control': 'no-store' }
  app.addHook('onRequest', ({ method }, reply, done) => {
    reply.headers(method === 'POST' ? forPost : SECURITY_HEADERS)
    done()
  })
})
