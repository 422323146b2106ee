import { cut, type MixpanelEvent } from './ledger.ts'

/** What the page shows of an event. A missing text is empty. */
export interface EventView {
  event: string
  /** In ms since the epoch. */
  time: number | null
  user: string
  anon: string
}

/** Returns the view of anything that was sent as an event. It holds no other part of it. */
export function viewOf (sent: MixpanelEvent): EventView {
  const { event, properties } = Object(sent) as MixpanelEvent
  const { time, distinct_id: id, $identified_id: identified, $user_id: user, ...ids } = Object(properties)
  return {
    event: textOf(event),
    time: typeof time === 'number' ? (time > 1e11 ? time : time * 1000) : null,
    user: textOf(id ?? identified ?? user),
    anon: textOf(ids.$anon_id ?? ids.$anon_distinct_id ?? ids.$device_id)
  }
}

const textOf = (value: unknown): string => ['string', 'number'].includes(typeof value) ? cut(String(value)) : ''
