import { isTooLarge, type Verdict } from '../identity/verdict.ts'
import { TEMPORARY } from './answer.ts'

/** Eight parts reduce 50 events to 1 in 3 rounds; halves need 7. */
const BISECT_FANOUT = 8

interface Options<Item> {
  /** Sends events in one request. `isVerbose` asks for the reason of a refusal. */
  send: (items: Item[], isVerbose: boolean) => Promise<Verdict>
  /** Returns true if a refusal has a reason only with `isVerbose`. */
  isTerse: (items: Item[]) => boolean
}

/** Returns a function that sends an array, splits it if refused, and resolves with each event's verdict, in order. */
export function createBisect<Item> ({ send, isTerse }: Options<Item>): (items: Item[]) => Promise<Verdict[]> {
  async function deliver (items: Item[], isBisecting = false): Promise<Verdict[]> {
    const verdict = await send(items, isBisecting && items.length === 1)
    if (items.length === 1) {
      const hasNoReason = verdict.code === 'refused_by_mixpanel' && verdict.reason === undefined
      return [hasNoReason && !isBisecting && isTerse(items) ? await askReason(items, verdict) : verdict]
    }
    const { records, imported } = verdict.code === 'refused_by_mixpanel' ? verdict : {}
    // The listed records are the refused ones only if Mixpanel reports all others as imported.
    const listed = items.filter((_, index) => records?.has(index)).length
    if (records !== undefined && listed === records.size && imported === items.length - listed) {
      return items.map((_, index) => records.has(index)
        ? { code: 'refused_by_mixpanel', reason: records.get(index) }
        : { code: 'accepted' })
    }
    // One answer for an array does not name the failing event, so split it. Resending the valid events is harmless: the
    // bytes are identical. A 413 is split as well: Mixpanel documents both 2 MiB and 10 MB.
    if (verdict.code === 'refused_by_mixpanel' || isTooLarge(verdict)) {
      const size = Math.ceil(items.length / BISECT_FANOUT)
      const parts = Array.from({ length: Math.ceil(items.length / size) }, (_, part) =>
        items.slice(part * size, (part + 1) * size))
      return (await Promise.all(parts.map(part => deliver(part, true)))).flat()
    }
    return items.map(() => verdict)
  }

  /** Sends again with `verbose=1`: a bare `0` may mean anything, even a temporary failure of Mixpanel. */
  async function askReason (items: Item[], refused: Verdict): Promise<Verdict> {
    const verdict = await send(items, true)
    const isAnswer = verdict.code === 'accepted' || verdict.code === 'refused_by_mixpanel' ||
      (verdict.code === 'mixpanel_unreachable' && verdict.cause === TEMPORARY)
    return isAnswer ? verdict : refused
  }

  return items => deliver(items)
}
