/** Opens after so many failures in a row (Envoy's number). */
const FAILURES = 5
const FIRST_PROBE_MS = 1000

/** While Mixpanel is out of reach it is asked at least this often. */
export const LAST_PROBE_MS = 30_000

/**
 * Stops asking what keeps failing. After five failures in a row it is open: nothing is admitted but one probe at a
 * time, the first after a second, then after twice as long each time, up to half a minute; a success closes it.
 */
export function createBreaker () {
  let failures = 0
  let pauseMs = FIRST_PROBE_MS
  let probeAt = 0
  let isProbing = false

  return {
    isOpen: () => failures >= FAILURES,

    /** True if one may ask now; whoever is admitted must `record` the outcome. */
    admits (): boolean {
      if (failures < FAILURES) return true
      if (isProbing || performance.now() < probeAt) return false
      isProbing = true
      return true
    },

    /** Counts an outcome. */
    record (isSuccess: boolean): void {
      if (isSuccess) {
        failures = 0
        pauseMs = FIRST_PROBE_MS
        isProbing = false
        return
      }
      // What was under way when the breaker opened tells nothing new.
      if (failures >= FAILURES && !isProbing) return
      failures++
      isProbing = false
      if (failures < FAILURES) return
      probeAt = performance.now() + pauseMs
      pauseMs = Math.min(pauseMs * 2, LAST_PROBE_MS)
    },

    /** Whole seconds until the next probe, at least one. */
    retryAfter: () => Math.max(1, Math.ceil((probeAt - performance.now()) / 1000))
  }
}
