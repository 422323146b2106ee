// Callers that repeat each identity until it is accepted or queued, before a relay that is killed again and again and a
// Mixpanel with random faults. What merges in the sandbox's ledger must be what a plain model merges: the first user of
// an anonymous id keeps it.
import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Test } from 'tap'
import type { Fault } from '#src/sandbox/faults.js'
import type { Row } from '#src/sandbox/ledger.js'
import { startSandbox, type Env } from './helper.ts'
import { startServer } from './processes.ts'
import { createRandom, pick, type Random } from './verdict-model.ts'

type Mode = 'original' | 'simplified'
interface Identity { identified_id: string, anon_id: string }

/** None of them can end in a refusal, after which an identity would not be repeated. */
const FAULTS: readonly Fault[] = [
  { name: 'edge_down' }, { name: 'rate_limited' }, { name: 'reset' }, { name: 'reset_after' },
  { name: 'wait', ms: 30 }
]

/** A sequence of requests, each of one identity or a batch, over few users and few anonymous ids of its own. */
function sequenceOf (mode: Mode, random: Random): Identity[][] {
  const users = Array.from({ length: 1 + Math.floor(random() * 3) }, () => `user-${randomUUID()}`)
  const anonIds = Array.from({ length: 1 + Math.floor(random() * 4) }, () => {
    const id = mode === 'simplified' && random() < 0.3 ? `Device ${randomUUID()}` : randomUUID()
    return random() < 0.5 ? id : `$device:${id}`
  })
  const one = () => ({ identified_id: pick(random, users), anon_id: pick(random, anonIds) })
  return Array.from({ length: 1 + Math.floor(random() * 4) }, () => random() < 0.6 ? [one()] : Array.from({ length: 2 + Math.floor(random() * 4) }, one))
}

/** The users of each anonymous id in the order in which a sequence claims them: the first one keeps it. */
function modelOf (sequence: Identity[][], key: (anon: string) => string): Map<string, string> {
  const owners = new Map<string, string>()
  for (const { identified_id: user, anon_id: anon } of sequence.flat()) {
    if (!owners.has(key(anon))) owners.set(key(anon), user)
  }
  return owners
}

/** What merged, by the ledger: the user of each anonymous id. */
function merged (rows: readonly Row[]): Map<string, string> {
  const pairs = rows.filter(({ outcome }) => outcome === 'merged').map(({ properties }): [string, string] => '$device_id' in properties
    ? [String(properties.$device_id), String(properties.$user_id)]
    : [String(properties.$anon_id), String(properties.$identified_id)])
  return new Map(pairs)
}

interface Options { mode: Mode, sequences: number, kills: number, atOnce?: number, env?: Env, from?: number }

/** Runs the sequences through a relay as a process. Returns a sentence for each anonymous id that merged otherwise than in the model, and counts. */
export async function checkMerges (t: Test, { mode, sequences, kills, atOnce = 100, env = {}, from = 0 }: Options) {
  const sandbox = await startSandbox(t, { mode })
  const options = { MIXPANEL_ID_MERGE: mode, MAX_BATCH: '20', ...env }
  let server = await startServer(t, sandbox.url, options)
  const counts = { identities: 0, requests: 0, kills: 0, merged: 0 }
  const all = Array.from({ length: sequences }, (_, index) => {
    const random = createRandom(from + index)
    return { seed: from + index, random, sequence: sequenceOf(mode, random) }
  })

  /** Resolves when each identity of a request is accepted or queued. Identities that must be repeated keep their order. */
  async function send (identities: Identity[], isAsync: boolean): Promise<void> {
    for (let left = identities; left.length > 0; counts.requests++) {
      const isBatch = left.length > 1
      const results = await fetch(`${server.url}/identify${isBatch ? '/batch' : ''}`, {
        method: 'POST',
        headers: { 'content-type': 'application/json', ...isAsync && { prefer: 'respond-async' } },
        body: JSON.stringify(isBatch ? { identities: left } : left[0])
      }).then(async answer => {
        const body = await answer.json() as { results?: { status: string, problem?: { retryable: boolean } }[], retryable?: boolean, detail?: string }
        if (body.retryable === false) throw new Error(`an identity is not accepted: ${answer.status} ${body.detail}`)
        return body.results?.map(({ status }) => status) ?? [answer.ok ? 'accepted' : 'failed']
      }, () => undefined)
      left = left.filter((_, index) => results === undefined || results[index] === 'failed')
      if (left.length > 0) await sleep(50)
    }
  }

  let next = 0
  const state = { hasFailed: false }
  async function work (): Promise<void> {
    for (let one = all[next++]; one !== undefined && !state.hasFailed; one = all[next++]) {
      for (const request of one.sequence) {
        if (one.random() < 0.2) sandbox.faults.add(pick(one.random, FAULTS))
        counts.identities += request.length
        await send(request, one.random() < 0.2)
      }
    }
  }
  /** Kills the relay each time a further part of the sequences has begun. */
  async function kill (): Promise<void> {
    while (counts.kills < kills && !state.hasFailed) {
      await sleep(10)
      if (next < sequences * (counts.kills + 1) / (kills + 1)) continue
      counts.kills++
      await server.kill()
      server = await startServer(t, sandbox.url, { ...options, PORT: String(server.port) })
    }
  }
  await Promise.all([kill(), ...Array.from({ length: atOnce }, work)]).catch(error => {
    state.hasFailed = true
    throw error
  })
  sandbox.faults.clear()
  if (env.OUTBOX !== undefined) await server.emptied()
  await server.kill('SIGTERM')

  const actual = merged(sandbox.ledger.rows())
  counts.merged = actual.size
  const key = (anon: string) => mode === 'simplified' ? anon.replace(/^\$device:/, '') : anon
  const faults = all.flatMap(({ seed, sequence }) => [...modelOf(sequence, key)]
    .filter(([anon, user]) => actual.get(anon) !== user)
    .map(([anon, user]) => `seed ${seed}: ${anon} belongs to ${actual.get(anon)} and not to ${user}`))
  return { faults, counts }
}
