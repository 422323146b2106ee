import http, { type IncomingMessage } from 'node:http'
import https from 'node:https'
import { isIP, type Socket } from 'node:net'
import { connect } from 'node:tls'
import { TunnelError, type Proxy } from './proxy.ts'

/** The server behind the proxy. `hostname` may be an IPv6 address, with or without brackets. */
export interface Target { protocol: string, hostname: string, port: string }

/**
 * Returns a function that connects to servers through a proxy. undici's ProxyAgent has no timeout for CONNECT, treats
 * no status but 200 as a success, and connects again without end when a proxy hangs up (nodejs/undici#3897).
 */
export function createTunnels ({ url }: Pick<Proxy, 'url'>, timeoutMs: number) {
  // Saves a round trip of the handshake. One target has one session.
  let session: Buffer | undefined

  /**
   * Resolves with a connection, for https with TLS end to end, within `timeoutMs`. Rejects with a TunnelError.
   * NODE_TLS_REJECT_UNAUTHORIZED does not switch off any check of a certificate.
   */
  return (target: Target): Promise<Socket> => new Promise((resolve, reject) => {
    const hostname = bare(target.hostname)
    const isHttps = target.protocol === 'https:'
    const port = target.port || (isHttps ? '443' : '80')
    const authority = `${hostname.includes(':') ? `[${hostname}]` : hostname}:${port}`
    let waitsFor = 'the proxy'
    let socket: Socket | undefined

    function fail (cause: string, code?: string): void {
      clearTimeout(timer)
      request.destroy()
      socket?.destroy()
      reject(new TunnelError(cause, code))
    }
    const timer = setTimeout(() => fail(`no answer from ${waitsFor} in ${timeoutMs} ms`, 'ETIMEDOUT'), timeoutMs)

    function finish (connection: Socket): void {
      clearTimeout(timer)
      resolve(connection)
    }

    const options = {
      method: 'CONNECT',
      host: bare(url.hostname),
      port: url.port,
      path: authority,
      headers: { host: authority, connection: 'keep-alive', 'proxy-connection': 'keep-alive', ...credentials(url) },
      agent: false,
      rejectUnauthorized: true,
      autoSelectFamily: true,
      autoSelectFamilyAttemptTimeout: 400
    }
    const request = (url.protocol === 'https:' ? https : http).request(options)
    request.on('error', (error: NodeJS.ErrnoException) => fail(`proxy: ${error.code}`, error.code))
    request.on('connect', ({ statusCode = 0 }: IncomingMessage, tunnel: Socket, head: Buffer) => {
      socket = tunnel
      tunnel.on('error', () => {})
      if (statusCode < 200 || statusCode > 299) return fail(`proxy answered ${statusCode}`)
      if (head.length > 0) tunnel.unshift(head)
      tunnel.setNoDelay(true)
      tunnel.setKeepAlive(true, 60_000)
      if (!isHttps) return finish(tunnel)
      waitsFor = `${hostname} through the proxy`
      const secure = connect({
        socket: tunnel,
        host: hostname,
        servername: isIP(hostname) === 0 ? hostname : '',
        ALPNProtocols: ['http/1.1'],
        rejectUnauthorized: true,
        ...session && { session }
      })
      secure.on('error', (error: NodeJS.ErrnoException) => fail(`${error.code} through the proxy`, error.code))
      secure.on('secureConnect', () => {
        // From here on, so only of a server whose certificate is right.
        secure.on('session', latest => { session = latest })
        finish(secure)
      })
    })
    request.end()
  })
}

const bare = (hostname: string) => hostname.replace(/^\[|\]$/g, '')

/** Returns the header for the credentials in the URL of a proxy. */
function credentials ({ username, password }: URL): Record<string, string> {
  if (username + password === '') return {}
  const text = `${decodeURIComponent(username)}:${decodeURIComponent(password)}`
  return { 'proxy-authorization': `Basic ${Buffer.from(text).toString('base64')}` }
}
