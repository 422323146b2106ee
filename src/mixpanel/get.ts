import http, { type ClientRequest } from 'node:http'
import https from 'node:https'

/**
 * Starts a GET, which fails with ETIMEDOUT when the server is silent for so long. Its caller destroys it. fetch would
 * refuse the ports of other protocols. undici would read on while its consumer is slow: an export of a million rows
 * took 300 MB of memory.
 */
export function startGet (url: string, timeoutMs: number, headers: Record<string, string> = {}): ClientRequest {
  // NODE_TLS_REJECT_UNAUTHORIZED must not let an account reach another server.
  const options = { headers, timeout: timeoutMs, rejectUnauthorized: true, agent: false }
  const request = url.startsWith('https:') ? https.get(url, options) : http.get(url, options)
  request.on('timeout', () => {
    request.destroy(Object.assign(new Error(`no answer in ${timeoutMs} ms`), { code: 'ETIMEDOUT' }))
  })
  return request
}
