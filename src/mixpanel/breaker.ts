/** The consecutive failures that open the breaker (as in Envoy). */
const MAX_FAILURES = 5
const FIRST_PROBE_MS = 1000

/** The longest pause between two probes. */
export const LAST_PROBE_MS = 30_000

/**
 * A circuit breaker. Five consecutive failures open it; a success closes it. While open it admits one probe at a time.
 * The pauses between probes are at most 1, 2, 4, … 30 s, and at least half of that. They are random, because an outage
 * opens the breakers of all replicas at once, and equal pauses would make all replicas resume at once. `onChange`
 * is called when it opens and when it closes.
 */
export function createBreaker (onChange: (to: 'open' | 'closed') => void = () => {}) {
  let failures = 0
  let pauseMs = FIRST_PROBE_MS
  let probeAt = 0
  let isProbing = false

  return {
    isOpen: () => failures >= MAX_FAILURES,

    /** Returns true if a request may be sent now. The caller must then `record` its outcome. */
    admits (): boolean {
      if (failures < MAX_FAILURES) return true
      if (isProbing || performance.now() < probeAt) return false
      isProbing = true
      return true
    },

    record (isSuccess: boolean): void {
      if (isSuccess) {
        const wasOpen = failures >= MAX_FAILURES
        failures = 0
        pauseMs = FIRST_PROBE_MS
        isProbing = false
        if (wasOpen) onChange('closed')
        return
      }
      // Between probes, late failures of older requests do not count.
      if (failures >= MAX_FAILURES && !isProbing) return
      failures++
      isProbing = false
      if (failures < MAX_FAILURES) return
      if (failures === MAX_FAILURES) onChange('open')
      probeAt = performance.now() + pauseMs * (1 - Math.random() / 2)
      pauseMs = Math.min(pauseMs * 2, LAST_PROBE_MS)
    },

    /** Returns the whole seconds until the next probe, at least 1. */
    retryAfter: () => Math.max(1, Math.ceil((probeAt - performance.now()) / 1000))
  }
}
