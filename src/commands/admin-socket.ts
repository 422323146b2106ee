import { once } from 'node:events'
import { chmodSync, rmSync } from 'node:fs'
import { createServer, request, type IncomingMessage } from 'node:http'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { UsageError } from './admin.ts'

/** The longest path of a socket, in bytes, on every system that Node supports. */
const MAX_PATH = 103

/**
 * Returns the path of the socket in an outbox directory. Only one process may open the directory, so admin commands
 * reach the running relay over HTTP through this socket, which only its owner can use. A long path throws a UsageError.
 */
function socketIn (directory: string): string {
  const path = join(directory, 'operators.sock')
  // Node truncates a longer path. The socket would then be elsewhere, and open to other users.
  if (Buffer.byteLength(path) > MAX_PATH) throw new UsageError(`${path} is too long for a socket: stop the relay.`)
  return path
}

/**
 * Runs the admin commands of other processes; `run` yields the text to print. Resolves with a function that closes the
 * socket. Rejects when the socket cannot be opened.
 */
export async function serveAdminSocket (
  directory: string, run: (args: string[]) => AsyncIterable<string>
): Promise<() => void> {
  // A killed process leaves its socket behind. This process holds the lock of the directory, so nothing else uses it.
  rmSync(socketIn(directory), { force: true })
  const server = createServer(async (incoming, response) => {
    const closed = once(response, 'close')
    try {
      for await (const chunk of run(JSON.parse(await text(incoming)))) {
        if (!response.write(chunk)) await Promise.race([closed, once(response, 'drain')])
        if (response.destroyed) return
      }
      response.end()
    } catch (error) {
      if (response.headersSent) response.destroy()
      else response.writeHead(400).end((error as Error).message)
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

/** Yields the output of an admin command from the process with the open directory. Throws a UsageError on failure. */
export async function * callAdminSocket (directory: string, args: string[]): AsyncGenerator<string> {
  const outgoing = request({ socketPath: socketIn(directory), method: 'POST' }).end(JSON.stringify(args))
  const [response] = await once(outgoing, 'response').catch((error: NodeJS.ErrnoException) => {
    throw new UsageError(`The process that uses ${directory} does not accept commands (${error.code}): stop it first.`)
  }) as [IncomingMessage]
  response.setEncoding('utf8')
  if (response.statusCode !== 200) throw new UsageError(await text(response))
  yield * response
}
