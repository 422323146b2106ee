import type { Socket } from 'node:net'

/** How long, and for how many bytes, a connection is read after its last response. */
const LINGER_MS = 1000
const LINGER_BYTES = 1_048_576

/** The cost to read a chunk, in µs, with its garbage collection. */
const READ_US = 50

const lingering = new WeakSet<Socket>()

/**
 * Closes a connection after a delay in which its peer can read the last response. Until then incoming bytes are read
 * and discarded: closing a socket with unread bytes sends a reset, and the peer then often loses the response.
 */
export function linger (socket: Socket, recordCost: (socket: Socket, us: number) => void): void {
  if (socket.destroyed || lingering.has(socket)) return
  lingering.add(socket)
  socket.end()
  let bytes = 0
  socket.removeAllListeners('data')
  socket.on('data', ({ length }: Buffer) => {
    bytes += length
    recordCost(socket, READ_US)
    if (bytes > LINGER_BYTES) socket.pause()
  })
  socket.resume()
  const timer = setTimeout(() => socket.destroy(), LINGER_MS)
  socket.on('close', () => clearTimeout(timer))
}
