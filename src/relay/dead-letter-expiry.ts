import type { Config } from '../config.ts'
import type { Log } from '../log.ts'
import { NO_METRICS, type Metrics } from '../metrics.ts'
import type { Outbox } from '../outbox/outbox.ts'

const DAY_MS = 24 * 3_600_000
const INTERVAL_MS = 3_600_000

/** Drops dead letters that are older than DEAD_LETTER_DAYS, at start and every hour. Without it they are kept. */
export function createDeadLetterExpiry (
  { DEAD_LETTER_DAYS: days }: Config, outbox: Outbox, log: Log, metrics: Metrics = NO_METRICS
) {
  let timer: NodeJS.Timeout | undefined

  async function expire (before: Date): Promise<void> {
    try {
      const dropped = await outbox.expire(before)
      if (dropped === 0) return
      metrics.outbox('expired', 'dead_letter_days', dropped)
      log.warn({ identities: dropped, days }, 'old dead letters dropped')
    } catch (error) {
      log.error({ cause: (error as Error).message }, 'old dead letters not dropped')
    }
  }

  return {
    start (): void {
      if (days === undefined) return
      const run = () => expire(new Date(Date.now() - days * DAY_MS))
      timer = setInterval(run, INTERVAL_MS).unref()
      run()
    },
    stop: () => clearInterval(timer)
  }
}
