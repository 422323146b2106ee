import type undici from 'undici'
import type { Config } from '../config.ts'
import { throttled, type Log } from '../log.ts'
import { proxyFor } from '../proxy.ts'
import { parseEvent, type PendingEvent } from '../identity/event.ts'
import { interpretBody, interpretError, interpretStatus, type Answer } from './answer.ts'
import { createCredentials } from './credentials.ts'
import { encodeNothing, encodeRequest, type EncodedRequest, type EncodeOptions } from './encode.ts'
import { Pool } from './pool.ts'
import { createConnector } from './connector.ts'

export type Mixpanel = ReturnType<typeof createMixpanel>

const BASE_URLS = { us: 'https://api.mixpanel.com', eu: 'https://api-eu.mixpanel.com', in: 'https://api-in.mixpanel.com' }

/** How many requests may be in flight, each on its own connection. */
export const MAX_SENDS = 64

/** Mixpanel's answers have a few hundred bytes; the error page of an edge may have megabytes. */
const MAX_ANSWER_BYTES = 65_536

/** Returns the configured base URL without a trailing slash. */
export function baseUrl (config: Pick<Config, 'MIXPANEL_URL' | 'MIXPANEL_REGION'>): string {
  return (config.MIXPANEL_URL ?? BASE_URLS[config.MIXPANEL_REGION]).replace(/\/+$/, '')
}

/** A difference of the clocks beyond this is logged, this often. */
const MAX_SKEW_SECONDS = 60
const WARNING_INTERVAL_MS = 3_600_000

/** A client of Mixpanel that sends each request once. The caller must `close` it. */
export function createMixpanel (config: Config, log?: Pick<Log, 'warn'>) {
  const warnOfClock = throttled(log, 'warn', 'clock differs from Mixpanel', WARNING_INTERVAL_MS)

  let clockSkew: number | undefined

  /** Warns if Mixpanel's `date` differs from this clock: Mixpanel drops events that are too old. */
  function checkClock (date: unknown): void {
    const seconds = Math.round((Date.now() - Date.parse(String(date))) / 1000)
    if (Number.isNaN(seconds)) return
    clockSkew = seconds
    if (Math.abs(seconds) > MAX_SKEW_SECONDS) warnOfClock({ seconds })
  }

  const credentials = createCredentials(config)
  const { origin, pathname } = new URL(baseUrl(config))
  const prefix = pathname === '/' ? '' : pathname
  const proxy = proxyFor(config, origin)
  const pool = new Pool(origin, {
    connections: MAX_SENDS,
    // Makes the pool follow DNS: otherwise a busy pool never resolves its host again.
    clientTtl: 60_000,
    // Shorter than the idle timeout of any known server, so that no request meets a closing connection.
    keepAliveTimeout: 4000,
    maxResponseSize: MAX_ANSWER_BYTES,
    // `send` has a timer of its own.
    headersTimeout: 0,
    bodyTimeout: 0,
    connect: proxy === undefined
      ? {
          timeout: config.MIXPANEL_TIMEOUT_MS,
          autoSelectFamily: true,
          // Node's default of 250 ms is less than the round trip to a distant region.
          autoSelectFamilyAttemptTimeout: 400,
          // NODE_TLS_REJECT_UNAUTHORIZED must not let the token reach another server.
          rejectUnauthorized: true
        }
      : createConnector(proxy, config.MIXPANEL_TIMEOUT_MS)
  })

  return {
    /** Returns the event as it would be sent, with the token masked. */
    preview (pending: PendingEvent) {
      const { event, properties } = parseEvent(pending)
      return { event, properties: { token: '***', ...properties } }
    },

    /** Returns the request for some events, ready for `send`. */
    encode: (events: PendingEvent[], options: EncodeOptions = {}) =>
      encodeRequest(events, options, credentials, config),

    /** Returns a request that asks `/import` for the credentials alone: its empty record is not stored. */
    encodeNothing: () => encodeNothing(credentials, config),

    /**
     * Sends a request once. Resolves within `timeoutMs`; after a stall of this process, as soon as it runs again.
     * Rejects only on a bug.
     * undici's `dispatch` is cheaper than its `request`: an answer of one byte needs no stream.
     */
    send: ({ path, headers, body }: EncodedRequest, timeoutMs: number) => new Promise<Answer>(resolve => {
      let controller: undici.Dispatcher.DispatchController | undefined
      let status = 0
      const chunks: Buffer[] = []
      // undici's timeouts do not cover a request that is queued or still connecting (nodejs/undici#386).
      let isTimedOut = false
      function timeOut (): void {
        isTimedOut = true
        // Without a connection nothing was sent, and nothing will be.
        const [taken, what] = controller === undefined ? ['no', 'connection'] as const : ['unknown', 'answer'] as const
        resolve({ code: 'mixpanel_timed_out', taken, cause: `no ${what} in ${timeoutMs} ms`, isTransient: true })
        controller?.abort(new Error('timed out'))
      }
      // Timers run before sockets are read. An answer that arrived during a stall of this process must be read first.
      let afterReading: NodeJS.Immediate | undefined
      const timer = setTimeout(() => { afterReading = setImmediate(timeOut) }, timeoutMs)
      function finish (answer: Answer): void {
        clearTimeout(timer)
        clearImmediate(afterReading)
        resolve(answer)
      }
      pool.dispatch({ method: 'POST', path: prefix + path, headers, body }, {
        onRequestStart (started) {
          controller = started
          if (isTimedOut) started.abort(new Error('timed out'))
        },
        onResponseStart (_, statusCode, headers) {
          status = statusCode
          checkClock(headers.date)
          const answer = interpretStatus(statusCode, headers['retry-after'])
          // The timer still runs: the rest of the answer must not occupy the connection for ever.
          if (answer !== undefined) resolve(answer)
        },
        onResponseData (_, chunk) {
          chunks.push(chunk)
        },
        onResponseEnd () {
          finish(interpretBody(status, Buffer.concat(chunks).toString(), credentials.mask))
        },
        onResponseError (_, error) {
          // A 400 is a refusal, even if its body is too large to be read.
          finish(status === 400 ? interpretBody(status, '') : interpretError(error))
        }
      })
    }),

    /** Returns true if `text` looks like the token of another project. */
    isForeignToken: credentials.isForeignToken,

    /** Returns how many seconds this clock is ahead of Mixpanel's; undefined until its first answer. */
    clockSkew: () => clockSkew,

    /** Takes the token and the service account of a changed configuration for all later requests. */
    useSecrets: credentials.use,

    /** Closes the connections; requests in flight fail. */
    close: () => pool.destroy()
  }
}
