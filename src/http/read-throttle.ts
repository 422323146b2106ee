import type { Socket } from 'node:net'
import { isIdle, type Pipeline } from './pipelining.ts'

/** Time in one turn of the event loop for reading, in µs. */
const TURN_US = 5000

/** The length of a pause in reading. */
const PAUSE_MS = 20

/** The recent cost of reading from an address, in µs. Its owner lowers it from time to time. */
export interface ReadingCost { recentCost: number }

/**
 * Returns a bound on the time that reading takes. In one turn Node reads 64 KB of every connection. A hostile 64 KB
 * takes 10 ms and 10 MB; many at once take seconds and all memory. Beyond TURN_US, connections of costly addresses are
 * paused, unless idle. A pause is longer than a turn: Node accepts one connection in each, and others wait for it.
 */
export function createReadThrottle (connections: ReadonlyMap<Socket, { peer: ReadingCost, pipeline: Pipeline }>) {
  /** The cost of reading in this turn of the event loop, in µs. */
  let turnCost = 0
  /** Connections that are paused; undefined outside a pause. */
  let paused: Socket[] | undefined

  function pause (socket: Socket): void {
    if (paused === undefined || socket.destroyed || socket.isPaused()) return
    socket.pause()
    paused.push(socket)
  }

  function resumeAll (): void {
    const sockets = paused as Socket[]
    paused = undefined
    for (const socket of sockets) socket.resume()
  }

  return {
    /** Adds to the cost of reading from a connection, in µs. */
    recordCost (socket: Socket, us: number): void {
      const { peer } = connections.get(socket) ?? {}
      if (peer === undefined) return
      const wasCheap = peer.recentCost < TURN_US
      peer.recentCost += us
      if (turnCost === 0) setImmediate(() => { turnCost = 0 })
      turnCost += us
      if (turnCost < TURN_US || peer.recentCost < TURN_US || (paused !== undefined && !wasCheap)) return
      if (paused === undefined) {
        paused = []
        setTimeout(resumeAll, PAUSE_MS)
      }
      for (const [socket, { peer: { recentCost }, pipeline }] of connections) {
        if (recentCost >= TURN_US && !isIdle(pipeline) && !pipeline.isFull) pause(socket)
      }
    },

    /** Pauses a new connection of a costly address during a pause. */
    pauseNew (socket: Socket, peer: ReadingCost): void {
      if (peer.recentCost >= TURN_US) pause(socket)
    }
  }
}
