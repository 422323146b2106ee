import { isTooLarge, type Verdict } from '../identity/verdict.ts'
import { TEMPORARY } from './answer.ts'

/** An array is split by eight: 3 rounds lead from 50 events to 1, where halves take 7. */
const BISECT_FANOUT = 8

interface Options<Item> {
  /** Sends some events in one request. `isVerbose`: a refusal comes with its reason. */
  send: (items: Item[], isVerbose: boolean) => Promise<Verdict>
  /** True where a refusal comes without a reason unless it is asked for. */
  isTerse: (items: Item[]) => boolean
}

/**
 * Returns a function that sends an array and resolves with a verdict for each of its events, in their order. It finds
 * the failing events of an array that Mixpanel refused as a whole.
 */
export function createBisect<Item> ({ send, isTerse }: Options<Item>): (items: Item[]) => Promise<Verdict[]> {
  async function deliver (items: Item[], isBisecting = false): Promise<Verdict[]> {
    const verdict = await send(items, isBisecting && items.length === 1)
    if (items.length === 1) {
      const hasNoReason = verdict.code === 'refused_by_mixpanel' && verdict.reason === undefined
      return [hasNoReason && !isBisecting && isTerse(items) ? await askReason(items, verdict) : verdict]
    }
    const { records, imported } = verdict.code === 'refused_by_mixpanel' ? verdict : {}
    // The named records alone are refused only if Mixpanel says that it took all the others.
    const named = items.filter((_, index) => records?.has(index)).length
    if (records !== undefined && named === records.size && imported === items.length - named) {
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

  /** A bare `0` may mean anything, even a temporary failure of Mixpanel; with `verbose=1` it says which. */
  async function askReason (items: Item[], refused: Verdict): Promise<Verdict> {
    const verdict = await send(items, true)
    const isAnswer = verdict.code === 'accepted' || verdict.code === 'refused_by_mixpanel' ||
      (verdict.code === 'mixpanel_unreachable' && verdict.cause === TEMPORARY)
    return isAnswer ? verdict : refused
  }

  return items => deliver(items)
}
