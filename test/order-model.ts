// Random batches and callers over few anonymous ids, before a Mixpanel with random faults. What the sandbox's ledger has
// first of an anonymous id must be what came first of all that it has.
import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { identifyEvent, type PendingEvent } from '#src/identity/event.js'
import { hasFailed, isRetryable, type Verdict } from '#src/identity/verdict.js'
import type { Fault } from '#src/sandbox/faults.js'
import type { startRelay } from './helper.ts'
import { createRandom, pick, type Random } from './verdict-model.ts'

type TestRelay = Awaited<ReturnType<typeof startRelay>>

const FAULTS: readonly Fault[] = [
  { name: 'edge_down' }, { name: 'rate_limited' }, { name: 'refused', times: 2 }, { name: 'mute_zero' }, { name: 'reset' },
  { name: 'reset_after' }, { name: 'wait', ms: 40 }, { name: 'temporary_failure' }
]

interface Claim { event: PendingEvent, verdict?: Verdict }

/** One caller: a batch of claims on few anonymous ids, in their order. */
function batchOf (anonIds: string[], random: Random): Claim[] {
  return Array.from({ length: 1 + Math.floor(random() * 6) }, () => ({
    event: identifyEvent({ identified_id: `user-${randomUUID()}`, anon_id: pick(random, anonIds) }, Date.now())
  }))
}

/** Returns a sentence for each claim that overtook an earlier one. The sequences run at the same time. */
export async function checkOrder ({ relay, sandbox, outbox }: TestRelay, seeds: number[]): Promise<string[]> {
  const sequences = seeds.map(seed => ({ seed, random: createRandom(seed), claims: [] as Claim[][] }))
  await Promise.all(sequences.map(async ({ random, claims }) => {
    const anonIds = Array.from({ length: 1 + Math.floor(random() * 3) }, () => randomUUID())
    const answers: Promise<unknown>[] = []
    for (let caller = 0; caller < 1 + random() * 3; caller++) {
      if (random() < 0.8) sandbox.faults.add(pick(random, FAULTS))
      const batch = batchOf(anonIds, random)
      claims.push(batch)
      const failures = new Map<string, Verdict>()
      const isAsync = random() < 0.2
      answers.push(...batch.map(async claim => { claim.verdict = await relay.identify(claim.event, { failures, isAsync }) }))
      await sleep(random() * 60)
    }
    await Promise.all(answers)
  }))
  sandbox.faults.clear()
  const waiting = () => outbox?.counts().waiting ?? 0
  while (waiting() > 0) await sleep(20)

  const arrivals = new Map(sandbox.ledger.rows().toReversed().map((row, index, rows) => [row.properties.$insert_id, rows.length - index]))
  return sequences.flatMap(({ seed, claims }) => faultsOf(claims, arrivals).map(fault => `seed ${seed}: ${fault}`))
}

function faultsOf (batches: Claim[][], arrivals: Map<unknown, number>): string[] {
  const faults: string[] = []
  const claims = batches.flat()
  for (const anonKey of new Set(claims.map(({ event }) => event.anonKey))) {
    const arrived = claims.filter(({ event }) => event.anonKey === anonKey && arrivals.has(event.insertId))
    const ranks = arrived.map(({ event }) => arrivals.get(event.insertId) as number)
    // A failed claim has its verdict, and a repeat of it comes later; a slow Redis may have stored it all the same.
    const earlier = arrived.slice(0, ranks.indexOf(Math.min(...ranks)))
    if (earlier.some(({ verdict }) => !hasFailed(verdict as Verdict))) faults.push(`an earlier claim was overtaken: ${arrived.map(({ verdict }, index) => `${ranks[index]} ${verdict?.code} ${verdict?.cause ?? ''}`).join()}`)
    for (const batch of batches) {
      const ofKey = batch.filter(({ event }) => event.anonKey === anonKey)
      const failed = ofKey.findIndex(({ verdict }) => hasFailed(verdict as Verdict) && isRetryable(verdict as Verdict))
      if (failed !== -1 && ofKey.slice(failed).some(({ verdict }) => verdict?.code !== ofKey[failed]?.verdict?.code)) {
        faults.push('after a retryable failure a later claim of the same batch did not fail alike')
      }
    }
  }
  return faults
}
