import { isTooLarge, type Verdict } from '../identity/verdict.ts'
import { isPartial, settle, TEMPORARY, type Answer } from './answer.ts'

/** Eight parts need 3 sends in a row to get from 50 events to 1, the first included; halves need 7. */
const BISECT_FANOUT = 8

/** The last answer to a request, and the answer of an attempt before it after which Mixpanel may have its events. */
export interface SendResult { answer: Answer, lost?: Answer }

interface Options<Item> {
  /** Sends events in one request. `isVerbose` asks for the reason of a refusal. */
  send: (items: Item[], isVerbose: boolean) => Promise<SendResult>
  /** Returns true if a refusal has a reason only with `isVerbose`. */
  isTerse: (items: Item[]) => boolean
}

/** Returns a function that sends an array, splits it if refused, and resolves with each event's verdict, in order. */
export function createBisect<Item> ({ send, isTerse }: Options<Item>): (items: Item[]) => Promise<Verdict[]> {
  /** `doubt`: an earlier answer after which Mixpanel may have these events. */
  async function deliver (items: Item[], isPart: boolean, doubt?: Answer): Promise<Verdict[]> {
    const { answer, lost } = await send(items, isPart && items.length === 1)
    const known = stronger(lost, doubt)
    if (items.length === 1) return [await deliverAlone(items, imported(answer), isPart, known)]
    const { code, records, imported: count, isForAll = false } = answer
    if (isForAll) return items.map(() => settle(answer, known))
    // The list is complete only if Mixpanel reports all other events as imported.
    if (code === 'refused_by_mixpanel' && records !== undefined) {
      const listed = items.filter((_, index) => records.has(index)).length
      if (listed === records.size && count === items.length - listed) {
        return items.map((_, index) => {
          const reason = records.get(index)
          return settle(reason === undefined ? ACCEPTED : { ...REFUSED, reason }, known)
        })
      }
    }
    // One answer for an array does not name the failing event, so split it. Resending the valid events is harmless: the
    // bytes are identical. A 413 is split as well: Mixpanel documents both 2 MiB and 10 MB.
    const mayHaveTaken = code === 'refused_by_mixpanel' || isPartial(answer, items.length)
    if (mayHaveTaken || isTooLarge(answer)) {
      const partDoubt = mayHaveTaken ? stronger(known, REFUSED) : known
      return (await Promise.all(split(items).map(part => deliver(part, true, partDoubt)))).flat()
    }
    const verdict = settle(answer, known)
    return items.map(() => verdict)
  }

  /** Sends a bare `0` again with `verbose=1`: it may mean anything, even a temporary failure of Mixpanel. */
  async function deliverAlone (items: Item[], answer: Answer, isPart: boolean, doubt?: Answer): Promise<Verdict> {
    const hasNoReason = answer.code === 'refused_by_mixpanel' && answer.reason === undefined
    if (!hasNoReason || isPart || !isTerse(items)) return settle(answer, doubt)
    const second = await send(items, true)
    const { taken, code, cause } = second.answer
    const isInformative = taken !== 'no' || code === 'refused_by_mixpanel' || cause === TEMPORARY
    return settle(isInformative ? imported(second.answer) : answer, stronger(second.lost, doubt))
  }

  return items => deliver(items, false)
}

const ACCEPTED: Answer = { code: 'accepted', taken: 'yes' }
const REFUSED: Answer = { code: 'refused_by_mixpanel', taken: 'no' }
const NOT_IMPORTED: Answer = { code: 'mixpanel_misanswered', taken: 'unknown', cause: 'another number imported' }

/** Returns the answer to a lone event, unless it is a success of no event. */
const imported = (answer: Answer) => isPartial(answer, 1) ? NOT_IMPORTED : answer

/** Returns the doubt that is harder to settle: a lost answer rather than the refusal of an array. */
function stronger (one: Answer | undefined, other: Answer | undefined): Answer | undefined {
  return one === undefined || (one.code === 'refused_by_mixpanel' && other !== undefined) ? other : one
}

function split<Item> (items: Item[]): Item[][] {
  const size = Math.ceil(items.length / BISECT_FANOUT)
  const count = Math.ceil(items.length / size)
  return Array.from({ length: count }, (_, part) => items.slice(part * size, (part + 1) * size))
}
