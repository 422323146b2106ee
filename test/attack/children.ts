import { Agent, createServer, request, type RequestOptions, type ServerResponse } from 'node:http'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { createAttacker } from './attacker.ts'
import { ATTACKS } from './attacks.ts'

// Each role is a process of its own, which the harness controls by messages.
const [role, ...args] = process.argv.slice(2)
const tell = (message: unknown) => process.send?.(message)
process.on('disconnect', () => process.exit())

/** A Mixpanel that accepts everything or never answers, and that records the size of the largest request. */
function upstream () {
  let isHanging = false
  let largest = 0
  const server = createServer({ keepAliveTimeout: 60_000, requestTimeout: 0 }, (incoming, answer: ServerResponse) => {
    largest = Math.max(largest, Number(incoming.headers['content-length'] ?? Infinity))
    incoming.resume().on('end', () => { if (!isHanging) answer.setHeader('content-type', 'text/plain').end('1') })
  })
  server.listen(0, '127.0.0.1', () => tell(server.address()))
  process.on('message', (message: 'hang' | 'recover' | 'largest') => {
    if (message === 'largest') return tell(largest)
    isHanging = message === 'hang'
    if (!isHanging) server.closeAllConnections()
  })
}

/** A request that takes longer counts as lost. */
const LOST_MS = 5000

const newPhase = () => ({
  pending: [] as Promise<unknown>[], probes: [] as number[], fresh: [] as number[], lost: 0, ok: 0, slow: 0, failed: 0, statuses: {} as Record<string, number>
})
export type Phase = ReturnType<typeof newPhase>
export interface Watched extends Pick<Phase, 'lost' | 'ok' | 'slow' | 'failed' | 'statuses'> { median: number, p99: number, freshMedian: number, freshP99: number, max: number, count: number }

/** Probes /livez every 20 ms, every fifth time on a new connection. It is also the good caller. */
function witness (port: number) {
  let phase = newPhase()
  let turn = 0

  function call (options: RequestOptions, body = '') {
    const start = performance.now()
    return new Promise<{ status: number, ms: number }>(resolve => {
      const outgoing = request({ host: '127.0.0.1', port, ...options }, answer => answer.resume().on('close', () => done(answer.complete ? answer.statusCode : 0)))
      const timer = setTimeout(() => outgoing.destroy(new Error('lost')), LOST_MS)
      const done = (status = 0) => {
        clearTimeout(timer)
        resolve({ status, ms: performance.now() - start })
      }
      outgoing.on('error', () => done()).end(body)
    })
  }

  // A few connections stay open, so that one late answer does not delay all others.
  const [probes, good] = [new Agent({ keepAlive: true, maxSockets: 4 }), new Agent({ keepAlive: true })]
  async function probe (mine: Phase, isNew: boolean) {
    const { status, ms } = await call({ path: '/livez', localAddress: '127.0.0.2', agent: isNew ? false : probes })
    if (status !== 200) mine.lost++
    mine[isNew ? 'fresh' : 'probes'].push(status === 200 ? ms : LOST_MS)
  }
  async function identify (mine: Phase) {
    const body = JSON.stringify({ identified_id: `good-${randomUUID()}`, anon_id: randomUUID() })
    const headers = { 'content-type': 'application/json' }
    const { status, ms } = await call({ method: 'POST', path: '/identify', headers, localAddress: '127.0.0.3', agent: good }, body)
    mine[status !== 200 ? 'failed' : ms > 1000 ? 'slow' : 'ok']++
    mine.statuses[status] = (mine.statuses[status] ?? 0) + 1
  }
  setInterval(() => {
    phase.pending.push(probe(phase, turn % 5 === 4))
    if (turn % 10 === 0) phase.pending.push(identify(phase))
    turn++
  }, 20)
  for (let count = 0; count < 4; count++) probe(newPhase(), false).catch(() => {})
  tell('ready')
  // Any message ends a phase. Its figures are sent after its last answer.
  process.on('message', async () => {
    const { pending, probes, fresh, ...figures } = phase
    phase = newPhase()
    await Promise.all(pending)
    const quantile = (times: number[], q: number) => times.toSorted((a, b) => a - b)[Math.ceil(times.length * q) - 1] ?? LOST_MS
    tell({
      ...figures,
      count: probes.length,
      median: quantile(probes, 0.5),
      p99: quantile(probes, 0.99),
      freshMedian: quantile(fresh, 0.5),
      freshP99: quantile(fresh, 0.99),
      max: Math.max(...probes, ...fresh)
    })
  })
}

/** The first message is the process id of the relay; then the attack begins. */
async function attack (name: string, port: number, seconds: number) {
  const [pid] = await once(process, 'message') as [number]
  const attacker = createAttacker(port, pid, seconds)
  // The harness keeps the last tally, because an attack ends early if the relay dies.
  setInterval(() => tell(attacker.got), 200)
  await ATTACKS.find(attack => attack.name === name)?.run(attacker)
  process.send?.(attacker.got, () => process.exit())
}

if (role === 'upstream') upstream()
if (role === 'witness') witness(Number(args[0]))
if (role === 'attacker') await attack(args[0] ?? '', Number(args[1]), Number(args[2]))
