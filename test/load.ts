import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Call } from './delivery-check.ts'

/** `async` is the share of requests with `Prefer: respond-async`. */
interface Options { async?: number, pauseMs?: number }

/** Callers that record their answers in order. `url` may change while they run. */
export function createCallers (url: () => string, { async: share = 0, pauseMs = 0 }: Options = {}) {
  const calls: Call[] = []
  const times: number[] = []
  let withoutRetryAfter = 0
  let end = new AbortController()
  let running: Promise<unknown> = Promise.resolve()

  async function call (anon: string = randomUUID()): Promise<number | undefined> {
    const id = `user-${randomUUID()}`
    const one: Call = { identity: { identified_id: id, anon_id: anon, properties: { text: 'a+b&c%20"\n', 7: [1, { deep: true }] } } }
    const headers = { 'content-type': 'application/json', ...Math.random() < share && { prefer: 'respond-async' } }
    const since = performance.now()
    try {
      const answer = await fetch(`${url()}/identify`, {
        method: 'POST', headers, body: JSON.stringify(one.identity), signal: AbortSignal.timeout(30_000)
      })
      one.status = answer.status
      if (answer.status === 503 && !answer.headers.has('retry-after')) withoutRetryAfter++
      times.push(performance.now() - since)
      one.code = /"code":"(\w+)"/.exec(await answer.text())?.[1]
    } catch {
      // The relay ended before it answered: the outcome is unknown.
    }
    calls.push(one)
    return one.status
  }

  async function writer ({ signal }: AbortController): Promise<void> {
    let previous: string | undefined
    while (!signal.aborted) {
      const anon = previous !== undefined && Math.random() < 0.1 ? previous : randomUUID()
      const status = await call(anon)
      previous = status === 200 || status === 202 ? anon : undefined
      if (status === undefined) await sleep(20)
      if (pauseMs > 0) await sleep(pauseMs)
    }
  }

  return {
    calls,
    /** The time to each answer, in ms. */
    times,
    call,
    /** The number of 503 without a Retry-After. */
    withoutRetryAfter: () => withoutRetryAfter,
    /** Starts callers with one request at a time each. One in ten reuses its last anonymous id, for another user. */
    start (count: number): void {
      end = new AbortController()
      running = Promise.all(Array.from({ length: count }, () => writer(end)))
    },
    async stop (): Promise<void> {
      end.abort()
      await running
    },
    /** The number of answers of each status; 'unknown' where there was none. */
    statuses: () => calls.reduce<Record<string, number>>((counts, { status = 'unknown' }) => ({ ...counts, [status]: (counts[status] ?? 0) + 1 }), {})
  }
}
