export type EventTemplate = ReturnType<typeof createEventTemplate>

/** Returns the text of the events with this name, and these names of the two ids, as functions of their values. */
export function createEventTemplate (event: string, userName: string, anonName: string) {
  /** The text of an event, without its last two braces, around its values. */
  const piecesOf = (encode: (text: string) => string) => ({
    start: encode(`{"event":${JSON.stringify(event)},"properties":{`),
    // `distinct_id` is documented as optional, but without it Mixpanel has been seen to answer "distinct_id, missing or
    // empty".
    beforeUser: encode('"distinct_id":"'),
    beforeUserAgain: encode(`","${userName}":"`),
    beforeAnon: encode(`","${anonName}":"`),
    beforeTime: encode('","time":'),
    beforeInsertId: encode(',"$insert_id":"'),
    end: encode('"')
  })
  const inJson = piecesOf(text => text)
  const percentEncoded = piecesOf(encodeURIComponent)

  function fill (
    pieces: typeof inJson, user: string, anon: string, time: number, insertId: string, own: string
  ): string {
    const { start, beforeUser, beforeUserAgain, beforeAnon, beforeTime, beforeInsertId, end } = pieces
    return `${start}${own}${beforeUser}${user}${beforeUserAgain}${user}${beforeAnon}${anon}${beforeTime}${time}` +
      `${beforeInsertId}${insertId}${end}`
  }

  return {
    /** Returns JSON. `own` has the members of the other properties, in JSON as well, or is empty. */
    json: (user: string, anon: string, time: number, insertId: string, own: string) =>
      `${fill(inJson, textInJson(user), textInJson(anon), time, insertId, own === '' ? '' : `${own},`)}}}`,

    /** Returns the JSON without its last two braces, percent-encoded. Only for ids that stand in JSON as they are. */
    encoded: (user: string, anon: string, time: number, insertId: string) =>
      fill(percentEncoded, encodeId(user), encodeId(anon), time, insertId, ''),

    /** The length in UTF-8 of the JSON without the values. */
    bytes: Buffer.byteLength(Object.values(inJson).join('')) + '}}'.length
  }
}

const textInJson = (text: string) => JSON.stringify(text).slice(1, -1)

/** Returns the same as encodeURIComponent, which takes five times as long for the ids that it leaves as they are. */
const encodeId = (id: string): string => /^[\w.~!*'()-]*$/.test(id) ? id : encodeURIComponent(id)
