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
  const headers = Object.entries(SECURITY_HEADERS)
  app.addHook('onRequest', ({ method }, reply, done) => {
    for (const [name, value] of headers) reply.header(name, value)
    if (method === 'POST') reply.header('cache-control', 'no-store')
    done()
  })
})
