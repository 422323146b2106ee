import { setTimeout as sleep } from 'node:timers/promises'
import { createBatcher } from './batcher.ts'
import { createBreaker } from './breaker.ts'
import type { Config } from './config.ts'
import { identifyEvent, type IdentifyEvent } from './event.ts'
import type { Identity } from './identity.ts'
import type { Mixpanel } from './mixpanel.ts'
import { TEMPORARY, type Verdict } from './verdict.ts'

/** What `createRelay` says about its work; `pino` fits. */
type Log = Record<'warn' | 'debug', (what: object, message: string) => void>

/** An event on its way. `deadline` (ms since the epoch) is its caller's; for a batch the first one's counts. */
interface Item { event: IdentifyEvent, isStrict: boolean, deadline: number }

export type Relay = ReturnType<typeof createRelay>

/**
 * How many requests to Mixpanel may be under way before an identity waits for company, and how many at all (there are
 * that many connections). Measured with 4, 6, 8 and 16: 500 callers at 50 ms get 0.80, 0.84, 0.86 and 0.86 of what that
 * latency allows, and a thousand who come within 0.7 s, at 20 ms, cost 42, 51, 62 and 96 requests.
 */
const FREE_SENDS = 6
const MAX_SENDS = 64

/** Repeats under way: a fifth of the sends, but always a few, so that an outage does not double the traffic. */
const RETRY_SHARE = 0.2
const RETRY_MINIMUM = 3

/** What happens to an identity once it is accepted: batch, send, if need be repeat, and each gets its own verdict. */
export function createRelay (config: Config, mixpanel: Mixpanel, log: Log) {
  const breaker = createBreaker()
  let sends = 0
  let retries = 0
  let lastVerdict: { code: Verdict['code'], at: number } | undefined

  const batcher = createBatcher<Item, Verdict>({
    send: items => deliver(items),
    maxBatch: config.MAX_BATCH,
    freeSends: FREE_SENDS,
    maxSends: MAX_SENDS,
    maxItems: config.MAX_IN_FLIGHT,
    // In the last tenth of its time a send would hardly be answered, and its failure would be counted as Mixpanel's.
    maxWaitMs: config.DEADLINE_MS * 0.9,
    late: () => ({ code: 'mixpanel_timed_out', cause: 'never sent', again: false }),
    isAlone: item => item.isStrict
  })

  /** A verdict for each. `isSearch`: Mixpanel answered `0` to more than these, and the guilty are looked for. */
  async function deliver (items: Item[], isSearch = false): Promise<Verdict[]> {
    const verdict = await sendAndRepeat(items, isSearch && items.length === 1)
    if (items.length === 1) {
      const isMute = verdict.code === 'refused_by_mixpanel' && verdict.reason === undefined
      return [isMute && !isSearch ? await explain(items, verdict) : verdict]
    }
    const { records, imported } = verdict.code === 'refused_by_mixpanel' ? verdict : {}
    // Only if Mixpanel says that it took the others.
    if (records !== undefined && imported === items.length - records.size) {
      return items.map((_, index) => records.has(index)
        ? { code: 'refused_by_mixpanel', reason: records.get(index) }
        : { code: 'accepted' })
    }
    // One answer for many condemns nobody: halve until each guilty one stands alone. That costs at most twice the
    // logarithm of the batch for each of them, and the innocent, sent again, are the same bytes. 413: documentation
    // names both 2 MiB and 10 MB as the limit.
    if (verdict.code === 'refused_by_mixpanel' || ('cause' in verdict && verdict.cause === 'status 413')) {
      const middle = Math.ceil(items.length / 2)
      const halves = [items.slice(0, middle), items.slice(middle)]
      return (await Promise.all(halves.map(half => deliver(half, true)))).flat()
    }
    return items.map(() => verdict)
  }

  async function sendAndRepeat (items: Item[], isVerbose: boolean): Promise<Verdict> {
    if (!breaker.admits()) return { code: 'mixpanel_unavailable', retryAfter: breaker.retryAfter() }
    const [{ deadline, isStrict }] = items as [Item]
    const request = mixpanel.encode(items.map(({ event }) => event), { strict: isStrict, verbose: isVerbose })
    const attempt = () => mixpanel.send(request, Math.min(config.MIXPANEL_TIMEOUT_MS, deadline - Date.now()))
    sends++
    let verdict = await attempt()
    breaker.record(!isOutage(verdict))
    // Jitter, so that those who failed together do not come back together.
    const pause = 50 + Math.random() * 250
    if (isOutage(verdict) && mayRetry() && Date.now() + pause < deadline) {
      log.warn({ code: verdict.code, cause: verdict.cause, identities: items.length }, 'sending once more')
      retries++
      await sleep(pause)
      verdict = await attempt()
      retries--
      if (!isOutage(verdict)) breaker.record(true)
    }
    sends--
    if (verdict.code === 'refused_by_mixpanel') log.debug({ reason: verdict.reason }, 'refused')
    lastVerdict = { code: verdict.code, at: Date.now() }
    return verdict
  }

  const mayRetry = () => !breaker.isOpen() && retries < Math.max(RETRY_MINIMUM, sends * RETRY_SHARE)

  /** A bare `0` may mean anything, even a passing fault of Mixpanel's; with `verbose=1` it says which. */
  async function explain (items: Item[], refused: Verdict): Promise<Verdict> {
    const verdict = await sendAndRepeat(items, true)
    const isAnswer = verdict.code === 'accepted' || verdict.code === 'refused_by_mixpanel' ||
      (verdict.code === 'mixpanel_unreachable' && verdict.cause === TEMPORARY)
    return isAnswer ? verdict : refused
  }

  return {
    /**
     * Resolves with the identity's own verdict within DEADLINE_MS; rejects only on a bug. With MAX_IN_FLIGHT identities
     * waiting it is `overloaded` at once. A caller who goes away stops nothing: what is accepted is sent.
     */
    identify (event: IdentifyEvent, isStrict = false): Promise<Verdict> {
      return batcher.add({ event, isStrict, deadline: Date.now() + config.DEADLINE_MS }) ??
        Promise.resolve({ code: 'overloaded', retryAfter: 1 })
    },

    /** The event of an identity that is accepted now. */
    accept: (identity: Identity) => identifyEvent(identity, Date.now()),

    /** The event as it would be sent, with the token masked. */
    preview: mixpanel.preview,

    /** For people: how many identities wait, and what Mixpanel said last. */
    state: () => ({
      waiting: batcher.waiting(),
      mixpanel: breaker.isOpen() ? 'unavailable' : 'asked',
      last_verdict: lastVerdict === undefined ? null : { ...lastVerdict, at: new Date(lastVerdict.at).toISOString() }
    }),

    /** Resolves when nothing waits any more, for callers who have gone neither, and the connections are closed. */
    async close (): Promise<void> {
      await batcher.idle()
      await mixpanel.close()
    }
  }
}

/** Mixpanel, or the way to it, failed: worth a repeat, and a reason to stop asking when it goes on. */
function isOutage (verdict: Verdict): verdict is Extract<Verdict, { again: boolean }> {
  return 'again' in verdict && verdict.again
}
