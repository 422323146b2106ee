import { setImmediate } from 'node:timers/promises'
import type { Config } from '../config.ts'
import type { Delivery } from '../mixpanel/delivery.ts'
import type { Log } from '../log.ts'
import { isFailure, isLimit, isNotSent, type Verdict } from '../identity/verdict.ts'
import type { Entry, Outbox } from '../outbox/outbox.ts'
import { backoffMs, createPauses } from './pauses.ts'
import { createPass, finalReason, isTooOld, maxRound, planRound } from './plan.ts'
import { createQuarantine } from './quarantine.ts'

interface Outcome { entry: Entry, verdict: Verdict }

/** Another relay may have put something, or died. */
const POLL_MS = 1000

/** How long what is under way may take at the end of the process. */
const LAST_ROUND_MS = 2000

/**
 * Brings to Mixpanel what waits in the outbox, oldest first, in full arrays, until it is delivered, refused or too old.
 * Entries with one claim are never under way together, so the first claim arrives first. The caller
 * must `start` it, and `stop` it before the outbox is closed.
 */
export function createForwarder (config: Config, outbox: Outbox, delivery: Delivery, log: Log) {
  const maxEntries = maxRound(config)
  const pauses = createPauses()
  const quarantine = createQuarantine()
  const state = { failures: 0, isAbandoned: false }
  let pass = createPass()

  async function run (): Promise<void> {
    while (!pauses.isStopped()) await attempt(round)
  }

  const attempt = (work: () => Promise<void>) => pauses.attempt(work, error => {
    log.error({ cause: error.message }, 'outbox delivery failed')
  })

  async function round (): Promise<void> {
    const entries = await outbox.next(maxEntries, pass.after)
    if (entries.length === 0) return nextPass()
    const old = entries.filter(entry => isTooOld(entry, config))
    await bury(old.map(entry => ({ entry, reason: 'older than 4.5 days' })))
    const fresh = entries.filter(entry => !old.includes(entry))
    const { arrays, last } = planRound(fresh, pass, quarantine, config)
    // Many who stay behind must not hold up the event loop.
    if (arrays.length === 0) await setImmediate()
    const outcomes = (await Promise.all(arrays.map(deliver))).flat()
    if (state.isAbandoned) return
    // Before anything else is sent the outbox must know what has been.
    while (!await attempt(() => settle(outcomes)) && !pauses.isStopped());
    pass.after = last
    await applyOutcomes(outcomes)
  }

  /** From the beginning again: at once if something was settled, for then others may follow. */
  async function nextPass (): Promise<void> {
    const { madeProgress, decided } = pass
    pass = createPass(madeProgress ? decided : undefined)
    if (!madeProgress) await pauses.idle(POLL_MS)
  }

  async function deliver (entries: Entry[]): Promise<Outcome[]> {
    const deadline = performance.now() + config.DEADLINE_MS
    const items = entries.map(({ event, endpoint }) => ({ event, endpoint, isStrict: false, deadline }))
    const verdicts = await delivery.deliver(items)
    return entries.map((entry, index) => ({ entry, verdict: verdicts[index] as Verdict }))
  }

  async function settle (outcomes: Outcome[]): Promise<void> {
    if (outcomes.length === 0) return
    const delivered = outcomes.filter(({ verdict }) => verdict.code === 'accepted').map(({ entry }) => entry)
    if (delivered.length > 0) await outbox.ack(delivered)
    const letters = outcomes.flatMap(({ entry, verdict }) => {
      const reason = finalReason(entry, verdict)
      return reason === undefined ? [] : [{ entry, reason }]
    })
    await bury(letters)
    log.debug({ delivered: delivered.length, buried: letters.length, ...outbox.counts() }, 'outbox round delivered')
  }

  async function bury (letters: { entry: Entry, reason: string }[]): Promise<void> {
    if (letters.length === 0) return
    await outbox.deadLetter(letters)
    const insertIds = letters.slice(0, 100).map(({ entry }) => entry.event.insertId)
    log.warn({ identities: letters.length, insert_ids: insertIds }, 'identities dead-lettered')
  }

  /** Whom to leave aside, and how long to wait. */
  async function applyOutcomes (outcomes: Outcome[]): Promise<void> {
    const failed: Verdict[] = []
    let settled = 0
    for (const { entry, verdict } of outcomes) {
      const anonKey = entry.event.anonKey
      if (verdict.code === 'accepted' || finalReason(entry, verdict) !== undefined) {
        quarantine.settled(anonKey)
        if (verdict.code === 'accepted' && pass.deferred.delete(anonKey)) pass.decided.add(anonKey)
        settled++
        continue
      }
      pass.deferred.add(anonKey)
      // A suspect waits for itself. Others become suspects: it may be about one of them, or Mixpanel is out of reach.
      if (!isFailure(verdict) || !quarantine.has(anonKey)) failed.push(verdict)
      if (isFailure(verdict)) quarantine.failed(anonKey)
    }
    pass.madeProgress ||= settled > 0
    if (settled > 0 && !failed.some(isLimit)) {
      if (state.failures > 0) {
        log.info(outbox.counts(), 'outbox delivery resumed')
        quarantine.release()
      }
      state.failures = 0
    } else if (failed.length > 0) {
      await wait(failed)
    }
  }

  async function wait (failed: Verdict[]): Promise<void> {
    pass = createPass()
    const retryAfterMs = Math.max(...failed.map(verdict => 'retryAfter' in verdict ? verdict.retryAfter * 1000 : 0))
    if (failed.every(isNotSent)) return pauses.outage(retryAfterMs)
    if (state.failures++ === 0) log.warn({ code: failed[0]?.code, ...outbox.counts() }, 'outbox delivery paused')
    const ms = Math.max(backoffMs(state.failures), retryAfterMs)
    await (delivery.isOpen() ? pauses.outage(ms) : pauses.backoff(ms))
  }

  let running: Promise<void> | undefined

  return {
    /** Begins to deliver. */
    start (): void {
      running = run()
    },
    /** Something was put into the outbox. */
    added: pauses.added,
    /** Mixpanel has taken something. */
    recovered: pauses.recovered,
    /** Resolves when nothing is under way any more, or after two seconds; what is not settled stays in the outbox. */
    async stop (): Promise<void> {
      pauses.stop()
      let timer: NodeJS.Timeout | undefined
      await Promise.race([running, new Promise(resolve => { timer = setTimeout(resolve, LAST_ROUND_MS) })])
      clearTimeout(timer)
      state.isAbandoned = true
    }
  }
}
