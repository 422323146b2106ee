// The callers that a load is made of: keep-alive connections on raw sockets, each with one request under way.
import { randomUUID } from 'node:crypto'
import { connect } from 'node:net'

/**
 * Returns the bytes of a request for a user, which carries `credentialOf(user)` as Bearer, and so many properties.
 */
export function requestOf (user, { credentialOf, path = '/identify', properties = 0 } = {}) {
  const extra = properties === 0
    ? {}
    : { properties: Object.fromEntries(Array.from({ length: properties }, (_, index) => [`property_${index}`, `value ${index} of ${user}`])) }
  const body = JSON.stringify({ identified_id: user, anon_id: randomUUID(), ...extra })
  const credential = credentialOf === undefined ? '' : `authorization: Bearer ${credentialOf(user)}\r\n`
  return Buffer.from(`POST ${path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n` +
    `${credential}content-length: ${body.length}\r\n\r\n${body}`)
}

/**
 * Opens them and resolves with { sockets, send }. Every `send(socket)` posts the next of `distinct` identities, made
 * with the options of `requestOf`; `onAnswer(socket, status)` gets every answer, `onError` a connection that fails or
 * closes.
 */
export async function openCallers ({ port, connections, distinct = 20_000, onAnswer, onError, ...options }) {
  const requests = Array.from({ length: distinct }, (_, index) => requestOf(`user-${index}@example.com`, options))
  let sent = 0

  const sockets = await Promise.all(Array.from({ length: connections }, () => new Promise((resolve, reject) => {
    const socket = connect(port, '127.0.0.1', () => resolve(socket))
    socket.setNoDelay(true).on('error', error => { reject(error); onError?.(error) })
    if (onError) socket.on('close', () => onError(new Error('a connection was closed')))
  })))

  for (const socket of sockets) {
    let rest = ''
    socket.on('data', chunk => {
      rest += chunk.latin1Slice()
      const end = rest.indexOf('\r\n\r\n')
      if (end === -1) return
      const length = /\r\ncontent-length: (\d+)/i.exec(rest)
      if (rest.length < end + 4 + Number(length[1])) return
      const status = rest.slice(9, 12)
      rest = ''
      onAnswer(socket, status)
    })
  }
  return { sockets, send: socket => { socket.write(requests[sent++ % requests.length]) } }
}
