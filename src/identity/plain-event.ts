import type { PendingEvent } from './pending-event.ts'

/** The text of an event, without its last two braces, around the values that it gets. */
interface Pieces {
  start: string
  beforeUser: string
  beforeUserAgain: string
  beforeAnon: string
  beforeTime: string
  beforeInsertId: string
  end: string
}

export type Template = ReturnType<typeof createTemplate>

/** Returns the text of the events with this name, and these names of the two ids, as functions of their values. */
export function createTemplate (event: string, userName: string, anonName: string) {
  const pieces: Pieces = {
    start: `{"event":${JSON.stringify(event)},"properties":{`,
    // `distinct_id` is documented as optional, but without it Mixpanel has been seen to answer "distinct_id, missing or
    // empty".
    beforeUser: '"distinct_id":"',
    beforeUserAgain: `","${userName}":"`,
    beforeAnon: `","${anonName}":"`,
    beforeTime: '","time":',
    beforeInsertId: ',"$insert_id":"',
    end: '"'
  }
  const encodedPieces = Object.fromEntries(
    Object.entries(pieces).map(([name, piece]) => [name, encodeURIComponent(piece)])) as unknown as Pieces
  const textInJson = (text: string) => JSON.stringify(text).slice(1, -1)

  return {
    /** Returns JSON. `own` has the members of the other properties, in JSON as well, or is empty. */
    json: (user: string, anon: string, time: number, insertId: string, own: string) =>
      `${fill(pieces, textInJson(user), textInJson(anon), time, insertId, own === '' ? '' : `${own},`)}}}`,

    /** Returns the JSON of plain ids without its last two braces, percent-encoded. */
    encoded: (user: string, anon: string, time: number, insertId: string) =>
      fill(encodedPieces, encodeId(user), encodeId(anon), time, insertId, ''),

    /** The length in UTF-8 of the JSON without the values. */
    bytes: Buffer.byteLength(Object.values(pieces).join('')) + '}}'.length
  }
}

function fill (pieces: Pieces, user: string, anon: string, time: number, insertId: string, own: string): string {
  const { start, beforeUser, beforeUserAgain, beforeAnon, beforeTime, beforeInsertId, end } = pieces
  return `${start}${own}${beforeUser}${user}${beforeUserAgain}${user}${beforeAnon}${anon}${beforeTime}${time}` +
    `${beforeInsertId}${insertId}${end}`
}

/** Returns true if `id` stands in JSON as it is, as nearly all do: printable ASCII without quotes and backslashes. */
export const isPlain = (id: string): boolean => /^[ !#-[\]-~]*$/.test(id)

/** Returns the same as encodeURIComponent, which takes five times as long for the ids that it leaves as they are. */
const encodeId = (id: string): string => /^[\w.~!*'()-]*$/.test(id) ? id : encodeURIComponent(id)

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
  readonly #template: Template
  readonly #anonId: string

  constructor (template: Template, userId: string, anonId: string, anonKey: string, insertId: string, time: number) {
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
