import { once } from 'node:events'
import { chmodSync, rmSync } from 'node:fs'
import { createServer, request, type IncomingMessage } from 'node:http'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { UsageError } from './admin.ts'

/** The shortest limit of the systems that Node runs on. */
const MAX_PATH = 103

/**
 * Only one process may open an outbox's directory, so an operator's process asks the relay that has it: by HTTP,
 * through a socket in the directory, which is its owner's alone.
 */
function socketIn (directory: string): string {
  const path = join(directory, 'operators.sock')
  // Node cuts a longer path off, and the socket would be somewhere else, open to others.
  if (Buffer.byteLength(path) > MAX_PATH) throw new UsageError(`${path} is too long for a socket: stop the relay.`)
  return path
}

/**
 * Lets operators' processes give orders to this one; `carryOut` yields what to print. Resolves with a function that
 * ends it; rejects when there can be no socket.
 */
export async function serveAdminSocket (
  directory: string, run: (order: string[]) => AsyncIterable<string>
): Promise<() => void> {
  // A process that was killed leaves its socket behind, and we have the directory's lock.
  rmSync(socketIn(directory), { force: true })
  const server = createServer(async (order, answer) => {
    const closed = once(answer, 'close')
    try {
      for await (const chunk of run(JSON.parse(await text(order)))) {
        if (!answer.write(chunk)) await Promise.race([closed, once(answer, 'drain')])
        if (answer.destroyed) return
      }
      answer.end()
    } catch (error) {
      if (answer.headersSent) answer.destroy()
      else answer.writeHead(400).end((error as Error).message)
    }
  })
  server.listen(socketIn(directory))
  await once(server, 'listening')
  chmodSync(socketIn(directory), 0o600)
  return () => {
    server.close()
    server.closeAllConnections()
  }
}

/** What the process that has the directory answers to an order. Throws OrderError, also when there is no answer. */
export async function * callAdminSocket (directory: string, order: string[]): AsyncGenerator<string> {
  const asked = request({ socketPath: socketIn(directory), method: 'POST' }).end(JSON.stringify(order))
  const [answer] = await once(asked, 'response').catch((error: NodeJS.ErrnoException) => {
    throw new UsageError(`The process that uses ${directory} does not take orders (${error.code}): stop it first.`)
  }) as [IncomingMessage]
  answer.setEncoding('utf8')
  if (answer.statusCode !== 200) throw new UsageError(await text(answer))
  yield * answer
}
