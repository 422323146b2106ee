import { connect } from 'node:net'
import type { Test } from 'tap'

/** A GET as it travels. */
export const get = (path: string, headers = '') => `GET ${path} HTTP/1.1\r\nhost: x\r\n${headers}\r\n`

/** A POST with a JSON body as it travels. */
export const post = (body: string, headers = '', path = '/identify') =>
  `POST ${path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n${headers}content-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`

/** The statuses of all answers in `text`. */
export const statuses = (text: string) => [...text.matchAll(/HTTP\/1.1 (\d+) /g)].map(([, status]) => Number(status))

/**
 * Sends raw bytes. Resolves with what came back when the relay has closed the connection, when `answers` answers have
 * come, or after `ms`, by default ten seconds.
 */
export function exchange (port: number, bytes: string | Buffer, { answers, ms }: { answers?: number, ms?: number } = {}): Promise<string> {
  return new Promise(resolve => {
    let received = ''
    const socket = connect(port, '127.0.0.1', () => socket.write(bytes))
    const timer = setTimeout(() => socket.destroy(), ms ?? 10_000)
    socket.on('data', chunk => {
      received += String(chunk)
      if (answers !== undefined && statuses(received).length >= answers) socket.end()
    })
    socket.on('error', () => {})
    socket.on('close', () => {
      clearTimeout(timer)
      resolve(received)
    })
  })
}

/**
 * A connection whose peer keeps its own side open, whatever the relay does. `ended` resolves with what came when the
 * relay has closed its side, `answered` when so many answers have come.
 */
export function halfOpenPeer (t: Test, port: number, localAddress = '127.0.0.1') {
  const socket = connect({ port, host: '127.0.0.1', localAddress, allowHalfOpen: true })
  let text = ''
  socket.on('data', chunk => { text += String(chunk) }).on('error', () => {})
  t.teardown(() => { socket.destroy() })
  const ended = new Promise<string>(resolve => { for (const event of ['end', 'close']) socket.on(event, () => resolve(text)) })
  const answered = (count = 1) => new Promise<void>(resolve => {
    const look = () => { if (socket.destroyed || statuses(text).length >= count) resolve() }
    for (const event of ['data', 'end', 'close']) socket.on(event, look)
    look()
  })
  return { socket, text: () => text, ended, answered }
}
