import { setTimeout as sleep } from 'node:timers/promises'
import { openCallers } from './callers.js'
import { usage } from './processes.js'

/**
 * Opens the callers of one server, with the options of `openCallers`. `slot(ms, count, limit)` lets so many of them load
 * it for so long, or until they have sent `limit` requests, each with one under way. It resolves with { answered, rate,
 * latencies (ms), cpu, waited (µs) }, and rejects when an answer is no 200.
 */
export async function openSlots ({ pid }, port, connections, options) {
  let isOver, latencies, underWay, left, end, fail, broken
  const { sockets, send } = await openCallers({ ...options, port, connections, onAnswer, onError })

  function onError (error) {
    broken = new Error(`the server on port ${port}: ${error.message}`)
    fail?.(broken)
  }

  function begin (socket, now) {
    socket.since = now
    left--
    send(socket)
  }

  function onAnswer (socket, status) {
    if (status !== '200') onError(new Error(`answered ${status}`))
    const now = performance.now()
    latencies.push(now - socket.since)
    if (!isOver && left > 0) begin(socket, now)
    else if (--underWay === 0) end()
  }

  return {
    async slot (ms, count = connections, limit = Infinity) {
      if (broken) throw broken
      const before = usage(pid)
      isOver = false
      latencies = []
      underWay = count
      left = limit
      const done = new Promise((resolve, reject) => { [end, fail] = [resolve, reject] })
      const timer = setTimeout(() => { isOver = true }, ms)
      const since = performance.now()
      for (const socket of sockets.slice(0, count)) begin(socket, since)
      await done
      clearTimeout(timer)
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
