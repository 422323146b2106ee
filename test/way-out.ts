import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createServer, type IncomingMessage } from 'node:http'
import { createServer as createHttpsServer } from 'node:https'
import { readFileSync } from 'node:fs'
import { connect, createServer as createTcpServer, type AddressInfo, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { createServer as createTlsServer } from 'node:tls'
import type { Duplex } from 'node:stream'
import type { Test } from 'tap'

/** A key and a certificate for tests alone, for localhost and 127.0.0.1. A process trusts it by NODE_EXTRA_CA_CERTS. */
export const PEM = 'test/localhost.pem'

interface ProxyOptions {
  /** What the proxy does with a CONNECT; by default it makes a tunnel. */
  answer?: ((request: IncomingMessage, socket: Duplex) => void) | undefined
  isTls?: boolean
}

const portOf = (server: { address: () => unknown }) => (server.address() as AddressInfo).port

/** A proxy that knows CONNECT alone. It resolves every host to this machine. */
export async function startProxy (t: Test, options: ProxyOptions = {}) {
  const requests: IncomingMessage[] = []
  const tunnels = new Set<Duplex>()
  const state = { most: 0, answer: options.answer }
  const pem = readFileSync(PEM)
  const server = options.isTls === true ? createHttpsServer({ key: pem, cert: pem }) : createServer()
  const sockets = new Set<Socket>()
  server.on('connection', (socket: Socket) => {
    sockets.add(socket)
    socket.on('error', () => {}).once('close', () => sockets.delete(socket))
  })
  server.on('request', () => t.fail('a request that is no CONNECT reaches the proxy'))
  server.on('connect', (request, socket) => {
    requests.push(request)
    socket.on('error', () => {})
    if (state.answer !== undefined) return state.answer(request, socket)
    const upstream = connect(Number(/:(\d+)$/.exec(String(request.url))?.[1]), '127.0.0.1')
    upstream.on('error', () => socket.destroy())
    tunnels.add(socket)
    state.most = Math.max(state.most, tunnels.size)
    socket.once('close', () => {
      tunnels.delete(socket)
      upstream.destroy()
    })
    socket.write('HTTP/1.1 200 Connection established\r\n\r\n')
    socket.pipe(upstream).pipe(socket)
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const close = () => {
    for (const socket of sockets) socket.destroy()
    server.close()
  }
  t.teardown(close)
  const port = portOf(server)
  return {
    port,
    url: `${options.isTls === true ? 'https' : 'http'}://127.0.0.1:${port}`,
    requests,
    targets: () => requests.map(({ url }) => url),
    most: () => state.most,
    use: (answer: ProxyOptions['answer']) => { state.answer = answer },
    /** Breaks every tunnel and every other connection. */
    breakAll: () => { for (const socket of sockets) socket.destroy() },
    close
  }
}

/** A TCP server that writes `text` to each connection that sends something, and then what `more` does. */
export async function startRaw (t: Test, text: string, more = (socket: Socket): unknown => socket) {
  const server = createTcpServer(socket => {
    socket.on('error', () => {})
    socket.once('data', () => {
      if (text !== '') socket.write(text)
      more(socket)
    })
    t.teardown(() => { socket.destroy() })
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => { server.close() })
  return `http://127.0.0.1:${portOf(server)}`
}

/** TLS in front of an http server on this machine. `connections` counts its handshakes. */
export async function startTls (t: Test, upstream: string) {
  const pem = readFileSync(PEM)
  const connections: boolean[] = []
  const server = createTlsServer({ key: pem, cert: pem }, socket => {
    connections.push(socket.isSessionReused())
    const plain = connect(Number(new URL(upstream).port), '127.0.0.1')
    socket.on('error', () => plain.destroy()).pipe(plain).on('error', () => socket.destroy()).pipe(socket)
  }).on('tlsClientError', () => {}).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => { server.close() })
  return { url: `https://localhost:${portOf(server)}`, connections }
}

/** A port that takes no more connections, and answers none, as behind a firewall that drops packets. */
export async function startBlackHole (t: Test) {
  const code = 'const s = require("net").createServer().listen(0, "127.0.0.1", 1, () => { console.log(s.address().port) })'
  const child = spawn(process.execPath, ['-e', code], { env: {}, stdio: ['ignore', 'pipe', 'ignore'] })
  const port = Number(String((await once(child.stdout, 'data'))[0]))
  await sleep(100)
  child.kill('SIGSTOP')
  // They fill the queue of the kernel.
  const waiting = Array.from({ length: 8 }, () => connect(port, '127.0.0.1').on('error', () => {}))
  await sleep(100)
  t.teardown(() => {
    for (const socket of waiting) socket.destroy()
    child.kill('SIGKILL')
  })
  return `127.0.0.1:${port}`
}
