import type { Config } from '../config.ts'
import type { Delivery } from '../delivery.ts'
import { claimOf } from '../event.ts'
import type { Verdict } from '../verdict.ts'
import type { Entry, Outbox, StoreLog } from './outbox.ts'
import { backoffMs, createPace } from './pace.ts'
import { choose, finalReason, isTooOld, maxRound } from './round.ts'
import { createSuspects } from './suspects.ts'

type Log = StoreLog & Record<'debug', (what: object, message: string) => void>

interface Outcome { entry: Entry, verdict: Verdict }

/** After a failure a round is an eighth of the one before, down to a lone probe; after a success twice as large. */
const SHRINKS = 8
const GROWS = 2

/** Another relay may have died, or come back with something in hand; and a store that failed may be well again. */
const LOOK_AGAIN_MS = 1000

/** At the end of the process: how long what is under way may take. It stays in the outbox. */
const LAST_ROUND_MS = 2000

/**
 * Brings to Mixpanel what waits in the outbox, oldest first, in full arrays, until it is delivered, refused or too old.
 * Entries with one claim are never under way together, so the first claim arrives first. Begins at once; the caller
 * must `stop` it before the outbox is closed.
 */
export function createDrain (config: Config, outbox: Outbox, delivery: Delivery, log: Log) {
  const most = maxRound(config)
  const pace = createPace()
  const suspects = createSuspects()
  const state = { size: most, failures: 0, isAbandoned: false }

  async function run (): Promise<void> {
    while (!pace.isStopped()) await orWait(round)
  }

  /** Where the store fails, says so and waits. Resolves with whether the work is done. */
  async function orWait (work: () => Promise<void>): Promise<boolean> {
    try {
      await work()
      return true
    } catch (error) {
      log.error({ cause: (error as Error).message }, 'the outbox cannot be emptied')
      await pace.outage(LOOK_AGAIN_MS)
      return false
    }
  }

  async function round (): Promise<void> {
    const entries = await outbox.take(most)
    const old = entries.filter(entry => isTooOld(entry, config))
    await bury(old.map(entry => ({ entry, reason: 'older than 4.5 days' })))
    const arrays = choose(entries.filter(entry => !old.includes(entry)), state.size, suspects, config.MAX_BATCH)
    if (arrays.length === 0) return pace.idle(LOOK_AGAIN_MS)
    const outcomes = (await Promise.all(arrays.map(deliver))).flat()
    if (state.isAbandoned) return
    // Before anything else is sent the outbox must know what has been.
    while (!await orWait(() => settle(outcomes)) && !pace.isStopped());
    await adapt(outcomes)
  }

  async function deliver (entries: Entry[]): Promise<Outcome[]> {
    const deadline = Date.now() + config.DEADLINE_MS
    const items = entries.map(({ event, endpoint }) => ({ event, endpoint, isStrict: false, deadline }))
    const verdicts = await delivery.deliver(items)
    return entries.map((entry, index) => ({ entry, verdict: verdicts[index] as Verdict }))
  }

  async function settle (outcomes: Outcome[]): Promise<void> {
    const delivered = outcomes.filter(({ verdict }) => verdict.code === 'accepted').map(({ entry }) => entry)
    if (delivered.length > 0) await outbox.done(delivered)
    const letters = outcomes.flatMap(({ entry, verdict }) => {
      const reason = finalReason(entry, verdict)
      return reason === undefined ? [] : [{ entry, reason }]
    })
    await bury(letters)
    log.debug({ delivered: delivered.length, buried: letters.length, ...outbox.counts() }, 'a round of the outbox')
  }

  async function bury (letters: { entry: Entry, reason: string }[]): Promise<void> {
    if (letters.length === 0) return
    await outbox.bury(letters)
    const ids = letters.map(({ entry }) => entry.event.properties.$insert_id)
    log.warn({ identities: letters.length, insert_ids: ids.slice(0, 100) }, 'cannot be delivered: dead letters')
  }

  /** How large the next round is, and when. */
  async function adapt (outcomes: Outcome[]): Promise<void> {
    const failed: Verdict[] = []
    for (const { entry, verdict } of outcomes) {
      const claim = claimOf(entry.event)
      const isSettled = verdict.code === 'accepted' || finalReason(entry, verdict) !== undefined
      const isAlone = outcomes.length === 1 || suspects.has(claim)
      if (isSettled) suspects.settled(claim)
      // Mixpanel takes others, and this one it does not even refuse.
      else if (isAlone && 'again' in verdict && !delivery.isOpen()) suspects.failed(claim)
      else failed.push(verdict)
    }
    if (failed.length === 0) {
      if (state.failures > 0) log.info(outbox.counts(), 'the outbox is drained again')
      state.failures = 0
      state.size = Math.min(state.size * GROWS, most)
      return
    }
    const retryAfterMs = Math.max(...failed.map(verdict => 'retryAfter' in verdict ? verdict.retryAfter * 1000 : 0))
    // It was not even asked.
    if (failed.every(({ code }) => code === 'mixpanel_unavailable')) return pace.outage(retryAfterMs)
    if (state.failures++ === 0) log.warn({ code: failed[0]?.code, ...outbox.counts() }, 'the outbox waits for Mixpanel')
    state.size = Math.max(1, Math.ceil(outcomes.length / SHRINKS))
    const ms = Math.max(backoffMs(state.failures), retryAfterMs)
    await (delivery.isOpen() ? pace.outage(ms) : pace.backoff(ms))
  }

  const running = run()

  return {
    /** Something was put into the outbox. */
    added: pace.added,
    /** Mixpanel has taken something. */
    recovered: pace.recovered,
    /** Resolves when nothing is under way any more, or after two seconds; what is not settled stays in the outbox. */
    async stop (): Promise<void> {
      pace.stop()
      let timer: NodeJS.Timeout | undefined
      await Promise.race([running, new Promise(resolve => { timer = setTimeout(resolve, LAST_ROUND_MS) })])
      clearTimeout(timer)
      state.isAbandoned = true
    }
  }
}
