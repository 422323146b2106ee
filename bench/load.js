// The load: callers, each with one request under way, every request another identity. Closed loop by default; with
// `rate` an open loop, whose latencies count from the moment a request was due. Prints one line of JSON. Usage: node load.js '{"port":8080,"connections":64,"seconds":5,"rate":0}'
import { performance } from 'node:perf_hooks'
import { openCallers } from './callers.js'
import { CREDENTIALS } from './credentials.js'

const { port, connections, seconds, rate = 0, distinct } = JSON.parse(process.argv[2])

const latencies = { ok: [], refused: [] }
const statuses = {}
let isOver = false
const idle = []
const due = []

const callers = await openCallers({ port, connections, distinct, ...CREDENTIALS.key, onAnswer })
const { sockets } = callers

function onAnswer (socket, status) {
  statuses[status] = (statuses[status] ?? 0) + 1
  latencies[status === '200' ? 'ok' : 'refused'].push(performance.now() - socket.since)
  if (isOver) return
  if (rate === 0) send(socket, performance.now())
  else if (due.length > 0) send(socket, due.shift())
  else idle.push(socket)
}

function send (socket, since) {
  socket.since = since
  callers.send(socket)
}

const cpu = process.cpuUsage()
const started = performance.now()
if (rate === 0) {
  for (const socket of sockets) send(socket, performance.now())
} else {
  idle.push(...sockets)
  let made = 0
  const timer = setInterval(() => {
    for (const now = performance.now(); made < (now - started) / 1000 * rate; made++) {
      const at = started + made / rate * 1000
      if (idle.length > 0) send(idle.shift(), at)
      else due.push(at)
    }
    if (isOver) clearInterval(timer)
  }, 1)
}
await new Promise(resolve => setTimeout(resolve, seconds * 1000))
isOver = true
const elapsed = (performance.now() - started) / 1000
const { user, system } = process.cpuUsage(cpu)
const quantile = (list, share) => list.sort((a, b) => a - b)[Math.min(list.length - 1, Math.floor(list.length * share))] ?? null
console.log(JSON.stringify({
  ok: latencies.ok.length / elapsed,
  refused: latencies.refused.length / elapsed,
  statuses,
  unsent: due.length,
  p50: quantile(latencies.ok, 0.5),
  p99: quantile(latencies.ok, 0.99),
  refusedP50: quantile(latencies.refused, 0.5),
  refusedP99: quantile(latencies.refused, 0.99),
  /** Of one core; near 1 the load itself would be the limit. */
  generatorCpu: (user + system) / 1e6 / elapsed
}))
process.exit(0)
