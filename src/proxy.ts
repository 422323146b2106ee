/** A proxy for the way out. */
export interface Proxy {
  /** The variable that names it. */
  variable: 'HTTPS_PROXY' | 'HTTP_PROXY'
  /** Its URL with credentials: a secret. */
  url: URL
}

/** The variables of a configuration that say which proxy there is, and for which hosts. */
type Settings = { [name in Proxy['variable'] | 'NO_PROXY']?: string | undefined }

/** The error of a connection through a proxy that was not made, so nothing was sent. `message` holds no secret. */
export class TunnelError extends Error {
  override readonly name = 'TunnelError'
  readonly code: string

  constructor (message: string, code = 'ERR_TUNNEL') {
    super(message)
    this.code = code
  }
}

/**
 * Returns the proxy through which a URL is reached, undefined for none. As undici's EnvHttpProxyAgent: HTTP_PROXY is
 * also for https without HTTPS_PROXY, and loopback is no exception.
 */
export function proxyFor (settings: Settings, target: string): Proxy | undefined {
  const isHttps = new URL(target).protocol === 'https:'
  const variable = isHttps && settings.HTTPS_PROXY !== undefined ? 'HTTPS_PROXY' : 'HTTP_PROXY'
  const url = settings[variable]
  return url === undefined || isExempt(settings, target) ? undefined : { variable, url: new URL(url) }
}

/** Returns true if NO_PROXY names the host of a URL, a domain above it, or `*`. An entry may end with a port. */
export function isExempt ({ NO_PROXY: list = '' }: Settings, target: string): boolean {
  const { protocol, hostname, port } = new URL(target)
  const targetPort = port || (protocol === 'https:' ? '443' : '80')
  return list === '*' || list.split(/[,\s]+/).filter(entry => entry !== '').some(entry => {
    const [, host = entry, entryPort] = /^(.+):(\d+)$/.exec(entry) ?? []
    const name = host.replace(/^\*?\./, '').toLowerCase()
    const isPort = entryPort === undefined || Number(entryPort) === 0 || Number(entryPort) === Number(targetPort)
    return isPort && (hostname === name || hostname.endsWith(`.${name}`))
  })
}

/** Returns the URL of a proxy for people: without its credentials. */
export function describeProxy ({ url: { protocol, username, password, host } }: Pick<Proxy, 'url'>): string {
  return `${protocol}//${username + password === '' ? '' : '***@'}${host}`
}
