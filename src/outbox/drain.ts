import type { Config } from '../config.ts'
import type { Delivery } from '../delivery.ts'
import { claimOf } from '../event.ts'
import type { Verdict } from '../verdict.ts'
import type { Entry, Outbox, StoreLog } from './outbox.ts'
import { choose, finalReason, isTooOld, maxRound } from './round.ts'

type Log = StoreLog & Record<'debug', (what: object, message: string) => void>

/** After a failure a round is an eighth of the one before, down to a lone probe; after a success it grows again. */
const STEP = 8

/** Mixpanel's advice: begin with 2 s, double up to 60 s, and add 1 to 5 s by chance. */
const backoffMs = (failures: number) => Math.min(1000 * 2 ** failures, 60_000) + 1000 + Math.random() * 4000

/** How long one that fails alone, while others are taken, is left aside. */
const ASIDE_MS = 300_000

/** Another relay may have died, or come back with something in hand. */
const IDLE_MS = 1000

/** At the end of the process: how long what is under way may take. It stays in the outbox. */
const LAST_ROUND_MS = 2000

/**
 * Brings to Mixpanel what waits in the outbox, oldest first, in full arrays, until it is delivered, refused or too old.
 * Entries with one claim are never under way together, so the first claim arrives first. Begins at once; the caller
 * must `stop` it before the outbox is closed.
 */
export function createDrain (config: Config, outbox: Outbox, delivery: Delivery, log: Log) {
  const most = maxRound(config)
  let size = most
  /** Claims that are left aside, and until when (ms since the epoch). */
  const aside = new Map<string, number>()
  let failures = 0
  const stopping = new AbortController()
  const isStopped = () => stopping.signal.aborted
  let pause: { kind: 'idle' | 'outage' | 'backoff', end: () => void } | undefined

  async function run (): Promise<void> {
    while (!isStopped()) {
      try {
        await round()
      } catch (error) {
        log.error({ cause: (error as Error).message }, 'the outbox cannot be emptied')
        await rest('backoff', IDLE_MS)
      }
    }
  }

  async function rest (kind: 'idle' | 'outage' | 'backoff', ms: number): Promise<void> {
    if (isStopped()) return
    await new Promise<void>(resolve => {
      const timer = setTimeout(resolve, ms)
      pause = { kind, end: () => { clearTimeout(timer); resolve() } }
    })
    pause = undefined
  }

  async function round (): Promise<void> {
    const entries = await outbox.take(most)
    const old = entries.filter(entry => isTooOld(entry, config))
    if (old.length > 0) await bury(old.map(entry => ({ entry, reason: 'older than 4.5 days' })))
    for (const [claim, until] of aside) if (until < Date.now()) aside.delete(claim)
    const fresh = entries.filter(entry => !old.includes(entry))
    const arrays = choose(fresh, size, aside.keys(), config.MAX_BATCH)
    const chosen = arrays.flat()
    if (chosen.length === 0) return old.length > 0 ? undefined : rest('idle', IDLE_MS)

    const verdicts = (await Promise.all(arrays.map(deliver))).flat()
    if (isStopped()) return
    const accepted = chosen.filter((_, index) => verdicts[index]?.code === 'accepted')
    await untilKept(() => accepted.length > 0 ? outbox.done(accepted) : undefined)
    const letters = chosen.flatMap((entry, index) => {
      const reason = finalReason(entry, verdicts[index] as Verdict)
      return reason === undefined ? [] : [{ entry, reason }]
    })
    await untilKept(() => letters.length > 0 ? bury(letters) : undefined)
    log.debug({ delivered: accepted.length, buried: letters.length, ...outbox.counts() }, 'a round of the outbox')
    await adapt(chosen, accepted.length + letters.length, verdicts)
  }

  function deliver (entries: Entry[]): Promise<Verdict[]> {
    const deadline = Date.now() + config.DEADLINE_MS
    return delivery.deliver(entries.map(({ event, endpoint }) => ({ event, endpoint, isStrict: false, deadline })))
  }

  /** Where Mixpanel has taken them, the outbox must forget them before anything else is sent. */
  async function untilKept (work: () => Promise<void> | undefined): Promise<void> {
    while (!isStopped()) {
      try {
        return await work()
      } catch (error) {
        log.error({ cause: (error as Error).message }, 'the outbox cannot be written')
        await rest('backoff', IDLE_MS)
      }
    }
  }

  async function bury (letters: { entry: Entry, reason: string }[]): Promise<void> {
    await outbox.bury(letters)
    const ids = letters.map(({ entry }) => entry.event.properties.$insert_id)
    log.warn({ identities: letters.length, insert_ids: ids.slice(0, 100) }, 'cannot be delivered: dead letters')
  }

  /** How large the next round is, and when. */
  async function adapt (chosen: Entry[], settled: number, verdicts: Verdict[]): Promise<void> {
    const failed = verdicts.filter((verdict, index) => finalReason(chosen[index] as Entry, verdict) === undefined &&
      verdict.code !== 'accepted')
    if (failed.length === 0) {
      if (failures > 0) log.info({ ...outbox.counts() }, 'the outbox is drained again')
      failures = 0
      size = Math.min(size * STEP, most)
      return
    }
    const seconds = Math.max(...failed.map(verdict => 'retryAfter' in verdict ? verdict.retryAfter : 0))
    if (failed.every(({ code }) => code === 'mixpanel_unavailable')) {
      return rest('outage', seconds * 1000 + Math.random() * 1000)
    }
    // Mixpanel takes others, and this one it does not even refuse.
    const isAlone = chosen.length === 1 && 'again' in (failed[0] as Verdict) && !delivery.isOpen()
    if (isAlone) aside.set(claimOf((chosen[0] as Entry).event), Date.now() + ASIDE_MS)
    if (failures++ === 0) log.warn({ code: failed[0]?.code, ...outbox.counts() }, 'the outbox waits for Mixpanel')
    size = Math.max(1, Math.ceil(chosen.length / STEP))
    await rest(delivery.isOpen() ? 'outage' : 'backoff', Math.max(backoffMs(failures), seconds * 1000))
  }

  const running = run()

  return {
    /** Something was put into the outbox. */
    added: () => { if (pause?.kind === 'idle') pause.end() },
    /** Mixpanel has taken something: an outage is over. */
    recovered: () => { if (pause?.kind === 'outage') pause.end() },
    /** Resolves when nothing is under way any more, or after two seconds; what is not settled stays in the outbox. */
    async stop (): Promise<void> {
      stopping.abort()
      pause?.end()
      let timer: NodeJS.Timeout | undefined
      await Promise.race([running, new Promise(resolve => { timer = setTimeout(resolve, LAST_ROUND_MS) })])
      clearTimeout(timer)
    }
  }
}
