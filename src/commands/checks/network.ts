import { lookup } from 'node:dns/promises'
import { once } from 'node:events'
import type { IncomingMessage } from 'node:http'
import { connect, isIP } from 'node:net'
import { connect as connectTls, type TLSSocket } from 'node:tls'
import type { Config } from '../../config.ts'
import { startGet } from '../../get.ts'
import { baseUrl } from '../../mixpanel/client.ts'
import { describeProxy, proxyFor, type Proxy } from '../../proxy.ts'
import { createTunnels, type Target } from '../../tunnel.ts'
import { failed, ok, PART_MS, reasonOf, TIMEOUT_MS, warning, type Check, type Finding } from './check.ts'

const DAY_MS = 86_400_000

/** A certificate is renewed before that, or its renewal has failed. */
const EXPIRY_WARNING_DAYS = 14

/** Beyond the first the relay logs `clock differs from Mixpanel`. Beyond the second `/import` refuses every event. */
const SKEW_WARNING_S = 60
const SKEW_FAILURE_S = 3600

const EGRESS = 'check the firewall and egress rules, and whether HTTPS_PROXY is right'

/** Returns the checks of the way to Mixpanel, from the first hop to an answer, and of the clock. */
export function networkChecks (config: Config): Check[] {
  const base = new URL(baseUrl(config))
  const isHttps = base.protocol === 'https:'
  const target: Target = {
    protocol: base.protocol, hostname: hostOf(base), port: base.port || (isHttps ? '443' : '80')
  }
  const proxy = proxyFor(config, base.href)
  const hop: Target = proxy === undefined
    ? target
    : {
        protocol: proxy.url.protocol,
        hostname: hostOf(proxy.url),
        port: proxy.url.port || (proxy.url.protocol === 'https:' ? '443' : '80')
      }
  const last = isHttps ? 'TLS' : proxy === undefined ? 'TCP' : 'proxy'
  let date: string | undefined
  return [
    { name: 'region', needs: [], hint: '', run: async () => checkRegion(config, base) },
    { name: 'DNS', needs: [], hint: 'check the name server in /etc/resolv.conf', run: () => checkDns(hop.hostname) },
    { name: 'TCP', needs: ['DNS'], hint: EGRESS, run: () => checkTcp(hop) },
    {
      name: 'proxy',
      needs: proxy === undefined ? [] : ['TCP'],
      hint: EGRESS,
      run: () => checkProxy(config, proxy, target)
    },
    ...isHttps
      ? [{
          name: 'TLS',
          needs: ['TCP', 'proxy'],
          hint: tlsHint({}),
          run: (signal: AbortSignal) => checkTls(proxy, target, signal)
        }]
      : [],
    {
      name: 'HTTP',
      needs: [last],
      hint: 'the server takes connections and does not answer: check MIXPANEL_URL and gateways, and try again later',
      async run (signal) {
        const request = startGet(`${base.href.replace(/\/+$/, '')}/`, { timeoutMs: TIMEOUT_MS, proxy, signal })
        const [{ statusCode: status = 0, headers }] = await once(request, 'response') as [IncomingMessage]
        request.destroy()
        date = headers.date
        const text = `it answered ${status}`
        if (status >= 500) return failed(text, 'Mixpanel, or a gateway, is failing: try again later')
        return ok(`${text}, which does not say that the token is right`)
      }
    },
    { name: 'clock', needs: [last], hint: '', run: async () => judgeClock(date) }
  ]
}

const hostOf = ({ hostname }: URL) => hostname.replace(/^\[|\]$/g, '')

function checkRegion (config: Config, base: URL): Finding {
  const source = config.MIXPANEL_URL === undefined ? `MIXPANEL_REGION=${config.MIXPANEL_REGION}` : 'MIXPANEL_URL'
  return ok(`the host is ${base.host}, by ${source}. Mixpanel takes tokens of other regions without an error, so the ` +
    'settings of the project must show the same region')
}

async function checkDns (hostname: string): Promise<Finding> {
  try {
    const addresses = await lookup(hostname, { all: true })
    const list = (family: number) =>
      addresses.filter(one => one.family === family).map(({ address }) => address).join(', ') || 'none'
    return ok(`${hostname} has IPv4 ${list(4)}; IPv6 ${list(6)}`)
  } catch (error) {
    return failed(reasonOf(error), `check the name ${hostname} and the name server in /etc/resolv.conf`)
  }
}

/** Connects to the first address of each family. */
async function checkTcp ({ hostname, port }: Target): Promise<Finding> {
  const addresses = await lookup(hostname, { all: true })
  const firsts = [4, 6].flatMap(family => addresses.find(one => one.family === family) ?? [])
  return judgeTcp(`${hostname}:${port}`, await Promise.all(firsts.map(async ({ address, family }) => {
    const since = performance.now()
    const socket = connect({ host: address, port: Number(port) })
    const cause = await once(socket, 'connect', { signal: AbortSignal.timeout(PART_MS) }).then(() => undefined, causeOf)
    socket.destroy()
    return { family, ms: Math.round(performance.now() - since), ...cause !== undefined && { cause } }
  })))
}

const causeOf = (error: NodeJS.ErrnoException) => error.name === 'AbortError' ? SILENT : String(error.code)
const SILENT = 'no answer'

/** Returns what the connections to the first address of each family say about a server. */
export function judgeTcp (server: string, results: { family: number, ms: number, cause?: string }[]): Finding {
  const words = results.map(({ family, ms, cause }) => `IPv${family} ${cause ?? `in ${ms} ms`}`)
  const text = `${server} ${words.join('; ')}`
  if (results.every(({ cause }) => cause !== undefined)) {
    return failed(text, EGRESS)
  }
  // An address without a route fails at once and delays nothing.
  if (results.every(({ cause }) => cause !== SILENT)) return ok(text)
  return warning(text, 'new connections try the silent family too: give it a route, or none at all')
}

async function checkProxy (config: Config, proxy: Proxy | undefined, target: Target): Promise<Finding> {
  const url = config.HTTPS_PROXY ?? config.HTTP_PROXY
  if (proxy === undefined) {
    return ok(url === undefined
      ? 'none is set'
      : `${describeProxy({ url: new URL(url) })} is not for ${target.protocol}//${target.hostname}`)
  }
  const name = `${proxy.variable} ${describeProxy(proxy)}`
  const authority = `${target.hostname}:${target.port}`
  try {
    const socket = await createTunnels(proxy, PART_MS)({ ...target, protocol: 'http:' })
    socket.destroy()
    return ok(`${name} makes a tunnel to ${authority}`)
  } catch (error) {
    const text = `${name} makes no tunnel to ${authority}: ${reasonOf(error)}`
    // tinyproxy answers 401 to wrong credentials.
    if (/ 40[17]$/.test(text)) {
      return failed(text, `put the right user and password into ${proxy.variable}, percent-encoded`)
    }
    if (isCertificate(error)) return failed(text, tlsHint(error))
    return failed(text, `the proxy must permit CONNECT to ${authority}, or NO_PROXY must name ${target.hostname}`)
  }
}

async function checkTls (proxy: Proxy | undefined, target: Target, signal: AbortSignal): Promise<Finding> {
  try {
    const socket = proxy === undefined
      ? await handshake(target, signal)
      : await createTunnels(proxy, PART_MS)(target) as TLSSocket
    const { valid_to: until, issuer } = socket.getPeerCertificate()
    const protocol = socket.getProtocol()
    socket.destroy()
    return judgeCertificate(`${protocol}, issued by ${issuer.O ?? issuer.CN}`, until)
  } catch (error) {
    return failed(reasonOf(error), tlsHint(error))
  }
}

/** Returns what the end of a certificate, as Node prints it, means. */
export function judgeCertificate (description: string, until: string): Finding {
  const text = `${description}, and the certificate is valid until ${until}`
  const days = Math.floor((Date.parse(until) - Date.now()) / DAY_MS)
  return days >= EXPIRY_WARNING_DAYS ? ok(text) : warning(text, `it ends in ${days} days: the server must renew it`)
}

async function handshake ({ hostname, port }: Target, signal: AbortSignal): Promise<TLSSocket> {
  const socket = connectTls({
    host: hostname,
    port: Number(port),
    servername: isIP(hostname) === 0 ? hostname : '',
    ALPNProtocols: ['http/1.1'],
    rejectUnauthorized: true
  })
  signal.addEventListener('abort', () => socket.destroy())
  await once(socket, 'secureConnect', { signal })
  return socket.on('error', () => {})
}

const isCertificate = (error: unknown) => /CERT|ISSUER|SIGN/.test(String((error as NodeJS.ErrnoException).code))

/** Returns what to do after a failed handshake. */
export function tlsHint (error: unknown): string {
  const { code } = error as NodeJS.ErrnoException
  if (code === 'CERT_HAS_EXPIRED') return 'renew the certificate of the server, or set this clock'
  if (code === 'ERR_TLS_CERT_ALTNAME_INVALID') return 'the certificate is for another host: check the URL'
  return isCertificate(error)
    ? 'a proxy or gateway has a certificate of its own: name the file of its CA in NODE_EXTRA_CA_CERTS'
    : 'check that the port speaks TLS, and that no firewall breaks it'
}

/** Returns what the `date` of an answer says about this clock. */
export function judgeClock (date: string | undefined): Finding {
  const seconds = Math.round((Date.now() - Date.parse(String(date))) / 1000)
  if (Number.isNaN(seconds)) return warning('it cannot be told: the answer has no Date', 'check that NTP runs')
  const text = `${Math.abs(seconds)} s ${seconds < 0 ? 'behind' : 'ahead of'} Mixpanel`
  if (Math.abs(seconds) > SKEW_FAILURE_S) {
    return failed(text, 'run NTP: Mixpanel refuses times of the future and drops old events')
  }
  return Math.abs(seconds) > SKEW_WARNING_S ? warning(text, 'run NTP: events have a wrong time') : ok(text)
}
