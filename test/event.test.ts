import { hash } from 'node:crypto'
import fc from 'fast-check'
import { t } from 'tap'
import { createToEvent, storedEvent } from '#src/identity/event.js'
import { createCredentials } from '#src/mixpanel/credentials.js'
import { encodeRequest } from '#src/mixpanel/encode.js'
import { readConfig } from '#src/config.js'

const readNothing = () => ''
const NOW = Date.UTC(2026, 10, 28, 1, 2, 3, 4)

const printable = fc.string({ unit: 'grapheme-ascii', minLength: 1, maxLength: 60 })
const anyText = fc.string({ unit: 'grapheme', minLength: 1, maxLength: 60 })
const uuid = fc.uuid({ version: 4 })
const id = fc.oneof(uuid, uuid.map(text => `$device:${text}`), printable, printable.map(text => `${text}@example.com`), anyText)
const properties = fc.option(fc.dictionary(anyText, fc.oneof(anyText, fc.integer())), { nil: undefined })

/** The event as the documentation of Mixpanel has it. */
function expected (mode: string, name: string, user: string, anon: string, own: object | undefined, token: string) {
  const device = mode === 'original' ? anon : anon.replace(/^\$device:/, '')
  const others = own === undefined || Object.keys(own).length === 0 ? '' : `\n${JSON.stringify(own)}`
  const ids = mode === 'original' ? { $identified_id: user, $anon_id: device } : { $user_id: user, $device_id: device }
  const insertId = hash('sha256', `${device}\n${user}${others}`).slice(0, 32)
  return { event: name, properties: { ...own, distinct_id: user, ...ids, time: Math.floor(NOW / 1000), $insert_id: insertId, token } }
}

t.test('an event is the JSON of its properties, percent-encoded, whatever characters its ids have', async t => {
  for (const [mode, name] of [['original', '$identify'], ['simplified', 'Ünited "all" users']] as const) {
    const token = 'a"token\\&%'
    const config = readConfig({ MIXPANEL_TOKEN: token, MIXPANEL_ID_MERGE: mode, ...mode === 'simplified' && { MERGE_EVENT: name } }, readNothing)
    const toEvent = createToEvent(config)
    const credentials = createCredentials(config)
    const bodyOf = (...events: Parameters<typeof encodeRequest>[0]) => String(encodeRequest(events, {}, credentials, config).body)
    fc.assert(fc.property(id, id, properties, (user, anon, own) => {
      const event = toEvent({ identified_id: user, anon_id: anon, ...own && { properties: own } }, NOW)
      const json = JSON.stringify(expected(mode, name, user, anon, own, token))
      t.equal(bodyOf(event), `data=${encodeURIComponent(json)}`)
      t.equal(bodyOf(event, event), `data=${encodeURIComponent(`[${json},${json}]`)}`)
      t.equal(String(encodeRequest([event], { endpoint: 'import' }, credentials, config).body), `[${json}]`)
      t.equal(event.bytes, Buffer.byteLength(event.json))
      const again = storedEvent(event.json)
      t.match(again, { userId: user, anonKey: event.anonKey, insertId: event.insertId, time: event.time, bytes: event.bytes })
      t.equal(again && bodyOf(again), bodyOf(event), 'from the outbox it has the same bytes')
    }), { numRuns: 300 })
  }
})
