import { setTimeout as sleep } from 'node:timers/promises'
import createClient from 'openapi-fetch'
import type { components, paths } from './relay-api.d.ts'

export type Identity = components['schemas']['Identity']
export type Problem = components['schemas']['Problem']
export type Result = components['schemas']['Result']

const MAX_ATTEMPTS = 4
const FIRST_PAUSE_MS = 500

/** If the relay asks for a longer pause, the last answer counts. */
const MAX_PAUSE_MS = 60_000

/** Longer than DEADLINE_MS of the relay. */
const TIMEOUT_MS = 15_000

/** The statuses after which the same request may succeed, also where a proxy answers for the relay. */
const RETRYABLE = [429, 502, 503, 504]

/** The error of an identity, or of a batch, that the relay did not take. */
export class RelayError extends Error {
  override readonly name = 'RelayError'
  readonly status: number
  /** The answer of the relay; undefined if the answer came from something else, such as a proxy. */
  readonly problem: Problem | undefined

  constructor (status: number, problem: Problem | undefined) {
    super(problem === undefined ? `The relay answered ${status}.` : `${problem.code}: ${problem.detail}`)
    this.status = status
    this.problem = problem
  }
}

interface Options {
  /** The URL of the relay. */
  url: string
  /** One of API_KEYS of the relay. */
  apiKey: string
}

/** Returns a client of the relay. It repeats what may succeed later, which is always safe. */
export function createRelayClient ({ url, apiKey }: Options) {
  const client = createClient<paths>({ baseUrl: url, headers: { authorization: `Bearer ${apiKey}` } })
  const signal = () => AbortSignal.timeout(TIMEOUT_MS)

  return {
    /** Resolves with `accepted` or `queued`. Rejects with a RelayError, or with the error of fetch. */
    identify: (identity: Identity) => repeat(async () => {
      const { data, error, response } = await client.POST('/identify', { body: identity, signal: signal() })
      // With `dry_run` the answer would be a preview instead.
      if (data !== undefined && 'status' in data) return { value: data.status }
      return { error: new RelayError(response.status, asProblem(error)), response }
    }),

    /**
     * Resolves with a result for each identity, in their order. Identities that failed and may succeed later are
     * repeated, the others not. Rejects with a RelayError if the batch as a whole fails, or with the error of fetch;
     * the same batch may then be sent again.
     */
    async identifyBatch (identities: Identity[]): Promise<Result[]> {
      const results: Result[] = []
      let pending = identities.map((identity, index) => ({ identity, index }))
      return repeat(async () => {
        const body = { identities: pending.map(({ identity }) => identity) }
        const { data, error, response } = await client.POST('/identify/batch', { body, signal: signal() })
        if (data === undefined) return { error: new RelayError(response.status, asProblem(error)), response }
        const sent = pending
        for (const result of data.results) {
          const index = sent[result.index]?.index as number
          results[index] = { ...result, index }
        }
        pending = sent.filter(({ index }) => results[index]?.problem?.retryable)
        return pending.length === 0 ? { value: results } : { value: results, response }
      })
    }
  }
}

/** What came of one request. With `response` it may be repeated, at the time that this answer asks for. */
type Attempt<T> = { value: T, response?: Response } | { error: RelayError, response: Response }

/** Sends until there is nothing to repeat, at most MAX_ATTEMPTS times. */
async function repeat<T> (send: () => Promise<Attempt<T>>): Promise<T> {
  for (let count = 1; ; count++) {
    let retryAfterMs = 0
    try {
      const attempt = await send()
      retryAfterMs = (Number(attempt.response?.headers.get('retry-after')) || 0) * 1000
      if (isFinal(attempt) || count === MAX_ATTEMPTS || retryAfterMs > MAX_PAUSE_MS) {
        if ('error' in attempt) throw attempt.error
        return attempt.value
      }
    } catch (error) {
      // Without an answer the outcome is unknown.
      if (error instanceof RelayError || count === MAX_ATTEMPTS) throw error
    }
    // Half of the pause is random, so that clients that failed together do not return together.
    const backoffMs = FIRST_PAUSE_MS * 2 ** (count - 1) * (0.5 + Math.random() / 2)
    await sleep(Math.max(backoffMs, retryAfterMs))
  }
}

function isFinal (attempt: Attempt<unknown>): boolean {
  if ('error' in attempt) return !(attempt.error.problem?.retryable ?? RETRYABLE.includes(attempt.error.status))
  return attempt.response === undefined
}

/** Returns the error of an answer as a problem. A proxy answers with text. */
const asProblem = (error: Problem | string | undefined) =>
  typeof error === 'object' && 'code' in error ? error : undefined
