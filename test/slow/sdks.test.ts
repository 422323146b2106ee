import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { startSandbox, temporary, type Env } from '../helper.ts'
import { startServer } from '../processes.ts'

/** How long Mixpanel is away. */
const OUTAGE_MS = Number(process.env.OUTAGE_SECONDS ?? 60) * 1000
const BROWSERS = 50
const EVENTS = 10_000

interface Event { event: string, properties: Record<string, unknown> & { $insert_id: string } }

/** A batch as one browser sent it: how often, and whether it was answered with 1. */
interface Batch { events: Event[], sends: number, isTaken: boolean }

/**
 * A browser with the JavaScript SDK: a queue that is sent in arrays, again after 5xx. It keeps what meets a refused
 * connection, which the SDK would drop. Every tenth browser shares its device with the next one, for another user.
 */
function createBrowser (index: number, url: () => string, batches: Batch[]) {
  const device = `$device:${randomUUID()}`
  const make = (event: string, properties: object): Event =>
    ({ event, properties: { token: 'dummy', distinct_id: device, ...properties, time: Date.now() / 1000, $insert_id: randomUUID().slice(0, 16) } })

  async function send (events: Event[]): Promise<void> {
    const batch: Batch = { events, sends: 0, isTaken: false }
    batches.push(batch)
    while (!batch.isTaken) {
      batch.sends++
      const data = Buffer.from(JSON.stringify(events)).toString('base64')
      const body = new URLSearchParams({ data })
      const answer = await fetch(`${url()}/track/?verbose=1&ip=1`, { method: 'POST', body }).catch(() => undefined)
      batch.isTaken = answer?.status === 200 && (await answer.json() as { status: number }).status === 1
      if (!batch.isTaken) await sleep(500)
    }
  }

  return async (claims: string[]): Promise<void> => {
    const perBatch = 20
    const count = EVENTS / BROWSERS / perBatch
    for (let batch = 0; batch < count; batch++) {
      const events = Array.from({ length: perBatch }, (_, at) => batch === 1 && at === 0
        ? make('$identify', { distinct_id: `user-${index}`, $user_id: `user-${index}`, $anon_distinct_id: claims[0] ?? device })
        : make('Click', { index, batch, at, text: 'a+b \u{1F600}' }))
      if (batch === 1) claims.push(device)
      await send(events)
      await sleep(OUTAGE_MS / count)
    }
  }
}

t.test(`${EVENTS} events of ${BROWSERS} browsers survive an outage and a kill: none is lost, and only what an SDK repeats arrives twice`, async t => {
  const sandbox = await startSandbox(t)
  const env: Env = { COMPAT: 'events', OUTBOX: `file:${temporary(t)}/outbox`, DEADLINE_MS: '2000', MIXPANEL_TIMEOUT_MS: '1000' }
  let relay = await startServer(t, sandbox.url, env)
  const batches: Batch[] = []
  const browsers = Array.from({ length: BROWSERS }, (_, index) => createBrowser(index, () => relay.url, batches))
  // Two browsers in a row claim one device: the second one begins when the first has its answer.
  const pairs = Array.from({ length: BROWSERS / 2 }, (_, pair) => [browsers[2 * pair]!, browsers[2 * pair + 1]!] as const)
  const running = Promise.all(pairs.map(async ([one, other], pair) => {
    const claims: string[] = []
    const second = async () => {
      if (pair % 5 !== 0) return other([])
      while (claims.length === 0) await sleep(20)
      // The claim of the first browser has its answer by then.
      await sleep(OUTAGE_MS / 10 + 1000)
      return other(claims)
    }
    await Promise.all([one(claims), second()])
  }))
  await sleep(OUTAGE_MS / 20)
  sandbox.faults.add({ name: 'edge_down', times: 1_000_000 })
  await sleep(OUTAGE_MS / 2)
  await relay.kill('SIGKILL')
  relay = await startServer(t, sandbox.url, env)
  await sleep(OUTAGE_MS / 2)
  sandbox.faults.clear()
  await running
  await relay.emptied()
  t.equal(await relay.kill('SIGTERM'), 0)

  const rows = sandbox.ledger.rows()
  const found: string[] = []
  const arrived = new Map<string, string[]>()
  for (const { event, properties } of rows) {
    const id = String(properties.$insert_id)
    const { ip, ...rest } = properties
    if (ip !== '127.0.0.1') found.push(`${id} has the address ${String(ip)}`)
    arrived.set(id, [...arrived.get(id) ?? [], JSON.stringify([event, rest])])
  }
  let repeats = 0
  for (const { events, sends, isTaken } of batches) {
    if (!isTaken) found.push('a batch was never taken')
    for (const { event, properties: { token, ...properties } } of events) {
      const forms = arrived.get(properties.$insert_id) ?? []
      if (forms.length === 0) found.push(`${properties.$insert_id} is lost`)
      if (forms.some(form => form !== JSON.stringify([event, properties]))) found.push(`${properties.$insert_id} has changed: ${forms[0]}`)
      repeats += Math.max(0, forms.length - sends)
    }
  }
  t.same(found.slice(0, 10), [])
  t.equal(arrived.size, EVENTS)
  // What was on its way to Mixpanel, or delivered and not yet acknowledged, when the relay was killed.
  t.ok(repeats <= 400 + BROWSERS * 20, `${repeats} events more than the browsers have sent`)
  const merged = rows.filter(({ event, outcome }) => event === '$identify' && outcome === 'merged').map(({ properties }) => Number(String(properties.distinct_id).slice(5)))
  t.equal(merged.filter(index => index % 2 === 0).length, BROWSERS / 2, 'the first claim on each device has won')
  t.comment(`${rows.length} rows for ${EVENTS} events, ${batches.reduce((sum, { sends }) => sum + sends, 0)} requests of ${batches.length} batches`)
})
