import type { EventTemplate } from './event-template.ts'
import type { PendingEvent } from './pending-event.ts'

/** Returns true if `id` stands in JSON as it is, as nearly all do: printable ASCII without quotes and backslashes. */
export const isPlain = (id: string): boolean => /^[ !#-[\]-~]*$/.test(id)

/**
 * The event of two plain ids, without other properties. It has no text until it is sent, and then only the encoded one:
 * to write JSON and encode that takes longer, and the text takes memory while the event waits.
 */
export class PlainEvent implements PendingEvent {
  readonly bytes: number
  readonly userId: string
  readonly anonKey: string
  readonly insertId: string
  readonly time: number
  readonly #template: EventTemplate
  readonly #anonId: string

  constructor (
    template: EventTemplate, userId: string, anonId: string, anonKey: string, insertId: string, time: number
  ) {
    this.#template = template
    this.#anonId = anonId
    this.userId = userId
    this.anonKey = anonKey
    this.insertId = insertId
    this.time = time
    this.bytes = template.bytes + 2 * userId.length + anonId.length + insertId.length + String(time).length
  }

  get json (): string {
    return this.#template.json(this.userId, this.#anonId, this.time, this.insertId, '')
  }

  get encoded (): string {
    return this.#template.encoded(this.userId, this.#anonId, this.time, this.insertId)
  }
}
