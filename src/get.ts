import http, { type ClientRequest } from 'node:http'
import https from 'node:https'
import type { Proxy } from './proxy.ts'
import { createTunnels } from './tunnel.ts'

interface Options {
  /** The longest silence of the server, and the longest time for a connection through a proxy. */
  timeoutMs: number
  headers?: Record<string, string>
  proxy?: Proxy | undefined
  signal?: AbortSignal
}

/**
 * Starts a GET, which fails with ETIMEDOUT when the server is silent for so long. Its caller destroys it. fetch would
 * refuse the ports of other protocols. undici would read on while its consumer is slow: an export of a million rows
 * took 300 MB of memory.
 */
export function startGet (url: string, { timeoutMs, headers = {}, proxy, signal }: Options): ClientRequest {
  const request = (url.startsWith('https:') ? https : http).get(url, {
    headers,
    timeout: timeoutMs,
    // NODE_TLS_REJECT_UNAUTHORIZED must not let an account reach another server.
    rejectUnauthorized: true,
    ...signal && { signal },
    ...proxy === undefined ? { agent: false } : { createConnection: tunnelled(new URL(url), proxy, timeoutMs) }
  })
  request.on('timeout', () => {
    request.destroy(Object.assign(new Error(`no answer in ${timeoutMs} ms`), { code: 'ETIMEDOUT' }))
  })
  return request
}

/** Returns the `createConnection` of a request that has no agent. */
function tunnelled (target: URL, proxy: Proxy, timeoutMs: number): http.RequestOptions['createConnection'] {
  return (_, done) => {
    createTunnels(proxy, timeoutMs)(target).then(socket => {
      socket.setTimeout(timeoutMs)
      done(null, socket)
    }, (error: Error) => done(error, undefined as never))
    return undefined
  }
}
