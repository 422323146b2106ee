import { LAST_PROBE_MS } from '../mixpanel/breaker.ts'

/** While Mixpanel accepts other events, a backoff ends after this long, or at random up to twice as long. */
const RECOVERED_MS = 5000

/** The pause after an error of the store. */
const STORE_ERROR_MS = 1000

/** Returns Mixpanel's advised backoff: 2 s, doubled up to 60 s, plus a random 1 to 5 s. `failures` counts from 1. */
export const backoffMs = (failures: number) => Math.min(1000 * 2 ** failures, 60_000) + 1000 + Math.random() * 4000

/** The forwarder's pauses, and the events that end them early. */
export function createPauses () {
  const pauses = new Set<{ isIdle: boolean, earliest: number, end: () => void }>()
  let isStopped = false

  function wait (ms: number, isIdle: boolean, minMs: number): Promise<void> {
    if (isStopped) return Promise.resolve()
    return new Promise(resolve => {
      const end = () => {
        clearTimeout(timer)
        pauses.delete(pause)
        resolve()
      }
      const timer = setTimeout(end, ms)
      const pause = { isIdle, earliest: performance.now() + minMs, end }
      pauses.add(pause)
    })
  }

  function endIf (mayEnd: (pause: { isIdle: boolean, earliest: number }) => boolean): void {
    for (const pause of [...pauses]) if (mayEnd(pause)) pause.end()
  }

  return {
    /** Resolves after `ms`, or when an entry is added. */
    idle: (ms: number) => wait(ms, true, 0),
    /** Resolves with true when `work` succeeds. When it rejects: calls `onError`, pauses, and resolves with false. */
    async attempt (work: () => Promise<void>, onError: (error: Error) => void): Promise<boolean> {
      try {
        await work()
        return true
      } catch (error) {
        onError(error as Error)
        await wait(STORE_ERROR_MS, false, Infinity)
        return false
      }
    },
    /** Resolves after `ms`, at most 30 s, or when Mixpanel accepts an event. */
    outage: (ms: number) => wait(Math.min(ms, LAST_PROBE_MS), false, 0),
    /**
     * Resolves after `ms`. After 5 to 10 s an accepted event ends the wait: at random, because replicas that exceed
     * Mixpanel's limit together should not do so again.
     */
    backoff: (ms: number) => wait(ms, false, RECOVERED_MS * (1 + Math.random())),

    added: () => endIf(({ isIdle }) => isIdle),
    recovered: () => endIf(({ isIdle, earliest }) => !isIdle && performance.now() >= earliest),

    isStopped: () => isStopped,
    /** Ends all pauses; later ones end at once. */
    stop (): void {
      isStopped = true
      endIf(() => true)
    }
  }
}
