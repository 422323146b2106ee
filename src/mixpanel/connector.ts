import type undici from 'undici'
import type { Proxy } from '../proxy.ts'

/** Returns undici's way to connect through a proxy. Its code is loaded by the first connection. */
export function createConnector (proxy: Proxy, timeoutMs: number): undici.buildConnector.connector {
  const tunnels = () => import('../tunnel.ts').then(({ createTunnels }) => createTunnels(proxy, timeoutMs))
  let connect: ReturnType<typeof tunnels> | undefined
  return ({ protocol, hostname, port }, callback) => {
    connect ??= tunnels()
    connect.then(open => open({ protocol, hostname, port }))
      .then(socket => callback(null, socket), (error: Error) => callback(error, null))
  }
}
