import { hash } from 'node:crypto'
import { Pool } from 'undici'
import type { Config } from './config.ts'
import type { Identity } from './identity.ts'
import { interpretBody, interpretError, interpretStatus, type Verdict } from './verdict.ts'

/** A `$identify` event as accepted: without the token, and never changed afterwards, so that a repeat is harmless. */
export interface IdentifyEvent {
  event: '$identify'
  properties: Readonly<Record<string, unknown>> & { $insert_id: string }
}

/** A request to Mixpanel, ready to be sent any number of times. */
export interface Encoded { path: string, headers: Record<string, string>, body: string }

export type Mixpanel = ReturnType<typeof createMixpanel>

const BASE_URLS = { us: 'https://api.mixpanel.com', eu: 'https://api-eu.mixpanel.com', in: 'https://api-in.mixpanel.com' }

/** Real answers have a few hundred bytes; an edge's error page may have megabytes. */
const MAX_ANSWER_BYTES = 65_536

/** The base URL that the configuration names, without a slash at its end. */
export function baseUrl (config: Pick<Config, 'MIXPANEL_URL' | 'MIXPANEL_REGION'>): string {
  return (config.MIXPANEL_URL ?? BASE_URLS[config.MIXPANEL_REGION]).replace(/\/+$/, '')
}

/**
 * The event of an identity accepted at `now` (ms since the epoch). `$insert_id` depends on nothing but the two ids, so
 * that Mixpanel can tell a repeat (docs: at most 36 bytes of [A-Za-z0-9-]).
 */
export function identifyEvent (identity: Identity, now: number): IdentifyEvent {
  const { identified_id: identified, anon_id: anon, properties } = identity
  // No valid id holds a line feed, so no two pairs join to the same text.
  const digest = hash('sha256', `${anon}\n${identified}`)
  return {
    event: '$identify',
    properties: {
      ...properties,
      // Optional on paper; without it Mixpanel has been seen to answer "distinct_id, missing or empty".
      distinct_id: identified,
      $identified_id: identified,
      $anon_id: anon,
      time: Math.floor(now / 1000),
      $insert_id: digest.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12}).*$/, '$1-$2-$3-$4-$5')
    }
  }
}

/** The only place that knows the token and Mixpanel's dialect. Whoever creates it must `close` it. */
export function createMixpanel (config: Config) {
  const { MIXPANEL_TOKEN: token, MIXPANEL_SERVICE_ACCOUNT: account, MIXPANEL_PROJECT_ID: project } = config
  const basic = `Basic ${Buffer.from(account ?? `${token}:`).toString('base64')}`
  const { origin, pathname } = new URL(baseUrl(config))
  const path = pathname === '/' ? '' : pathname
  const pool = new Pool(origin, {
    connections: 64,
    // A pool under traffic never resolves its host again by itself; this makes it follow DNS.
    clientTtl: 60_000,
    // Below the idle time of any server we know, or a request meets a connection that is just being closed.
    keepAliveTimeout: 4000,
    maxResponseSize: MAX_ANSWER_BYTES,
    // `send` has the timer for the rest. Node gives up an address after 250 ms, less than a far region's round trip.
    headersTimeout: 0,
    bodyTimeout: 0,
    connect: { timeout: config.MIXPANEL_TIMEOUT_MS, autoSelectFamily: true, autoSelectFamilyAttemptTimeout: 400 }
  })

  const withToken = ({ event, properties }: IdentifyEvent, secret: string) =>
    ({ event, properties: { token: secret, ...properties } })

  /** Mixpanel's words may quote what it was sent. */
  const masked = (verdict: Verdict): Verdict => verdict.code === 'refused_by_mixpanel'
    ? { ...verdict, reason: verdict.reason?.replaceAll(token, '***') }
    : verdict

  async function exchange (request: Encoded, signal: AbortSignal): Promise<Verdict> {
    try {
      const { statusCode, headers, body } = await pool.request({ ...request, method: 'POST', signal })
      const verdict = interpretStatus(statusCode, headers['retry-after'])
      if (verdict === undefined) return masked(interpretBody(statusCode, await body.text()))
      // Unread, the body would hold its connection; unreadable in a second, it costs the connection.
      body.dump({ limit: MAX_ANSWER_BYTES, signal: AbortSignal.timeout(1000) }).catch(() => {})
      return verdict
    } catch (error) {
      return interpretError(error as NodeJS.ErrnoException)
    }
  }

  return {
    /** The event as it would be sent, with the token masked. */
    preview: (event: IdentifyEvent) => withToken(event, '***'),

    /**
     * The request for one event. `strict` asks Mixpanel to validate; `verbose` asks `/track` for its reason in place
     * of a bare `0`. Neither changes anything for `/import`, which always does both.
     */
    encode (event: IdentifyEvent, { strict = false, verbose = false } = {}): Encoded {
      const json = JSON.stringify(withToken(event, token))
      if (config.MIXPANEL_ENDPOINT === 'import') {
        return {
          path: `${path}/import?strict=1${project === undefined ? '' : `&project_id=${project}`}`,
          headers: { 'content-type': 'application/json', authorization: basic },
          body: `[${json}]`
        }
      }
      return {
        // ip=0: the relay's own address must not become the user's location.
        path: `${path}/track?ip=0${verbose ? '&verbose=1' : ''}`,
        headers: { 'content-type': 'application/x-www-form-urlencoded' },
        body: `data=${encodeURIComponent(json)}${strict || config.MIXPANEL_STRICT === '1' ? '&strict=1' : ''}`
      }
    },

    /** Sends once. Resolves within `timeoutMs`, whatever happens, and never rejects. */
    async send (request: Encoded, timeoutMs: number): Promise<Verdict> {
      const abort = new AbortController()
      let timer: NodeJS.Timeout | undefined
      // The signal alone does not bound a request that undici still queues or connects for (nodejs/undici#386).
      const late = new Promise<Verdict>(resolve => {
        timer = setTimeout(() => {
          resolve({ code: 'mixpanel_timed_out', cause: `no answer in ${timeoutMs} ms`, again: true })
          abort.abort()
        }, timeoutMs)
      })
      try {
        return await Promise.race([late, exchange(request, abort.signal)])
      } finally {
        clearTimeout(timer)
      }
    },

    /** Waits for requests under way, then closes the connections. */
    close: () => pool.close()
  }
}
