import { readdirSync } from 'node:fs'
import { connect, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'

interface DialOptions { from?: string, reads?: boolean, allowHalfOpen?: boolean }

export type Attacker = ReturnType<typeof createAttacker>

/** The tools of an attack: raw sockets from eight addresses, and a tally. All sockets are destroyed at the end. */
export function createAttacker (port: number, pid: number, seconds: number) {
  const end = Date.now() + seconds * 1000
  const open = new Set<Socket>()
  const got: Record<string, number> = {}
  let dialled = 0
  setTimeout(() => { for (const socket of open) socket.destroy() }, seconds * 1000)

  const left = () => end - Date.now()
  /** The number of open files of the relay. */
  const descriptors = () => readdirSync(`/proc/${pid}/fd`).length
  const isOver = () => left() <= 0
  const tally = (what: string) => { got[what] = (got[what] ?? 0) + 1 }

  /** A connection that emits `status` for every answer that it reads. */
  function dial ({ from = `127.0.9.${1 + dialled++ % 8}`, reads = true, allowHalfOpen = false }: DialOptions = {}): Socket {
    const socket = connect({ port, host: '127.0.0.1', localAddress: from, allowHalfOpen })
    open.add(socket)
    if (reads) {
      socket.setEncoding('latin1').on('data', (chunk: string) => {
        for (const [, status = ''] of chunk.matchAll(/HTTP\/1\.1 (\d{3}) /g)) {
          tally(status)
          socket.emit('status', Number(status))
        }
      })
    }
    socket.on('error', ({ code = 'error' }: NodeJS.ErrnoException) => tally(code))
    return socket.on('close', () => {
      open.delete(socket)
      if (!isOver()) tally('closed')
    })
  }

  const closed = (socket: Socket) => new Promise<void>(resolve => {
    if (socket.destroyed) resolve()
    else socket.once('close', () => resolve())
  })

  /** Sends bytes. Resolves with the last status after `answers` answers, or with 0 if the connection is closed. */
  const ask = (socket: Socket, bytes: string, answers = 1) => new Promise<number>(resolve => {
    if (socket.destroyed) return resolve(0)
    const done = (status: number) => {
      socket.off('status', count).off('close', lost)
      resolve(status)
    }
    const count = (status: number) => { if (--answers === 0) done(status) }
    const lost = () => done(0)
    socket.on('status', count).on('close', lost).write(bytes)
  })

  /**
   * Runs clients with one turn after the other until the attack is over. They begin within a second, or 500 a second if
   * there are more. Node accepts one connection in a turn of its event loop, and these attacks are not about a flood of
   * connections alone.
   */
  const loop = (clients: number, turn: (n: number) => Promise<unknown>, pauseMs = 0) =>
    Promise.all(Array.from({ length: clients }, async (_, n) => {
      await sleep(n * Math.max(2, 1000 / clients))
      while (!isOver()) {
        await turn(n)
        await sleep(pauseMs)
      }
    }))

  return { port, got, left, isOver, tally, descriptors, dial, closed, ask, loop }
}
