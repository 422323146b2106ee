import { createRequire } from 'node:module'
import type undici from 'undici'
import type { Config } from '../config.ts'
import { parseEvent, type PendingEvent } from '../identity/event.ts'
import type { Verdict } from '../identity/verdict.ts'
import { interpretBody, interpretError, interpretStatus } from './answer.ts'
import { createCredentials } from './credentials.ts'
import { encodeRequest, type EncodedRequest, type EncodeOptions } from './encode.ts'

// All of undici (fetch, WebSocket, caches, …) would add a sixth to the start and to the memory.
const Pool = createRequire(import.meta.url)('undici/lib/dispatcher/pool.js') as typeof undici.Pool

export type Mixpanel = ReturnType<typeof createMixpanel>

const BASE_URLS = { us: 'https://api.mixpanel.com', eu: 'https://api-eu.mixpanel.com', in: 'https://api-in.mixpanel.com' }

/** How many requests may be under way at a time, each on a connection of its own. */
export const MAX_SENDS = 64

/** Real answers have a few hundred bytes; an edge's error page may have megabytes. */
const MAX_ANSWER_BYTES = 65_536

/** The base URL that the configuration names, without a slash at its end. */
export function baseUrl (config: Pick<Config, 'MIXPANEL_URL' | 'MIXPANEL_REGION'>): string {
  return (config.MIXPANEL_URL ?? BASE_URLS[config.MIXPANEL_REGION]).replace(/\/+$/, '')
}

/** A client of Mixpanel that sends each request once. Its creator must `close` it. */
export function createMixpanel (config: Config) {
  const credentials = createCredentials(config)
  const { origin, pathname } = new URL(baseUrl(config))
  const prefix = pathname === '/' ? '' : pathname
  const pool = new Pool(origin, {
    connections: MAX_SENDS,
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

  return {
    /** The event as it would be sent, with the token masked. */
    preview (pending: PendingEvent) {
      const { event, properties } = parseEvent(pending)
      return { event, properties: { token: '***', ...properties } }
    },

    /** The request for some events, ready for `send`. */
    encode: (events: PendingEvent[], options: EncodeOptions = {}) =>
      encodeRequest(events, options, credentials, config),

    /**
     * Sends once. Resolves within `timeoutMs`, or as soon as this process runs again; rejects only on a bug. By
     * undici's `dispatch`, which is cheaper than its `request`: an answer of one byte needs no stream.
     */
    send: ({ path, headers, body }: EncodedRequest, timeoutMs: number) => new Promise<Verdict>(resolve => {
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
      pool.dispatch({ method: 'POST', path: prefix + path, headers, body }, {
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
          settle(interpretBody(status, Buffer.concat(chunks).toString(), credentials.mask))
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
