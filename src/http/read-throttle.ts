import type { Socket } from 'node:net'
import { isIdle, type Pipeline } from './pipelining.ts'

/** So much of one turn of the event loop is spent on reading, in µs. */
const TURN_US = 5000

/** How long addresses that made it more are not read. */
const REST_MS = 20

/** What reading from an address has cost lately, in µs. Its owner forgets some of it from time to time. */
export interface ReadingCost { spent: number }

/**
 * Bounds what reading takes of the event loop. In one turn Node reads 64 KB of every connection, and what it makes of a
 * hostile 64 KB takes 10 ms and 10 MB: of many at once, seconds and all memory there is. So beyond a bound nothing more
 * is read for a while from addresses that have cost much lately, but where a connection is idle. A while is longer than
 * a turn, because Node accepts one connection in a turn, and others wait to be accepted.
 */
export function createReadThrottle (connections: ReadonlyMap<Socket, { peer: ReadingCost, pipeline: Pipeline }>) {
  /** What reading has cost in this turn of the event loop. */
  let spent = 0
  /** Connections that are not read for a while; undefined where all are. */
  let resting: Socket[] | undefined

  function rest (socket: Socket): void {
    if (resting === undefined || socket.destroyed || socket.isPaused()) return
    socket.pause()
    resting.push(socket)
  }

  function readOn (): void {
    const rested = resting as Socket[]
    resting = undefined
    for (const socket of rested) socket.resume()
  }

  return {
    /** Counts what reading from a connection has cost, in µs. */
    spend (socket: Socket, us: number): void {
      const { peer } = connections.get(socket) ?? {}
      if (peer === undefined) return
      const isFirst = peer.spent < TURN_US
      peer.spent += us
      if (spent === 0) setImmediate(() => { spent = 0 })
      spent += us
      if (spent < TURN_US || peer.spent < TURN_US || (resting !== undefined && !isFirst)) return
      if (resting === undefined) {
        resting = []
        setTimeout(readOn, REST_MS)
      }
      for (const [socket, { peer: { spent }, pipeline }] of connections) {
        if (spent >= TURN_US && !isIdle(pipeline) && !pipeline.isFull) rest(socket)
      }
    },

    /** A new connection is not read either, where its address is not. */
    admit (socket: Socket, peer: ReadingCost): void {
      if (peer.spent >= TURN_US) rest(socket)
    }
  }
}
