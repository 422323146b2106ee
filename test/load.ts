import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Call } from './delivery-check.ts'

/** `async` is the share of those who prefer not to wait. */
interface Options { async?: number, pauseMs?: number }

/** Callers who record what they were told, in the order in which they were told it. `url` may change as they go on. */
export function createCallers (url: () => string, { async: share = 0, pauseMs = 0 }: Options = {}) {
  const calls: Call[] = []
  const times: number[] = []
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
      times.push(performance.now() - since)
      await answer.arrayBuffer()
    } catch {
      // The relay is gone, or went away before it answered: he does not know.
    }
    calls.push(one)
    return one.status
  }

  async function writer ({ signal }: AbortController): Promise<void> {
    let mine: string | undefined
    while (!signal.aborted) {
      const anon = mine !== undefined && Math.random() < 0.1 ? mine : randomUUID()
      const status = await call(anon)
      mine = status === 200 || status === 202 ? anon : undefined
      if (status === undefined) await sleep(20)
      if (pauseMs > 0) await sleep(pauseMs)
    }
  }

  return {
    calls,
    /** How long each answer took, in ms. */
    times,
    call,
    /** Some callers, each of whom sends one after the other; now and then one claims an id of his again, as another user. */
    start (count: number): void {
      end = new AbortController()
      running = Promise.all(Array.from({ length: count }, () => writer(end)))
    },
    async stop (): Promise<void> {
      end.abort()
      await running
    },
    /** How many were told what; 'unknown' where there was no answer. */
    told: () => calls.reduce<Record<string, number>>((told, { status = 'unknown' }) => ({ ...told, [status]: (told[status] ?? 0) + 1 }), {})
  }
}
