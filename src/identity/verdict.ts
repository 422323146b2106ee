/**
 * What became of an identity, or of all that travelled in one request. `cause` is for the log (a status or an error
 * code, never a secret); `again` says that the same bytes sent once more may help right away; `retryAfter` is in
 * seconds; `records` has, where Mixpanel named them, the refused ones' reasons by index, and `imported` how many others
 * it says it took. `queued`: it is in the outbox, on disk, and `cause` says why.
 * `isUntaken`: Mixpanel surely has nothing of it; without that the outcome is unknown.
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

/** More wait than may. */
export const OVERLOADED = { code: 'overloaded', retryAfter: 1 } as const satisfies Verdict

/** True where Mixpanel may take it another time: it was out of reach, late, busy, or what answered was not Mixpanel. */
export function isDeferrable (verdict: Verdict): boolean {
  return verdict.code === 'mixpanel_timed_out' || verdict.code === 'mixpanel_rate_limited' ||
    verdict.code === 'mixpanel_unavailable' || isTransient(verdict)
}

/** Mixpanel, or the way to it, failed: worth a repeat, and a reason to stop asking when it goes on. */
export function isTransient (verdict: Verdict): verdict is Extract<Verdict, { isTransient: boolean }> {
  return 'isTransient' in verdict && verdict.isTransient
}

/** True where Mixpanel surely has nothing of it. A gateway's 5xx does not say that. */
export function isUndelivered (verdict: Verdict): boolean {
  return 'isTransient' in verdict ? verdict.isUndelivered === true : verdict.code !== 'accepted'
}

/** Mixpanel, or something before it, found the request too large; a part of it may be taken. */
export function isTooLarge (verdict: Verdict): boolean {
  return 'cause' in verdict && verdict.cause === 'status 413'
}

/** True where Mixpanel was not even asked. */
export const isNotSent = ({ code }: Verdict) => code === 'mixpanel_unavailable'

/** True where Mixpanel was asked, and takes no more for now. */
export const isLimit = ({ code }: Verdict) => code === 'mixpanel_rate_limited'

/** True where Mixpanel was asked, and failed. */
export const isFailure = (verdict: Verdict) => !isNotSent(verdict) && !isLimit(verdict)
