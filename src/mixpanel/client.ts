import { createRequire } from 'node:module'
import type undici from 'undici'
import type { Config } from '../config.ts'
import { parseEvent, type PendingEvent } from '../identity/event.ts'
import { interpretBody, interpretError, interpretStatus, type Verdict } from '../identity/verdict.ts'

/** A request to Mixpanel, ready to be sent any number of times. */
export interface EncodedRequest { path: string, headers: Record<string, string>, body: Buffer }

// All of undici (fetch, WebSocket, caches, …) would add a sixth to the start and to the memory.
const Pool = createRequire(import.meta.url)('undici/lib/dispatcher/pool.js') as typeof undici.Pool

export type Mixpanel = ReturnType<typeof createMixpanel>

const BASE_URLS = { us: 'https://api.mixpanel.com', eu: 'https://api-eu.mixpanel.com', in: 'https://api-in.mixpanel.com' }

/** How many requests may be under way at a time: more wait for a connection. */
export const CONNECTIONS = 64

/** The most that one request may have on the wire. Mixpanel documents 2 MiB and 10 MB; gateways often take 1 MiB. */
export const MAX_REQUEST_BYTES = 1_048_576

/** The most that all requests under way may have on the wire together, give or take one. */
export const MAX_SENT_BYTES = 16 * MAX_REQUEST_BYTES

/** Returns how many bytes an event takes on the wire at most: percent-encoding may make three bytes of one. */
export function wireBytes ({ bytes }: PendingEvent, { MIXPANEL_TOKEN: token }: Config): number {
  // The token travels as `,"token":"…"`, escaped, with a comma before the next event.
  return 3 * (bytes + 2 * token.length + 12)
}

/** Real answers have a few hundred bytes; an edge's error page may have megabytes. */
const MAX_ANSWER_BYTES = 65_536

/** The base URL that the configuration names, without a slash at its end. */
export function baseUrl (config: Pick<Config, 'MIXPANEL_URL' | 'MIXPANEL_REGION'>): string {
  return (config.MIXPANEL_URL ?? BASE_URLS[config.MIXPANEL_REGION]).replace(/\/+$/, '')
}

const base64 = (text: string) => Buffer.from(text).toString('base64')

/** The only place that knows the token and Mixpanel's dialect. Whoever creates it must `close` it. */
export function createMixpanel (config: Config) {
  const { MIXPANEL_TOKEN: token, MIXPANEL_SERVICE_ACCOUNT: account, MIXPANEL_PROJECT_ID: project } = config
  const basic = `Basic ${base64(account ?? `${token}:`)}`
  const { origin, pathname } = new URL(baseUrl(config))
  const path = pathname === '/' ? '' : pathname
  const pool = new Pool(origin, {
    connections: CONNECTIONS,
    // A pool under traffic never resolves its host again by itself; this makes it follow DNS.
    clientTtl: 60_000,
    // Below the idle time of any server we know, or a request meets a connection that is just being closed.
    keepAliveTimeout: 4000,
    maxResponseSize: MAX_ANSWER_BYTES,
    // `send` has the timer for the rest. Node gives up an address after 250 ms, less than a far region's round trip.
    headersTimeout: 0,
    bodyTimeout: 0,
    connect: {
      timeout: config.MIXPANEL_TIMEOUT_MS,
      autoSelectFamily: true,
      autoSelectFamilyAttemptTimeout: 400,
      // Not even NODE_TLS_REJECT_UNAUTHORIZED may send the token to somebody else.
      rejectUnauthorized: true
    }
  })

  const closing = `,"token":${JSON.stringify(token)}}}`

  /** Mixpanel's words may quote what it was sent, in any of the forms in which that travels. */
  const secrets = [token, account, account?.replace(/^[^:]*:/, '')].flatMap(secret => secret === undefined
    ? []
    : [secret, encodeURIComponent(secret), base64(secret), base64(`${secret}:`)])
  const mask = (words: string) => secrets.reduce((masked, secret) => masked.replaceAll(secret, '***'), words)

  return {
    /** The event as it would be sent, with the token masked. */
    preview (pending: PendingEvent) {
      const { event, properties } = parseEvent(pending)
      return { event, properties: { token: '***', ...properties } }
    },

    /**
     * The request for some events: one travels as an object, several as an array. `strict` asks Mixpanel to validate;
     * `verbose` asks `/track` for its reason in place of a bare `0`. `/import` always does both.
     */
    encode (
      events: PendingEvent[], { endpoint = config.MIXPANEL_ENDPOINT, strict = false, verbose = false } = {}
    ): EncodedRequest {
      const list = events.map(({ json }) => `${json.slice(0, -2)}${closing}`).join()
      if (endpoint === 'import') {
        return {
          path: `${path}/import?strict=1${project === undefined ? '' : `&project_id=${project}`}`,
          headers: { 'content-type': 'application/json', authorization: basic },
          body: Buffer.from(`[${list}]`)
        }
      }
      const isStrict = strict || config.MIXPANEL_STRICT === '1'
      const json = events.length === 1 ? list : `[${list}]`
      return {
        // ip=0: the relay's own address must not become the user's location.
        path: `${path}/track?ip=0${verbose ? '&verbose=1' : ''}`,
        headers: { 'content-type': 'application/x-www-form-urlencoded' },
        // undici would keep a buffer of its own beside a string.
        body: Buffer.from(`data=${encodeURIComponent(json)}${isStrict ? '&strict=1' : ''}`, 'latin1')
      }
    },

    /**
     * Sends once. Resolves within `timeoutMs`, or as soon as this process runs again; rejects only on a bug. By
     * undici's `dispatch`, which is cheaper than its `request`: an answer of one byte needs no stream.
     */
    send: (request: EncodedRequest, timeoutMs: number) => new Promise<Verdict>(resolve => {
      let controller: undici.Dispatcher.DispatchController | undefined
      let status = 0
      const chunks: Buffer[] = []
      // undici's own timeouts do not bound a request that it still queues or connects for (nodejs/undici#386).
      let isLate = false
      function giveUp (): void {
        isLate = true
        resolve({ code: 'mixpanel_timed_out', cause: `no answer in ${timeoutMs} ms`, isTransient: true })
        controller?.abort(new Error('late'))
      }
      // Timers run before sockets are read. An answer that arrived while this process stood still is read first.
      let afterReading: NodeJS.Immediate | undefined
      const timer = setTimeout(() => { afterReading = setImmediate(giveUp) }, timeoutMs)
      function settle (verdict: Verdict): void {
        clearTimeout(timer)
        clearImmediate(afterReading)
        resolve(verdict)
      }
      pool.dispatch({ ...request, method: 'POST' }, {
        onRequestStart (started) {
          controller = started
          if (isLate) started.abort(new Error('late'))
        },
        onResponseStart (_, statusCode, headers) {
          status = statusCode
          const verdict = interpretStatus(statusCode, headers['retry-after'])
          // The timer goes on: what is left of the answer must not hold its connection for ever.
          if (verdict !== undefined) resolve(verdict)
        },
        onResponseData (_, chunk) {
          chunks.push(chunk)
        },
        onResponseEnd () {
          settle(interpretBody(status, Buffer.concat(chunks).toString(), mask))
        },
        onResponseError (_, error) {
          // A 400 is a refusal, even if its reasons are too long to be read.
          settle(status === 400 ? interpretBody(status, '') : interpretError(error))
        }
      })
    }),

    /** Closes the connections; a request that is still under way fails. */
    close: () => pool.destroy()
  }
}
