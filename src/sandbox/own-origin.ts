import { isIP } from 'node:net'
import type { FastifyReply, FastifyRequest } from 'fastify'

/** Names that nobody can register: another site's name cannot lead a browser to the sandbox (DNS rebinding). */
const LOCAL_NAME = /^[^.]+$|\.(?:localhost|local|internal|test)$/

/**
 * Refuses a request that a page of another origin made. Any page in a developer's browser can reach loopback. Programs
 * send neither `Origin` nor `Sec-Fetch-Site`, and pass.
 */
export async function requireOwnOrigin (request: FastifyRequest, reply: FastifyReply) {
  const { host, origin } = request.headers
  const url = parseUrl(`http://${host}`)
  if (url === undefined || !isLocal(url.hostname)) return refuse(reply, `not a name of the sandbox: ${host}`)
  if (origin !== undefined && parseUrl(origin)?.host !== url.host) return refuse(reply, `a foreign origin: ${origin}`)
  if (isForeignFetch(request)) return refuse(reply, 'a request of a foreign page')
}

const isLocal = (name: string): boolean => isIP(name.replace(/^\[|\]$/g, '')) !== 0 || LOCAL_NAME.test(name)

/** A link to the sandbox on another site may be followed: its page cannot read the answer. */
function isForeignFetch ({ method, headers }: FastifyRequest): boolean {
  const isNavigation = headers['sec-fetch-mode'] === 'navigate' && headers['sec-fetch-dest'] === 'document'
  return ['cross-site', 'same-site'].includes(String(headers['sec-fetch-site'])) && !(isNavigation && method === 'GET')
}

function refuse (reply: FastifyReply, error: string): FastifyReply {
  return reply.code(403).send({ error, status: 0 })
}

function parseUrl (text: string): URL | undefined {
  try {
    return new URL(text)
  } catch {
    return undefined
  }
}
