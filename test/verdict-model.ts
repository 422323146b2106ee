// Random sequences of attempts against a plain model: what Mixpanel took, and what each verdict says.
import { readConfig } from '#src/config.js'
import { identifyEvent, type PendingEvent } from '#src/identity/event.js'
import type { Verdict } from '#src/identity/verdict.js'
import { interpretBody, interpretError, interpretStatus, type Answer } from '#src/mixpanel/answer.js'
import type { Mixpanel } from '#src/mixpanel/client.js'
import { createDelivery } from '#src/mixpanel/delivery.js'
import { identity, silent } from './helper.ts'

/** The codes that tell a caller that Mixpanel does not have the event. */
const NOT_TAKEN = new Set(['refused_by_mixpanel', 'mixpanel_rate_limited', 'mixpanel_unavailable', 'mixpanel_rejected_credentials', 'overloaded'])

export type Random = () => number

/** A reproducible generator of numbers from 0 to 1 (mulberry32). */
export function createRandom (seed: number): Random {
  let state = seed
  return () => {
    state = (state + 0x6D2B79F5) | 0
    let value = Math.imul(state ^ (state >>> 15), 1 | state)
    value = (value + Math.imul(value ^ (value >>> 7), 61 | value)) ^ value
    return ((value ^ (value >>> 14)) >>> 0) / 4294967296
  }
}

export const pick = <Item>(random: Random, items: readonly Item[]): Item => items[Math.floor(random() * items.length)] as Item

const OPTIONS = [
  'one', 'one', 'one', 'reset_before', 'reset_after', 'refused_connection', 'timeout', '503', '502', '408', '429', '401', '403', '302', '404', '413',
  'temporary', 'strict_all', 'strict_some', 'strict_short', 'strict_error', 'zero', 'zero', 'html', 'null', 'empty', '400'
] as const

interface Trace { taken: boolean, isUncertain: boolean, requests: number }

/** Answers one request of a hostile Mixpanel, and notes in `traces` what it took. */
function answerTo (events: PendingEvent[], isVerbose: boolean, bad: Set<string>, traces: Map<string, Trace>, random: Random): Answer {
  const traceOf = ({ insertId }: PendingEvent) => traces.get(insertId) as Trace
  const take = (some: PendingEvent[]) => { for (const event of some) if (!bad.has(event.insertId)) traceOf(event).taken = true }
  const doubt = () => { for (const event of events) traceOf(event).isUncertain = true }
  for (const event of events) traceOf(event).requests++
  const good = events.filter(({ insertId }) => !bad.has(insertId))
  const refused = events.filter(({ insertId }) => bad.has(insertId))
  const option = pick(random, OPTIONS)
  /** Mixpanel reads the request: it refuses an invalid event, and may take the valid ones of the same array. */
  function read (): Answer {
    if (refused.length === 0) {
      take(events)
      return interpretBody(200, '1')
    }
    if (events.length > 1) doubt()
    if (events.length > 1 && random() < 0.5) take(good)
    return interpretBody(200, isVerbose ? '{"error":"invalid","status":0}' : '0')
  }
  switch (option) {
    case 'one': return read()
    case 'reset_before': doubt(); return interpretError(Object.assign(new Error('x'), { code: 'ECONNRESET' }))
    case 'reset_after': take(good); doubt(); return interpretError(Object.assign(new Error('x'), { code: 'UND_ERR_SOCKET' }))
    case 'refused_connection': return interpretError(Object.assign(new Error('x'), { code: 'ECONNREFUSED' }))
    case 'timeout': if (random() < 0.5) take(good); doubt(); return interpretError(Object.assign(new Error('x'), { code: 'UND_ERR_HEADERS_TIMEOUT' }))
    case '503': case '502': case '408': if (random() < 0.5) take(good); doubt(); return interpretStatus(Number(option)) as Answer
    case '302': case '404': case '413': doubt(); return interpretStatus(Number(option)) as Answer
    case '429': case '401': case '403': return interpretStatus(Number(option)) as Answer
    case 'temporary': return interpretBody(200, '{"error":"a temporary failure occurred","status":0}')
    case 'strict_all': take(good); return refused.length === 0
      ? interpretBody(200, JSON.stringify({ code: 200, num_records_imported: events.length, status: 'OK' }))
      : interpretBody(400, JSON.stringify({
        code: 400,
        error: 'some failed',
        num_records_imported: good.length,
        failed_records: refused.map(event => ({ index: events.indexOf(event), message: 'invalid' }))
      }))
    case 'strict_some': {
      if (events.length === 1 && refused.length === 0) return read()
      if (events.length > 1) doubt()
      const some = events.length > 1 ? good.filter(() => random() < 0.5) : []
      take(some)
      return interpretBody(400, JSON.stringify({ code: 400, error: 'some failed', num_records_imported: some.length, failed_records: ['?'] }))
    }
    case 'strict_short': {
      doubt()
      const some = good.slice(1)
      take(some)
      return interpretBody(200, JSON.stringify({ code: 200, num_records_imported: some.length }))
    }
    // Mixpanel refuses a lone event always or never.
    case 'strict_error': case '400': case 'zero':
      if (events.length === 1 && refused.length === 0) return read()
      if (events.length > 1) { doubt(); take(good.filter(() => random() < 0.5)) }
      return option === 'zero' ? interpretBody(200, '0') : option === '400' ? interpretBody(400, '<html>') : interpretBody(200, '{"code":200,"error":["bad"]}')
    default: if (random() < 0.5) take(good); doubt(); return interpretBody(200, { html: '<html>', null: 'null', empty: '' }[option])
  }
}

/** Returns a sentence for each verdict of one random sequence that says more, or less, than is known. */
export async function checkSequence (seed: number): Promise<string[]> {
  const random = createRandom(seed)
  const config = readConfig({ MIXPANEL_TOKEN: 'x', MIXPANEL_ENDPOINT: pick(random, ['track', 'import']) }, () => '')
  const traces = new Map<string, Trace>()
  const bad = new Set<string>()
  const mixpanel = {
    encode: (events: PendingEvent[], { verbose }: { verbose: boolean }) => ({ events, verbose }),
    send: async ({ events, verbose }: { events: PendingEvent[], verbose: boolean }) => answerTo(events, verbose, bad, traces, random)
  } as unknown as Mixpanel
  const { deliver } = createDelivery(config, mixpanel, silent)
  const events = Array.from({ length: pick(random, [1, 1, 2, 3, 9, 20]) }, () => identifyEvent(identity(), Date.now()))
  for (const event of events) {
    traces.set(event.insertId, { taken: false, isUncertain: false, requests: 0 })
    if (random() < 0.1) bad.add(event.insertId)
  }
  const items = events.map(event => ({ event, isStrict: false, deadline: performance.now() + 10_000 }))
  const verdicts = await deliver(items)
  return events.flatMap((event, index) => faultsOf(verdicts[index] as Verdict, traces.get(event.insertId) as Trace, bad.has(event.insertId)))
    .map(fault => `seed ${seed}: ${fault}`)
}

function faultsOf ({ code, taken, sent }: Verdict, trace: Trace, isBad: boolean): string[] {
  const faults: string[] = []
  if (code === 'accepted' && !trace.taken && !isBad) faults.push('accepted, and Mixpanel does not have it')
  if (code === 'accepted' && isBad) faults.push('accepted, and Mixpanel refuses it')
  if (NOT_TAKEN.has(code) && trace.taken) faults.push(`${code}, and Mixpanel has it`)
  if (taken === 'no' && trace.taken) faults.push(`${code} says not taken, and Mixpanel has it`)
  if ((taken === 'yes') !== (code === 'accepted')) faults.push(`${code} says taken: ${taken}`)
  if (taken === 'unknown' && NOT_TAKEN.has(code)) faults.push(`${code} for an unknown outcome`)
  if (taken === 'unknown' && !trace.isUncertain) faults.push(`${code} says unknown, and every answer was certain`)
  if (sent !== undefined && sent.attempts !== trace.requests) faults.push(`${sent.attempts} attempts for ${trace.requests} requests`)
  return faults
}
