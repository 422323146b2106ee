import type { Socket } from 'node:net'

/** How long, and for how many bytes, a connection is read after its last answer. */
const LINGER_MS = 1000
const LINGER_BYTES = 1_048_576

/** What a chunk costs to read, in µs, with the garbage that it leaves. */
const READ_US = 50

const lingering = new WeakSet<Socket>()

/**
 * Closes a connection once its peer has had a moment to read the last answer: what still arrives is read and thrown
 * away, because a socket that is closed with bytes unread resets the peer, which then often loses the answer.
 */
export function linger (socket: Socket, spend: (socket: Socket, us: number) => void): void {
  if (socket.destroyed || lingering.has(socket)) return
  lingering.add(socket)
  socket.end()
  let bytes = 0
  socket.removeAllListeners('data')
  socket.on('data', ({ length }: Buffer) => {
    bytes += length
    spend(socket, READ_US)
    if (bytes > LINGER_BYTES) socket.pause()
  })
  socket.resume()
  const timer = setTimeout(() => socket.destroy(), LINGER_MS)
  socket.on('close', () => clearTimeout(timer))
}
