import { LAST_PROBE_MS } from '../mixpanel/breaker.ts'

/** While others are taken, what failed is tried again after this long, whatever its backoff is. */
const RECOVERED_MS = 5000

/** A store that failed may be well again after this long. */
const FAILED_MS = 1000

/** Mixpanel's advice: begin with 2 s, double up to 60 s, and add 1 to 5 s by chance. `failures` counts from 1. */
export const backoffMs = (failures: number) => Math.min(1000 * 2 ** failures, 60_000) + 1000 + Math.random() * 4000

/** The pauses of the drain, and what ends them early. */
export function createPauses () {
  let pause: { isIdle: boolean, earliest: number, end: () => void } | undefined
  let isStopped = false

  function rest (ms: number, isIdle: boolean, leastMs: number): Promise<void> {
    if (isStopped) return Promise.resolve()
    return new Promise(resolve => {
      const end = () => {
        clearTimeout(timer)
        pause = undefined
        resolve()
      }
      const timer = setTimeout(end, ms)
      pause = { isIdle, earliest: performance.now() + leastMs, end }
    })
  }

  return {
    /** There is nothing to do: for `ms`, or until something comes. */
    idle: (ms: number) => rest(ms, true, 0),
    /** Resolves with whether `work` is done; where it fails, `complain` is told, and there is a pause. */
    async attempt (work: () => Promise<void>, complain: (error: Error) => void): Promise<boolean> {
      try {
        await work()
        return true
      } catch (error) {
        complain(error as Error)
        await rest(FAILED_MS, false, Infinity)
        return false
      }
    },
    /** Mixpanel is out of reach: for `ms`, at most half a minute, or until it takes something. */
    outage: (ms: number) => rest(Math.min(ms, LAST_PROBE_MS), false, 0),
    /** It failed: for `ms`, or while Mixpanel takes what others send for five seconds. */
    backoff: (ms: number) => rest(ms, false, RECOVERED_MS),

    /** Something came. */
    added: () => { if (pause?.isIdle) pause.end() },
    /** Mixpanel has taken something from somebody. */
    recovered: () => { if (pause?.isIdle === false && performance.now() >= pause.earliest) pause.end() },

    isStopped: () => isStopped,
    /** From now on there is no pause. */
    stop (): void {
      isStopped = true
      pause?.end()
    }
  }
}
