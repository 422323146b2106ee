import { setTimeout as sleep } from 'node:timers/promises'
import { openCallers } from './callers.js'
import { usage } from './processes.js'

/**
 * Opens the callers of one server. `slot(ms, count)` lets so many of them load it for so long, each with one request
 * under way, and resolves with { answered, rate, latencies (ms), cpu and waited (µs) }. Any other answer than 200
 * fails the slot.
 */
export async function openSlots ({ pid }, port, connections, { credentialOf, distinct }) {
  let isOver, latencies, underWay, end, fail, broken
  const { sockets, send } = await openCallers({ port, connections, credentialOf, distinct, onAnswer, onError })

  function onError (error) {
    broken = new Error(`the server on port ${port}: ${error.message}`)
    fail?.(broken)
  }

  function begin (socket, now) {
    socket.since = now
    send(socket)
  }

  function onAnswer (socket, status) {
    if (status !== '200') onError(new Error(`answered ${status}`))
    const now = performance.now()
    latencies.push(now - socket.since)
    if (!isOver) begin(socket, now)
    else if (--underWay === 0) end()
  }

  return {
    async slot (ms, count = connections) {
      if (broken) throw broken
      const before = usage(pid)
      isOver = false
      latencies = []
      underWay = count
      const done = new Promise((resolve, reject) => { [end, fail] = [resolve, reject] })
      setTimeout(() => { isOver = true }, ms)
      const since = performance.now()
      for (const socket of sockets.slice(0, count)) begin(socket, since)
      await done
      const seconds = (performance.now() - since) / 1000
      // The server may have something left to do after its last answer.
      await sleep(5)
      const after = usage(pid)
      const answered = latencies.length
      return { answered, rate: answered / seconds, latencies, cpu: after.cpu - before.cpu, waited: after.waited - before.waited }
    },
    close: () => { for (const socket of sockets) socket.destroy() }
  }
}
