import { createLocalJWKSet, type JSONWebKeySet, type JWTVerifyGetKey } from 'jose'
import { once } from 'node:events'
import type { IncomingMessage } from 'node:http'
import { isDeepStrictEqual } from 'node:util'
import { startGet } from '../../get.ts'
import type { Log } from '../../log.ts'
import { TunnelError, type Proxy } from '../../proxy.ts'

const REFRESH_MS = 300_000
/** The shortest time between two requests that unknown keys cause, and the time until a failed request is repeated. */
const COOLDOWN_MS = 10_000
const TIMEOUT_MS = 5000
/** Large identity providers answer with some 10 KB and ten keys. */
const MAX_BYTES = 262_144
const MAX_KEYS = 100

interface Options {
  log: Log
  /** Called when the keys have changed. */
  onChange: () => void
  /** The proxy through which the keys are fetched. */
  proxy?: Proxy | undefined
  refreshMs?: number
  cooldownMs?: number
}

/**
 * Resolves with the public keys at `url` once they are loaded; rejects with a sentence when they cannot be. They are
 * fetched again every five minutes, and when a token names an unknown key, but for tokens only once in ten seconds.
 * While the server is down, or answers with no keys, the known keys stay: jose's own remote set would drop them.
 */
export async function createJwks (url: string, options: Options) {
  const { log, onChange, proxy, refreshMs = REFRESH_MS, cooldownMs = COOLDOWN_MS } = options
  let jwks = await fetchKeys(url, proxy).catch((error: Error) => {
    throw new Error(`JWT_JWKS_URL: no keys can be fetched (${causeOf(error)})`)
  })
  let keys = createLocalJWKSet(jwks)
  let isStale = false
  let isClosed = false
  let lastAsked = -Infinity
  let fetching: Promise<void> | undefined
  let timer = setTimeout(refresh, refreshMs).unref()

  /** Fetches the keys, once for all that ask at the same time. Never rejects. */
  function refresh (): Promise<void> {
    return (fetching ??= update().finally(() => {
      fetching = undefined
      clearTimeout(timer)
      if (!isClosed) timer = setTimeout(refresh, isStale ? Math.min(cooldownMs, refreshMs) : refreshMs).unref()
    }))
  }

  async function update (): Promise<void> {
    try {
      const fetched = await fetchKeys(url, proxy)
      if (isStale) log.info({}, 'JWKS available again')
      isStale = false
      if (isDeepStrictEqual(fetched, jwks)) return
      jwks = fetched
      keys = createLocalJWKSet(jwks)
      onChange()
    } catch (error) {
      if (!isStale) log.error({ cause: causeOf(error as Error) }, 'JWKS unavailable, known keys stay')
      isStale = true
    }
  }

  return {
    /** Resolves with the known key of a token, for jose; rejects with jose's JWKSNoMatchingKey if there is none. */
    getKey: ((header, token) => keys(header, token)) satisfies JWTVerifyGetKey,

    /**
     * Fetches the keys, for a token that names an unknown one. Resolves with false, at once, if that was tried less
     * than a cooldown ago.
     */
    async lookForNew (): Promise<boolean> {
      const mayAsk = performance.now() - lastAsked >= cooldownMs
      if (!mayAsk && fetching === undefined) return false
      if (mayAsk) lastAsked = performance.now()
      await refresh()
      return true
    },

    /** Returns `stale` while the last request for the keys has failed. */
    state: () => isStale ? 'stale' : 'current',

    close (): void {
      isClosed = true
      clearTimeout(timer)
    }
  }
}

/** Resolves with the signing keys at `url`. Rejects when there are none, or when the answer is too slow or too long. */
async function fetchKeys (url: string, proxy: Proxy | undefined): Promise<JSONWebKeySet> {
  const signal = AbortSignal.timeout(TIMEOUT_MS)
  const headers = { accept: 'application/json', 'accept-encoding': 'identity' }
  const request = startGet(url, { timeoutMs: TIMEOUT_MS, headers, proxy, signal })
  const chunks: Buffer[] = []
  try {
    const [response] = await once(request, 'response') as [IncomingMessage]
    if (response.statusCode !== 200) throw new Error(`status ${response.statusCode}`)
    let length = 0
    for await (const chunk of response) {
      length += chunk.length
      if (length > MAX_BYTES) throw new Error(`more than ${MAX_BYTES} bytes`)
      chunks.push(chunk)
    }
  } catch (error) {
    throw signal.aborted ? new Error(`no answer in ${TIMEOUT_MS} ms`) : error
  } finally {
    request.destroy()
  }
  const { keys } = parse(Buffer.concat(chunks).toString())
  const usable = Array.isArray(keys) ? keys.filter(isSigningKey).slice(0, MAX_KEYS) : []
  if (usable.length === 0) throw new Error('an answer without keys')
  return { keys: usable }
}

function parse (text: string): { keys?: unknown } {
  try {
    return Object(JSON.parse(text))
  } catch {
    throw new Error('an answer that is not JSON')
  }
}

/** A symmetric key (`oct`) in a public document would let anyone sign. */
const isSigningKey = (key: unknown) => {
  const { kty, use = 'sig' } = Object(key) as { kty?: unknown, use?: unknown }
  return ['RSA', 'EC', 'OKP'].includes(String(kty)) && use === 'sig'
}

function causeOf (error: NodeJS.ErrnoException): string {
  return error instanceof TunnelError ? error.message : error.code ?? error.message
}
