import { randomUUID } from 'node:crypto'
import { t } from 'tap'
import { isJunkId } from '#src/identity/ids.js'
import { identity, startRelay } from './helper.ts'

const UUID = 'fa30a0d4-f4b3-41bf-a1b9-7dffce521a8c'

t.test('an identified_id that names nobody is refused, and nothing is sent', async t => {
  const { post, sandbox } = await startRelay(t)
  const placeholders = [
    'null', 'NULL', 'undefined', 'NaN', 'anonymous', 'none', 'nil', 'n/a', 'na', 'unknown', '<nil>', 'true', 'false', '[]', '{}', '-1', '0', '0000', '0x0', '0X00',
    '00000000-0000-0000-0000-000000000000', '"null"', "'undefined'", '(null)', '(NaN)', '""', "''", '()', '"0"', '[object Object]', '[object Promise]',
    '[object Undefined]', '"[object Object]"', '0'.repeat(40), '"             null"', '(undefined             )'
  ]
  for (const placeholder of placeholders) t.equal(isJunkId(placeholder), true, placeholder)
  const invisible = ['\u200B', 'user-42\u200B', '\u202A+15551234567\u202C', 'null\u200B', '\uFEFFuser', 'user\u00AD', '\u2060x', 'x\u2800', '\u180Ex', ' x', 'x\u00A0']
  const devices = [['$device:' + UUID, UUID], [UUID, `$device:${UUID}`], [UUID.toUpperCase(), UUID], [UUID, UUID.toUpperCase()], [`$DEVICE:${UUID}`, UUID]]
  const long = ['x'.repeat(256), '\u{1F354}'.repeat(64), 'é'.repeat(128)]
  const rows = [
    ...[...placeholders, ...invisible, ...long].map(id => [id, randomUUID()]), ...devices
  ] as [string, string][]
  for (const [identified, anon] of rows) {
    const answer = await post({ identified_id: identified, anon_id: anon })
    t.equal(answer.statusCode, 400, JSON.stringify(identified))
    t.ok(answer.json().errors.some(({ pointer }: { pointer: string }) => pointer === '/identified_id'), JSON.stringify(identified))
  }
  t.equal(sandbox.requests.length, 0)
})

t.test('an identified_id that resembles a placeholder is an id', async t => {
  const { post } = await startRelay(t)
  const ids = [
    '007', '42', 'nancy', 'nullable', '0a', '1e0', 'user-0', '(null', '"x"', 'a\u200Bb', 'null island', '\u{1F354}'.repeat(63) + 'abc', 'é'.repeat(127) + 'x', '--', '0x'
  ]
  for (const id of ids) t.equal((await post(identity({ identified_id: id }))).statusCode, 200, JSON.stringify(id))
})

t.test('an anon_id of zeros is refused', async t => {
  const { post } = await startRelay(t)
  for (const anon of ['00000000-0000-4000-8000-000000000000', '$device:00000000-0000-4000-a000-000000000000', '00000000-0000-0000-0000-000000000000']) {
    t.match((await post(identity({ anon_id: anon }))).json(), { status: 400, errors: [{ pointer: '/anon_id' }] }, anon)
  }
})

t.test('names of properties have at most 255 bytes', async t => {
  const { post } = await startRelay(t)
  for (const [name, status] of [['x'.repeat(255), 200], ['x'.repeat(256), 400], ['é'.repeat(127), 200], ['é'.repeat(128), 400]] as const) {
    t.equal((await post(identity({ properties: { [name]: 1 } }))).statusCode, status)
    t.equal((await post(identity({ properties: { nested: { [name]: 1 } } }))).statusCode, status)
  }
  for (const name of ['$preshuffle_distinct_id', '$had_persisted_distinct_id']) t.equal((await post(identity({ properties: { [name]: 1 } }))).statusCode, 400)
})

t.test('$insert_id depends on the ids and on the properties, and on nothing else', async t => {
  const { post, sandbox } = await startRelay(t)
  const one = identity()
  for (const body of [one, one, { ...one, properties: {} }, { ...one, properties: { plan: 'pro' } }, { ...one, properties: { plan: 'free' } }, { ...one, properties: { plan: 'pro' } }]) {
    t.equal((await post(body)).statusCode, 200)
  }
  const ids = sandbox.ledger.rows().map(({ properties }) => properties.$insert_id)
  t.equal(new Set(ids).size, 3)
  t.same([ids[1], ids[2], ids[5]], [ids[0], ids[0], ids[3]])
})
