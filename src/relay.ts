import { setTimeout as sleep } from 'node:timers/promises'
import type { Config } from './config.ts'
import type { Identity } from './identity.ts'
import { identifyEvent, type IdentifyEvent, type Mixpanel } from './mixpanel.ts'
import type { Verdict } from './verdict.ts'

export interface IdentifyOptions { strict: boolean }

/** What `createRelay` says about its work; `pino` fits. */
interface Log { warn: (what: object, message: string) => void }

export type Relay = ReturnType<typeof createRelay>

/** What happens to an identity once it is accepted: it is sent, if need be once more, and its verdict comes back. */
export function createRelay (config: Config, mixpanel: Mixpanel, log: Log) {
  let waiting = 0
  let lastVerdict: { code: Verdict['code'], at: string } | undefined

  /** One attempt, within the time that the caller still has. */
  function attempt (event: IdentifyEvent, options: { strict: boolean, verbose?: boolean }, deadline: number) {
    return mixpanel.send(mixpanel.encode(event, options), Math.min(config.MIXPANEL_TIMEOUT_MS, deadline - Date.now()))
  }

  async function deliver (event: IdentifyEvent, { strict }: IdentifyOptions): Promise<Verdict> {
    const deadline = Date.now() + config.DEADLINE_MS
    let verdict = await attempt(event, { strict }, deadline)
    // Jitter, so that callers who failed together do not come back together.
    const pause = 50 + Math.random() * 250
    if ('again' in verdict && verdict.again && Date.now() + pause < deadline) {
      const { code, cause } = verdict
      log.warn({ insert_id: event.properties.$insert_id, code, cause }, 'sending once more')
      await sleep(pause)
      // The same bytes: had the first ones arrived after all, Mixpanel would know the $insert_id.
      verdict = await attempt(event, { strict }, deadline)
    }
    return verdict.code === 'refused_by_mixpanel' && verdict.reason === undefined
      ? await explain(event, verdict, deadline)
      : verdict
  }

  /** A bare `0` may mean anything, even a passing fault of Mixpanel's; with `verbose=1` it says which. */
  async function explain (event: IdentifyEvent, refused: Verdict, deadline: number): Promise<Verdict> {
    const verdict = await attempt(event, { strict: false, verbose: true }, deadline)
    const answered = verdict.code === 'accepted' || verdict.code === 'refused_by_mixpanel' ||
      (verdict.code === 'mixpanel_unreachable' && verdict.cause === 'temporary failure')
    return answered ? verdict : refused
  }

  return {
    /**
     * Resolves with the verdict within DEADLINE_MS; rejects only on a bug. With MAX_IN_FLIGHT identities waiting it is
     * `overloaded` at once. A caller who goes away stops nothing: what is accepted is sent.
     */
    async identify (event: IdentifyEvent, options: IdentifyOptions): Promise<Verdict> {
      if (waiting >= config.MAX_IN_FLIGHT) return { code: 'overloaded', retryAfter: 1 }
      waiting++
      try {
        const verdict = await deliver(event, options)
        lastVerdict = { code: verdict.code, at: new Date().toISOString() }
        return verdict
      } finally {
        waiting--
      }
    },

    /** The event of an identity that is accepted now. */
    accept: (identity: Identity) => identifyEvent(identity, Date.now()),

    /** The event as it would be sent, with the token masked. */
    preview: mixpanel.preview,

    /** For people: how many identities wait, and what Mixpanel said last. */
    state: () => ({ waiting, last_verdict: lastVerdict ?? null }),

    /** Resolves when nothing waits any more and the connections are closed. */
    close: mixpanel.close
  }
}
