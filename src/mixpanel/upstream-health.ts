import { throttled, type Log } from '../log.ts'
import type { Answer } from './answer.ts'

/** A failure without a repeat says little: another request may have succeeded. */
const MIN_FAILURES = 2

/** What the answers say of Mixpanel and of the relay's credentials, for callers that follow and for operators. */
export function createUpstreamHealth (log: Log) {
  const warnOfCredentials = throttled(log, 'warn', 'credentials rejected by Mixpanel')
  let last: { code: Answer['code'], cause: string | undefined, at: Date } | undefined
  let failures = 0
  let failingSince: Date | undefined
  let heldUntil = 0
  let isOtherMode = false

  function reportMode (): void {
    if (!isOtherMode) log.error({ hint: 'set MIXPANEL_ID_MERGE=simplified' }, 'project has Simplified ID Merge')
    isOtherMode = true
  }

  return {
    /** Takes the answer to each request. */
    record ({ code, cause, reason, holdMs, isForAll }: Answer): void {
      const at = new Date()
      last = { code, cause, at }
      if (holdMs !== undefined) heldUntil = Math.max(heldUntil, performance.now() + holdMs)
      if (isForAll) reportMode()
      if (code === 'accepted' || code === 'refused_by_mixpanel') {
        failures = 0
        failingSince = undefined
        if (code === 'refused_by_mixpanel') log.debug({ reason }, 'request refused by Mixpanel')
        return
      }
      failures++
      failingSince ??= at
      if (code === 'mixpanel_rejected_credentials') warnOfCredentials({ cause })
    },

    /** Returns how many whole seconds are left of the wait that Mixpanel asked for with a 429; 0 if none are. */
    heldSeconds: () => Math.max(0, Math.ceil((heldUntil - performance.now()) / 1000)),

    /** Returns when Mixpanel began to fail every request; undefined while it does not. */
    failingSince: () => failures >= MIN_FAILURES ? failingSince : undefined,

    /** Returns the code of the last answer, and its cause for the log. */
    last: () => ({ code: last?.code, cause: last?.cause }),

    /** Returns the last answer, and the mode of the project where it differs from the configured one. */
    state: () => ({
      ...isOtherMode && { id_merge_of_project: 'simplified' },
      last_verdict: last === undefined
        ? null
        : { code: last.code, ...last.cause !== undefined && { cause: last.cause }, at: last.at.toISOString() }
    })
  }
}
