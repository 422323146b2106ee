import fc from 'fast-check'
import type { Test } from 'tap'
import { finalStatuses, mustSend, pairsOf, rawCase, send, type RawCase } from './fuzz-bytes.ts'
import { judge, pairOf, requestCase, type Case } from './fuzz-bodies.ts'
import { CLOSED, KEYS, secretsIn } from './fuzz-callers.ts'
import { identity, listen, startRelay, type Relay } from './helper.ts'
import { readRequests } from './http-reader.ts'
import { exchange, post } from './raw-http.ts'
import { failedRecords } from '#src/sandbox/records.js'

/** Cases that run at the same time. */
const CHUNK = 64

const ENV = { ...CLOSED, LOG_LEVEL: 'info', MIXPANEL_TIMEOUT_MS: '10000' }

/**
 * Checks so many cases in chunks. `check` returns the faults of a chunk. If there are any, fast-check looks for the
 * smallest case that fails alone: in this chunk, and in the last one, whose requests may have outlived it. FUZZ_SEED
 * repeats a chunk.
 */
async function fuzz<T> (t: Test, arbitrary: fc.Arbitrary<T>, count: number, check: (cases: T[]) => Promise<string[]>): Promise<void> {
  const first = Number(process.env.FUZZ_SEED ?? Date.now() % 2 ** 31)
  t.comment(`FUZZ_SEED=${first}`)
  for (let done = 0; done < count; done += CHUNK) {
    const seed = first + done / CHUNK
    const faults = await check(fc.sample(arbitrary, { seed, numRuns: Math.min(CHUNK, count - done) }))
    if (faults.length === 0) continue
    t.comment(`FUZZ_SEED=${seed}: ${faults.join('\n')}`)
    for (const one of [seed, seed - 1]) {
      await fc.assert(fc.asyncProperty(arbitrary, async one => {
        const faults = await check([one])
        if (faults.length > 0) throw new Error(faults.join('\n'))
      }), { seed: one, numRuns: CHUNK })
    }
    throw new Error(`only cases that run at the same time fail: ${faults.join('\n')}`)
  }
}

/** Counts what a relay answers and sends. */
function createTally ({ sandbox, lines, relay }: Relay) {
  const statuses: Record<number, number> = {}
  const allowed = createMultiset()
  let [identities, requests] = [0, 0]
  return {
    statuses,
    add: (status: number) => { statuses[status] = (statuses[status] ?? 0) + 1 },
    text: () => `${JSON.stringify(statuses)}, ${identities} identities in ${requests} requests at Mixpanel`,

    /** Compares what Mixpanel got since the last call with what it may and must get, and forgets it. */
    async faultsAtMixpanel (may: string[], must: string[]): Promise<string[]> {
      do await new Promise(resolve => setImmediate(resolve)); while (relay.state().in_flight > 0)
      // The request of a caller that has disconnected may arrive with a later chunk.
      for (const pair of may) allowed.add(pair)
      const events = sandbox.requests.splice(0).flatMap(({ body }) => {
        requests++
        return [JSON.parse(new URLSearchParams(body).get('data') ?? '')].flat()
      })
      identities += events.length
      const sent = events.map(({ properties }) => pairOf(properties.$identified_id, properties.$anon_id))
      const received = createMultiset(sent)
      const outcomes = sandbox.ledger.rows().map(({ outcome }) => outcome)
      const isIdentity = (outcome: string) => ['merged', 'repeat', 'errAnonDistinctIdAssignedAlready', 'errManyIDs'].includes(outcome)
      const text = lines.splice(0).join('')
      sandbox.ledger.clear()
      return [
        ...sent.filter(pair => !allowed.take(pair)).map(pair => `at Mixpanel without permission: ${pair}`),
        ...must.filter(pair => !received.take(pair)).map(pair => `accepted, and not at Mixpanel: ${pair}`),
        ...events.filter(({ properties }) => properties.distinct_id !== properties.$identified_id).map(event => `two users at Mixpanel: ${JSON.stringify(event)}`),
        ...failedRecords(events, Math.floor(Date.now() / 1000)).map(record => `refused by strict validation: ${JSON.stringify(record)}`),
        ...outcomes.filter(outcome => !isIdentity(outcome)).map(outcome => `malformed at Mixpanel: ${outcome}`),
        ...secretsIn(text).map(secret => `in the log: ${secret}`)
      ]
    }
  }
}

/** Returns a set that may have a member several times. */
function createMultiset (list: string[] = []) {
  const counts = new Map<string, number>()
  const add = (one: string) => { counts.set(one, (counts.get(one) ?? 0) + 1) }
  list.forEach(add)
  return {
    add,
    /** Takes one out, and returns false if there is none. */
    take (one: string): boolean {
      const count = counts.get(one) ?? 0
      if (count > 0) counts.set(one, count - 1)
      return count > 0
    }
  }
}

/** Sends so many requests of all sorts of callers, and compares each response, and all that Mixpanel gets, with a model. */
export async function fuzzBodies (t: Test, count: number): Promise<void> {
  const relay = await startRelay(t, { env: ENV })
  const tally = createTally(relay)

  await fuzz(t, requestCase, count, async (cases: Case[]) => {
    const judged = await Promise.all(cases.map(async one => {
      const { path, query, headers, payload } = one
      const answer = await relay.inject({ method: 'POST', url: path + query, headers, payload })
      tally.add(answer.statusCode)
      const { faults, pairs } = judge(one, answer)
      const all = [...faults, ...secretsIn(JSON.stringify(answer.headers) + answer.payload).map(secret => `in the answer: ${secret}`)]
      return { pairs, faults: all.map(fault => `${fault}: ${path}${query} ${JSON.stringify(headers)} ${payload}`) }
    }))
    const pairs = judged.flatMap(({ pairs }) => pairs)
    return [...judged.flatMap(({ faults }) => faults), ...await tally.faultsAtMixpanel(pairs, pairs)]
  })

  t.comment(`${count} cases: ${tally.text()}`)
  const atLeast = { 200: 0.06, 207: 0.01, 400: 0.1, 401: 0.15, 403: 0.1, 404: 0.01, 415: 0.03 }
  for (const [status, share] of Object.entries(atLeast)) {
    const times = tally.statuses[Number(status)] ?? 0
    t.ok(times > share * count, `at least ${share * count} cases are ${status}, and ${times} were`)
  }
  t.same(await tally.faultsAtMixpanel([], []), [], 'nothing else reaches Mixpanel')
}

/**
 * Sends so many mutated requests through sockets. Of each connection a second reader of HTTP, which refuses what two
 * servers could read differently, names the identities that Mixpanel may get.
 */
export async function fuzzBytes (t: Test, count: number): Promise<void> {
  const relay = await listen(t, { env: ENV })
  const tally = createTally(relay)
  let [answered, late] = [0, 0]

  await fuzz(t, rawCase, count, async (cases: RawCase[]) => {
    const judged = await Promise.all(cases.map(async one => {
      const reading = readRequests(one.text)
      const { requests, isBegun } = reading
      const { received, isLate } = await send(relay.port, one)
      const statuses = finalStatuses(received)
      if (statuses.length > 0) answered++
      if (isLate) late++
      for (const status of statuses) tally.add(status)
      const faults = [
        ...statuses.filter(status => status >= 500).map(status => `${status}`),
        // A request that is refused before its body arrives may get a second answer, when the body is malformed or ends early.
        ...statuses.length > requests.length + 2 || statuses.slice(requests.length + (isBegun ? 1 : 0)).some(status => status < 400)
          ? [`${statuses} for ${requests.length} requests`]
          : [],
        ...secretsIn(received).map(secret => `in the answer: ${secret}`),
        ...received === '' || received.startsWith('HTTP/1.1 ') ? [] : [`an answer that is not HTTP: ${received}`]
      ]
      return {
        faults: faults.map(fault => `${fault}: ${JSON.stringify(one.text)}`),
        may: requests.flatMap(request => pairsOf(request)),
        must: one.isIntact ? mustSend(reading) : []
      }
    }))
    const [may, must] = [judged.flatMap(({ may }) => may), judged.flatMap(({ must }) => must)]
    return [...judged.flatMap(({ faults }) => faults), ...await tally.faultsAtMixpanel(may, must)]
  })

  t.comment(`${count} mutations, ${answered} answered, ${late} not closed in time: ${tally.text()}`)
  t.ok(answered > count / 2, `more than half of the mutations are answered, and ${answered} were`)
  t.ok((tally.statuses[200] ?? 0) > count / 20, `more than a twentieth of them are accepted, and ${tally.statuses[200]} were`)
  const last = identity()
  const pairs = [pairOf(last.identified_id, last.anon_id)]
  t.match(await exchange(relay.port, post(JSON.stringify(last), `x-api-key: ${KEYS[0]}\r\n`), { answers: 1 }), /^HTTP\/1\.1 200 /, 'the relay still serves')
  t.same(await tally.faultsAtMixpanel(pairs, pairs), [], 'nothing else reaches Mixpanel')
}
