/**
 * The outcome for one identity.
 * - `taken`: whether Mixpanel has the event. A `queued` event is on disk, in the outbox, and may be there as well.
 * - `cause` is for the log: a status, an error code or the reason to queue, never a secret.
 * - `reason` is for the caller: the words of Mixpanel or of the relay.
 * - `retryAfter` is in seconds.
 * - `sent` is for the log: what it took to send the event.
 */
export interface Verdict {
  code: Outcome
  taken: Taken
  cause?: string
  reason?: string
  retryAfter?: number
  sent?: Sent
}

/** The time until the verdict, the requests that carried the event, and the events of the first of them. */
export interface Sent { mixpanel_ms: number, attempts: number, events: number }

export type Taken = 'yes' | 'no' | 'unknown'

/** The code of every failure is a problem code. */
export type Outcome = 'accepted' | 'queued' | Failure
export type Failure = 'refused_by_mixpanel' | 'suspicious_identity' | 'mixpanel_unreachable' |
  'mixpanel_misanswered' | 'mixpanel_timed_out' | 'mixpanel_rejected_credentials' | 'mixpanel_rate_limited' |
  'mixpanel_unavailable' | 'overloaded'

/** The verdict beyond a bound on identities in flight. */
export const OVERLOADED = { code: 'overloaded', taken: 'no', retryAfter: 1 } as const satisfies Verdict

/** The verdict of an event whose deadline passed before it was sent. */
export const NEVER_SENT = { code: 'mixpanel_timed_out', taken: 'no', cause: 'never sent' } as const satisfies Verdict

/** Returns true unless the event was accepted or queued. */
export const hasFailed = (verdict: Verdict): verdict is Verdict & { code: Failure } =>
  verdict.code !== 'accepted' && verdict.code !== 'queued'

/** The failures after which Mixpanel may accept the same bytes later. */
const DEFERRABLE = new Set<Outcome>([
  'mixpanel_unreachable', 'mixpanel_misanswered', 'mixpanel_timed_out', 'mixpanel_rate_limited', 'mixpanel_unavailable'
])

/** The failures after which the same request may succeed; their problems are `retryable`. */
const RETRYABLE = new Set<Outcome>([...DEFERRABLE, 'overloaded'])

/** Returns true if Mixpanel may accept the event later. A 3xx or a 413 will not change. */
export const isDeferrable = (verdict: Verdict) => DEFERRABLE.has(verdict.code) && !isPermanent(verdict)

/** Returns true if the caller is told that the same request may succeed later. */
export const isRetryable = ({ code }: Verdict) => RETRYABLE.has(code)

/** Returns true if Mixpanel, or a gateway, found the request too large; a part of it may be accepted. */
export const isTooLarge = ({ cause }: Pick<Verdict, 'cause'>) => cause === 'status 413'

/** Returns true for a status that no retry changes, such as a redirect or a 404. */
const isPermanent = ({ code, cause }: Pick<Verdict, 'code' | 'cause'>) =>
  code === 'mixpanel_misanswered' && cause?.startsWith('status ') === true

/** Returns true if the breaker kept the request from being sent. */
export const isNotSent = ({ code }: Verdict) => code === 'mixpanel_unavailable'

/** Returns true if Mixpanel answered 429. */
export const isLimit = ({ code }: Verdict) => code === 'mixpanel_rate_limited'

/** Returns true for any other failure; the verdict must not be `accepted`. */
export const isFailure = (verdict: Verdict) => !isNotSent(verdict) && !isLimit(verdict)
