import { createServer, type IncomingMessage, type RequestListener, type Server, type ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import fp from 'fastify-plugin'
import type { Config } from '../config.ts'
import { addressKey, createNetworks } from './address.ts'
import { MAX_HEADERS, mustBeLast } from './framing.ts'
import { linger } from './lingering-close.ts'
import { createReadThrottle, type ReadingCost } from './read-throttle.ts'
import { createPipelining, endAfterAnswers, isLast, unfinished, type Pipeline } from './pipelining.ts'

/** A request that is incomplete after this time gets 408, and its connection closes. */
const REQUEST_TIMEOUT_MS = 10_000

/** Longer than the idle time of load balancers (Google's: 600 s), which could otherwise use a closing connection. */
const KEEP_ALIVE_MS = 620_000

/** A connection is destroyed after this many sweeps, one a second, in which its peer read none of a response. */
const MAX_UNREAD_SWEEPS = 10
const SWEEP_MS = 1000

/** The longest head of a request where Mixpanel's SDKs are served. */
const SDK_HEAD_BYTES = 32_768

/** To keep the connection open, an unread body of up to this length is read and discarded. */
const MAX_DISCARDED_BYTES = 65_536

/** A silent connection younger than this is new, and `evict` spares it at first. */
const FRESH_MS = 100

/** One address may hold this fraction of all connections: a quarter. */
const ADDRESS_SHARE = 4

/** The connections of one address, as `addressKey` counts it. */
interface Peer extends ReadingCost { address: string, connectionCount: number }

interface Connection {
  peer: Peer
  /** True when its address is in TRUST_PROXY. */
  isProxy: boolean
  /** When the connection opened, by performance.now(). */
  since: number
  pipeline: Pipeline
  /** Bytes that had left at the last sweep, while more were waiting. */
  sentBytes: number
  /** Sweeps in a row in which bytes were waiting and none left. */
  unreadSweeps: number
}

interface Options {
  config: Pick<Config, 'MAX_CONNECTIONS' | 'TRUST_PROXY'> & Partial<Pick<Config, 'COMPAT'>>
  /** Adds refused requests, which were never read, to the rate limit of their address. */
  charge: (address: string, count: number) => void
  /** Called with an error that keeps the server from accepting connections, such as EMFILE. */
  onError: (error: Error) => void
}

export type Connections = ReturnType<typeof createConnections>

/**
 * Returns bounds on what a peer's connections make the relay hold: the number of connections, in all and by address;
 * the unanswered requests of each; the time that a response waits to be read. Node bounds none of these.
 */
export function createConnections ({ config, charge, onError }: Options) {
  const { MAX_CONNECTIONS: max, TRUST_PROXY: proxies, COMPAT: compat = 'off' } = config
  const connections = new Map<Socket, Connection>()
  const mayHoldAll = createNetworks(['127.0.0.0/8', '::1', ...proxies])
  const peers = new Map<string, Peer>()
  const isInProxies = createNetworks(proxies)
  const throttle = createReadThrottle(connections)
  const { recordCost } = throttle
  const pipelining = createPipelining({
    recordCost,
    charge (socket, count) {
      const connection = connections.get(socket)
      // The requests of a proxy belong to its clients.
      if (connection?.isProxy === false) charge(connection.peer.address, count)
    }
  })

  function onConnection (socket: Socket): void {
    const { remoteAddress = '' } = socket
    const address = addressKey(remoteAddress)
    const connectionCount = peers.get(address)?.connectionCount ?? 0
    const hasRoom = mayHoldAll(remoteAddress) || connectionCount < max / ADDRESS_SHARE || evict(address)
    if (!hasRoom || (connections.size >= max && !evict())) {
      socket.destroy()
      return
    }
    // A second look, because eviction may have closed the last connection of this address.
    const peer = peers.get(address) ?? { address, connectionCount: 0, recentCost: 0 }
    peers.set(address, peer)
    peer.connectionCount++
    const since = performance.now()
    // The whole address decides; the key of an IPv6 peer is only its network.
    const isProxy = isInProxies(remoteAddress)
    const connection = { peer, isProxy, since, pipeline: pipelining.open(), sentBytes: 0, unreadSweeps: 0 }
    connections.set(socket, connection)
    // Node calls this after a response with `connection: close`. An unread body would make the kernel send a reset.
    socket.destroySoon = () => linger(socket, recordCost)
    socket.on('close', () => forget(socket, connection))
    // After this turn's callbacks, because Node resumes a new connection in this turn.
    setImmediate(throttle.pauseNew, socket, peer)
  }

  function forget (socket: Socket, connection: Connection): void {
    if (!connections.delete(socket)) return
    connection.peer.connectionCount--
    if (connection.peer.connectionCount === 0) peers.delete(connection.peer.address)
    pipelining.close(connection.pipeline)
  }

  /**
   * Destroys one connection, of `address` or of all: the oldest that has sent no request and is not new. Otherwise, in
   * this order: the oldest idle one, a new one, one whose body still arrives. If new connections are more than half of
   * all, a new one goes first. Returns false if there is nothing to close.
   */
  function evict (address?: string): boolean {
    let idle: Socket | undefined
    let fresh: Socket | undefined
    let arriving: Socket | undefined
    let silent = 0
    const freshSince = performance.now() - FRESH_MS
    for (const [socket, { peer, since, pipeline }] of connections) {
      if (address !== undefined && address !== peer.address) continue
      if (!pipeline.hasRequested && since < freshSince) return close(socket)
      if (!pipeline.hasRequested) {
        fresh ??= socket
        silent++
      } else if (pipeline.unanswered === 0) {
        idle ??= socket
      } else if (unfinished(pipeline) === 0) {
        arriving ??= socket
      }
    }
    const isFlood = silent > connections.size / 2
    return close(isFlood ? fresh : idle ?? fresh ?? arriving)
  }

  function close (socket: Socket | undefined): boolean {
    if (socket === undefined) return false
    forget(socket, connections.get(socket) as Connection)
    socket.destroy()
    return true
  }

  /** Destroys connections with unread responses. It counts sweeps, so that a stall of this process does not count. */
  function sweep (): void {
    for (const peer of peers.values()) peer.recentCost /= 4
    for (const [socket, connection] of connections) {
      const { writableLength } = socket
      const sentBytes = writableLength === 0 ? 0 : socket.bytesWritten - writableLength
      const isStalled = writableLength > 0 && sentBytes === connection.sentBytes
      connection.unreadSweeps = isStalled ? connection.unreadSweeps + 1 : 0
      connection.sentBytes = sentBytes
      if (connection.unreadSweeps >= MAX_UNREAD_SWEEPS) socket.destroy()
    }
  }

  const timer = setInterval(sweep, SWEEP_MS).unref()

  return {
    recordCost,

    count: () => connections.size,

    /** Returns a server for Fastify. It calls `handler` for requests within the bounds. */
    serverFactory (handler: RequestListener): Server {
      const server = createServer({
        requestTimeout: REQUEST_TIMEOUT_MS,
        // If it were longer than requestTimeout, Node would swap the two.
        headersTimeout: REQUEST_TIMEOUT_MS,
        // By default Node looks for late requests every 30 s.
        connectionsCheckingInterval: 500,
        keepAliveTimeout: KEEP_ALIVE_MS,
        // plugins/framing refuses a missing Host with a problem; Node's own response has none.
        requireHostHeader: false,
        // The SDK for Node sends an event of 12 KB as a GET of 16 KB, Node's own limit.
        ...compat !== 'off' && { maxHeaderSize: SDK_HEAD_BYTES }
      })
      const onRequest = (request: IncomingMessage, response: ServerResponse) => {
        const pipeline = connections.get(request.socket)?.pipeline
        // Whatever the response: a hook or the router may refuse the request before plugins/framing does.
        if (mustBeLast(request)) response.setHeader('connection', 'close')
        if (pipeline !== undefined) pipelining.receive(pipeline, request, response, handler)
      }
      server.on('connection', onConnection)
      server.on('request', onRequest)
      // Node would refuse other expectations than 100-continue; a server may ignore them (RFC 9110).
      server.on('checkExpectation', onRequest)
      server.on('error', onError)
      // Node silently drops further headers, such as Origin, so plugins/framing refuses the request.
      server.maxHeadersCount = MAX_HEADERS
      server.on('close', () => clearInterval(timer))
      return server
    },

    /**
     * Sends `answer` to bytes that are not a request, after all pending responses, and closes the connection. `answer`
     * gets the request whose body did not arrive, if there is one.
     */
    refuseBytes (socket: Socket, answer: (request: IncomingMessage | undefined) => string): void {
      const connection = connections.get(socket)
      if (connection === undefined || !socket.writable) {
        socket.destroy()
        return
      }
      const { latest } = connection.pipeline
      endAfterAnswers(connection.pipeline, () => {
        if (!socket.writable) return
        socket.write(answer(latest?.complete === false ? latest : undefined))
        linger(socket, recordCost)
      })
    },

    /** The hooks that follow the requests of a connection. Register them after all hooks that set `connection`. */
    hooks: fp(async app => {
      // The handler of an identity runs in the same turn. Fastify makes three closures for each kind of hook, and the
      // route has a preValidation hook already.
      app.addHook('preValidation', ({ raw }, reply, done) => {
        if (raw.pipeline !== undefined) pipelining.markChecked(raw.pipeline, raw, app.routing)
        done()
      })
      app.addHook('onSend', ({ raw }, reply, payload, done) => {
        const { pipeline } = raw
        if (app.isShuttingDown() || hasLongUnreadBody(raw) || (pipeline !== undefined && isLast(pipeline, raw))) {
          reply.header('connection', 'close')
          if (pipeline !== undefined) pipeline.isClosing = true
        } else if (pipeline !== undefined && reply.statusCode >= 400 && reply.getHeader('connection') === 'close') {
          // Set by plugins/framing, or by Fastify after a body that could not be read.
          pipeline.isClosing = true
        }
        done(null, payload)
      })
    })
  }
}

/** Returns true when more of a body follows, or may follow, than is discarded after its response. */
function hasLongUnreadBody ({ complete, headers }: IncomingMessage): boolean {
  if (complete !== false) return false
  return 'transfer-encoding' in headers || Number(headers['content-length'] ?? 0) > MAX_DISCARDED_BYTES
}
