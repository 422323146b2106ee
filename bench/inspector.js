import { setTimeout as sleep } from 'node:timers/promises'
import { WebSocket } from 'undici'

/**
 * Resolves with the CPU profiler of a process that runs with `--inspect=127.0.0.1:port`. `start()` begins a profile;
 * `stop()` ends it and resolves with it. Between the two the process takes a sample of its stack every `interval` µs;
 * before and after, the open inspector costs nothing that can be measured.
 */
export async function openProfiler (port, interval) {
  const socket = new WebSocket(await debuggerUrlOf(port))
  await new Promise((resolve, reject) => {
    socket.addEventListener('open', resolve)
    socket.addEventListener('error', ({ message }) => reject(new Error(`the inspector on port ${port}: ${message}`)))
  })
  const waiting = new Map()
  let last = 0

  socket.addEventListener('message', ({ data }) => {
    const { id, result, error } = JSON.parse(data)
    const call = waiting.get(id)
    waiting.delete(id)
    if (error) call?.reject(new Error(error.message))
    else call?.resolve(result)
  })

  const call = (method, params = {}) => new Promise((resolve, reject) => {
    waiting.set(++last, { resolve, reject })
    socket.send(JSON.stringify({ id: last, method, params }))
  })

  await call('Profiler.enable')
  await call('Profiler.setSamplingInterval', { interval })
  return {
    start: () => call('Profiler.start'),
    stop: async () => (await call('Profiler.stop')).profile,
    close: () => socket.close()
  }
}

async function debuggerUrlOf (port) {
  for (let attempt = 0; attempt < 200; attempt++, await sleep(50)) {
    const targets = await fetch(`http://127.0.0.1:${port}/json/list`).then(answer => answer.json()).catch(() => [])
    if (targets.length > 0) return targets[0].webSocketDebuggerUrl
  }
  throw new Error(`no inspector on port ${port}`)
}
