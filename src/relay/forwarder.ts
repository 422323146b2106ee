import { setImmediate } from 'node:timers/promises'
import type { Config } from '../config.ts'
import type { Delivery } from '../mixpanel/delivery.ts'
import { throttled, type Log } from '../log.ts'
import { NO_METRICS, type Metrics } from '../metrics.ts'
import { withoutIds } from '../identity/event.ts'
import { isFailure, isLimit, isNotSent, type Verdict } from '../identity/verdict.ts'
import type { Entry, Outbox } from '../outbox/outbox.ts'
import { backoffMs, createPauses } from './pauses.ts'
import {
  createPass, finalReason, hasNoEffect, isTooLong, isTooOld, maxRound, NO_EFFECT, orderKey, planRound, TOO_OLD,
  type FinalReason
} from './plan.ts'
import { createSuspects } from './suspects.ts'

interface Outcome { entry: Entry, verdict: Verdict }

/** The pause after a pass without progress: meanwhile another relay may store entries, or lose its lease. */
const POLL_MS = 1000

/** The most dead letters of which one log line has the `$insert_id` and the reason. */
const MAX_LOGGED = 100

/** How long `stop` waits for the round in flight. */
const STOP_TIMEOUT_MS = 2000

/**
 * Delivers queued entries, oldest first and in full arrays, until each is accepted, refused or too old. Different users
 * of one anonymous id are not in flight together until one is accepted, so the first one reaches Mixpanel first. The
 * caller must `start` the forwarder, and `stop` it before the outbox is closed.
 */
export function createForwarder (
  config: Config, outbox: Outbox, delivery: Delivery, log: Log, metrics: Metrics = NO_METRICS
) {
  const maxEntries = maxRound(config)
  const pauses = createPauses()
  const suspects = createSuspects()
  const state = { failures: 0, isPaused: false, isClosed: false }
  let pass = createPass()
  /** The deletion of what the last round has settled. The next round does not wait for it; the next pass does. */
  let settling = Promise.resolve()

  async function run (): Promise<void> {
    while (!pauses.isStopped()) await attempt(round)
  }

  const logFailure = throttled(log, 'error', 'outbox delivery failed')
  const attempt = (work: () => Promise<void>) => pauses.attempt(work, ({ message }) => logFailure({ cause: message }))

  async function round (): Promise<void> {
    const entries = await outbox.next(maxEntries, pass.after)
    reportPause()
    if (entries.length === 0 || isTooLong(pass)) return nextPass()
    const expired = entries.filter(entry => isTooOld(entry, config))
    await deadLetter(expired.map(entry => ({ entry, ...TOO_OLD })))
    const inert = entries.filter(entry => !expired.includes(entry) && hasNoEffect(entry, config))
    await deadLetter(inert.map(entry => ({ entry, ...NO_EFFECT })))
    const fresh = entries.filter(entry => !expired.includes(entry) && !inert.includes(entry))
    const { arrays, last = entries.at(-1)?.id } = planRound(fresh, pass, suspects, config)
    // Many rounds of deferred entries must not block the event loop.
    if (arrays.length === 0) await setImmediate()
    const delivered = await Promise.all(arrays.map(deliver))
    await settling
    if (state.isClosed) return
    settling = settleUntilDone(delivered.flat())
    pass.after = last
    await applyOutcomes(delivered)
  }

  function reportPause (): void {
    const { paused, ...counts } = outbox.counts()
    if (paused && !state.isPaused) log.warn(counts, 'outbox delivery paused by an operator')
    if (!paused && state.isPaused) log.info(counts, 'outbox delivery resumed by an operator')
    state.isPaused = paused
  }

  async function settleUntilDone (outcomes: Outcome[]): Promise<void> {
    while (!await attempt(() => settle(outcomes)) && !pauses.isStopped());
  }

  /** Returns to the oldest entry: at once if an entry was settled, because others may now follow it. */
  async function nextPass (): Promise<void> {
    // Otherwise delivered entries would be sent again.
    await settling
    const { madeProgress, hasPaused, decided } = pass
    pass = createPass(madeProgress ? decided : undefined)
    if (!madeProgress && !hasPaused) await pauses.idle(POLL_MS)
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
    if (delivered.length > 0) {
      await outbox.ack(delivered)
      metrics.outbox('delivered', 'accepted', delivered.length)
    }
    const letters = outcomes.flatMap(({ entry, verdict }) => {
      const reason = finalReason(entry, verdict)
      return reason === undefined ? [] : [{ entry, ...reason }]
    })
    await deadLetter(letters)
    const counts = { delivered: delivered.length, dead_lettered: letters.length, ...outbox.counts() }
    log.debug(counts, 'outbox round delivered')
  }

  async function deadLetter (letters: ({ entry: Entry } & FinalReason)[]): Promise<void> {
    if (letters.length === 0) return
    await outbox.deadLetter(letters)
    for (const { label } of letters) metrics.outbox('dead_lettered', label)
    const logged = letters.slice(0, MAX_LOGGED)
    const insertIds = logged.map(({ entry }) => entry.event.insertId).filter(id => id !== '')
    const reasons = new Set(logged.map(({ entry, reason }) => withoutIds(reason, entry.event)))
    log.warn({ identities: letters.length, insert_ids: insertIds, reasons: [...reasons] }, 'identities dead-lettered')
  }

  /** Defers the entries that failed, then resumes or pauses the delivery. */
  async function applyOutcomes (arrays: Outcome[][]): Promise<void> {
    const isSettled = ({ entry, verdict }: Outcome) =>
      verdict.code === 'accepted' || finalReason(entry, verdict) !== undefined
    const settled = arrays.flat().filter(isSettled)
    for (const { entry, verdict } of settled) {
      const anonKey = orderKey(entry)
      suspects.settled(anonKey)
      if (verdict.code === 'accepted' && pass.deferred.delete(anonKey)) pass.decided.add(anonKey)
    }
    const remaining = arrays.map(array => array.filter(outcome => !isSettled(outcome)))
    for (const { entry } of remaining.flat()) pass.deferred.add(orderKey(entry))
    // The failure of a culprit delays that entry alone.
    const failed = remaining.flat().filter(({ entry, verdict }) =>
      !isFailure(verdict) || !suspects.isCulprit(orderKey(entry))).map(({ verdict }) => verdict)
    pass.madeProgress ||= settled.length > 0
    const isResumed = settled.length > 0 && !failed.some(isLimit)
    if (isResumed && state.failures > 0) {
      log.info(outbox.counts(), 'outbox delivery resumed')
      suspects.release()
    }
    if (settled.length > 0) suspects.accepted()
    for (const array of remaining) {
      const keys = array.filter(({ verdict }) => isFailure(verdict)).map(({ entry }) => orderKey(entry))
      if (keys.length > 0) suspects.failed(keys)
    }
    if (isResumed) state.failures = 0
    else if (failed.length > 0) await pauseAfter(failed)
  }

  async function pauseAfter (failed: Verdict[]): Promise<void> {
    pass.hasPaused = true
    const retryAfterMs = Math.max(...failed.map(({ retryAfter = 0 }) => retryAfter * 1000))
    if (failed.every(isNotSent)) return pauses.outage(retryAfterMs)
    if (state.failures++ === 0) log.warn({ code: failed[0]?.code, ...outbox.counts() }, 'outbox delivery paused')
    const ms = Math.max(backoffMs(state.failures), retryAfterMs)
    await (delivery.isOpen() ? pauses.outage(ms) : pauses.backoff(ms))
  }

  let running: Promise<void> | undefined

  return {
    start (): void {
      running = run()
    },
    /** Ends the pause of an idle forwarder; call it when an entry was stored. */
    added: pauses.added,
    /** Ends the pause after a failure; call it when Mixpanel accepted an event. */
    recovered: pauses.recovered,
    /** Resolves when nothing is in flight, or after two seconds. Entries that are not settled stay in the outbox. */
    async stop (): Promise<void> {
      pauses.stop()
      let timer: NodeJS.Timeout | undefined
      const timeout = new Promise(resolve => { timer = setTimeout(resolve, STOP_TIMEOUT_MS) })
      await Promise.race([running?.then(() => settling), timeout])
      clearTimeout(timer)
      state.isClosed = true
    }
  }
}
