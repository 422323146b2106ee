/**
 * The outcome for one identity, or for all events of one request. `queued`: the event is on disk, in the outbox.
 * - `cause` is for the log: a status, an error code or the reason to queue, never a secret.
 * - `isTransient`: a repeat of the same bytes may succeed at once. `retryAfter` is in seconds.
 * - `isUndelivered`: Mixpanel certainly does not have the event; otherwise it may have it.
 * - `records`: the reasons of refused events by index, if Mixpanel listed them. `imported`: its count of the others.
 */
export type Verdict =
  | { code: 'accepted' }
  | { code: 'queued', cause: string }
  | {
    code: 'refused_by_mixpanel',
    reason?: string | undefined,
    records?: Map<number, string> | undefined
    imported?: unknown
  }
  | {
    code: 'mixpanel_unreachable' | 'mixpanel_misanswered' | 'mixpanel_timed_out'
    cause: string
    isTransient: boolean
    isUndelivered?: boolean
  }
  | { code: 'mixpanel_rejected_credentials', cause: string }
  | { code: 'mixpanel_rate_limited', cause: string, retryAfter: number }
  | { code: 'mixpanel_unavailable', retryAfter: number }
  | { code: 'overloaded', retryAfter: number, reason?: string }

/** The verdict beyond a bound on identities in flight. */
export const OVERLOADED = { code: 'overloaded', retryAfter: 1 } as const satisfies Verdict

/** Returns true if Mixpanel may accept it later: Mixpanel was unreachable, slow or busy, or another server answered. */
export function isDeferrable (verdict: Verdict): boolean {
  return verdict.code === 'mixpanel_timed_out' || verdict.code === 'mixpanel_rate_limited' ||
    verdict.code === 'mixpanel_unavailable' || isTransient(verdict)
}

/** Returns true if Mixpanel, or the path to it, failed: the request is retried, and the breaker counts it. */
export function isTransient (verdict: Verdict): verdict is Extract<Verdict, { isTransient: boolean }> {
  return 'isTransient' in verdict && verdict.isTransient
}

/** Returns true if Mixpanel certainly does not have the event. A gateway's 5xx leaves that open. */
export function isUndelivered (verdict: Verdict): boolean {
  return 'isTransient' in verdict ? verdict.isUndelivered === true : verdict.code !== 'accepted'
}

/** Returns true if Mixpanel, or a gateway, found the request too large; a part of it may be accepted. */
export function isTooLarge (verdict: Verdict): boolean {
  return 'cause' in verdict && verdict.cause === 'status 413'
}

/** Returns true if the breaker kept the request from being sent. */
export const isNotSent = ({ code }: Verdict) => code === 'mixpanel_unavailable'

/** Returns true if Mixpanel answered 429. */
export const isLimit = ({ code }: Verdict) => code === 'mixpanel_rate_limited'

/** Returns true for any other failure; the verdict must not be `accepted`. */
export const isFailure = (verdict: Verdict) => !isNotSent(verdict) && !isLimit(verdict)
