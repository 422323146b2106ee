import { createServer, type IncomingMessage, type RequestListener, type Server, type ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import fp from 'fastify-plugin'
import type { Config } from '../config.ts'
import { addressKey, createNetworks } from './address.ts'
import { linger } from './lingering-close.ts'
import { createReadThrottle, type ReadingCost } from './read-throttle.ts'
import { createPipelining, endAfterAnswers, isLast, unfinished, type Pipeline } from './pipelining.ts'

/** Node keeps each header of a head that still arrives, at ten times its size where it is tiny. */
export const MAX_HEADERS = 128

/** A request that is not complete by then is closed with 408. */
const REQUEST_TIMEOUT_MS = 10_000

/** Longer than the idle time of common load balancers (Google's has 600 s), which meet a closing connection else. */
const KEEP_ALIVE_MS = 620_000

/** An answer that its caller has not taken after so many looks, one a second, is given up with its connection. */
const MAX_UNREAD_SWEEPS = 10
const SWEEP_MS = 1000

/** A body that is refused unread is read and thrown away up to this length, for the sake of the connection. */
const MAX_IGNORED_BYTES = 65_536

/** A connection that is silent for longer is no client whose request is on its way. */
const FRESH_MS = 100

/** The share of all connections that one address may hold. */
const ADDRESS_SHARE = 4

/** All connections of one address. */
interface Peer extends ReadingCost { address: string, held: number }

interface Connection {
  peer: Peer
  /** True where it comes from one of TRUST_PROXY. */
  isProxy: boolean
  /** When it was opened, by performance.now(). */
  since: number
  pipeline: Pipeline
  /** Bytes that the peer had taken at the last look, and how often it had taken none. */
  taken: number
  unreadSweeps: number
}

interface Options {
  config: Pick<Config, 'MAX_CONNECTIONS' | 'TRUST_PROXY'>
  /** Counts requests that were refused unread against the limit of an address. */
  charge: (address: string, count: number) => void
  /** Called for what keeps connections from being accepted, such as EMFILE. */
  onError: (error: Error) => void
}

export type Connections = ReturnType<typeof createConnections>

/**
 * Bounds what a peer can make the relay hold by its connections alone: how many there are, in all and by address; how
 * many requests of one are under way; how long an answer waits to be read. Node bounds none of it.
 */
export function createConnections ({ config, charge, onError }: Options) {
  const { MAX_CONNECTIONS: max, TRUST_PROXY: proxies } = config
  const connections = new Map<Socket, Connection>()
  const mayHoldAll = createNetworks(['127.0.0.0/8', '::1', ...proxies])
  const peers = new Map<string, Peer>()
  const isInProxies = createNetworks(proxies)
  const throttle = createReadThrottle(connections)
  const { spend } = throttle
  const pipelining = createPipelining({
    spend,
    charge (socket, count) {
      const { peer, isProxy } = connections.get(socket) ?? {}
      // A proxy's requests are those of its clients.
      if (peer !== undefined && isProxy === false) charge(peer.address, count)
    }
  })

  /** Counts a new connection in, or closes it where there is no room for it. */
  function admit (socket: Socket): void {
    const { remoteAddress = '' } = socket
    const address = addressKey(remoteAddress)
    const held = peers.get(address)?.held ?? 0
    const hasRoom = mayHoldAll(remoteAddress) || held < max / ADDRESS_SHARE || evict(address)
    if (!hasRoom || (connections.size >= max && !evict())) {
      socket.destroy()
      return
    }
    // Looked up again: what was evicted may have been its last.
    const peer = peers.get(address) ?? { address, held: 0, spent: 0 }
    peers.set(address, peer)
    peer.held++
    const since = performance.now()
    // By its whole address: that of a peer is cut to its network.
    const isProxy = isInProxies(remoteAddress)
    const connection = { peer, isProxy, since, pipeline: pipelining.open(), taken: 0, unreadSweeps: 0 }
    connections.set(socket, connection)
    // Node calls this after an answer with `connection: close`. With a body unread the kernel would reset the peer.
    socket.destroySoon = () => linger(socket, spend)
    socket.on('close', () => forget(socket, connection))
    // Node resumes a new connection once this turn's callbacks are over.
    setImmediate(throttle.admit, socket, peer)
  }

  function forget (socket: Socket, connection: Connection): void {
    if (!connections.delete(socket)) return
    connection.peer.held--
    if (connection.peer.held === 0) peers.delete(connection.peer.address)
    pipelining.close(connection.pipeline)
  }

  /**
   * Closes the connection that can best be spared, of `address` or of all: the oldest silent one, unless all of these
   * are very new and few; else the oldest that is idle, then a new one, then the oldest whose body still arrives. False
   * where every one is at work.
   */
  function evict (address?: string): boolean {
    let idle: Socket | undefined
    let fresh: Socket | undefined
    let arriving: Socket | undefined
    let silent = 0
    const longAgo = performance.now() - FRESH_MS
    for (const [socket, { peer, since, pipeline }] of connections) {
      if (address !== undefined && address !== peer.address) continue
      if (!pipeline.hasAsked && since < longAgo) return close(socket)
      if (!pipeline.hasAsked) {
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

  /** Gives up answers that are not read. Looks are counted, not time: a stall of this process is not the peer's. */
  function sweep (): void {
    for (const peer of peers.values()) peer.spent /= 4
    for (const [socket, connection] of connections) {
      const { writableLength } = socket
      const taken = writableLength === 0 ? 0 : socket.bytesWritten - writableLength
      connection.unreadSweeps = writableLength > 0 && taken === connection.taken ? connection.unreadSweeps + 1 : 0
      connection.taken = taken
      if (connection.unreadSweeps >= MAX_UNREAD_SWEEPS) socket.destroy()
    }
  }

  const timer = setInterval(sweep, SWEEP_MS).unref()

  return {
    spend,

    /** How many are open. */
    count: () => connections.size,

    /** For Fastify: a server whose connections and requests are bounded, and which calls `handler` for the others. */
    serverFactory (handler: RequestListener): Server {
      const server = createServer({
        requestTimeout: REQUEST_TIMEOUT_MS,
        // Node swaps the two when this is the longer one, and by default looks for late requests every 30 s.
        headersTimeout: REQUEST_TIMEOUT_MS,
        connectionsCheckingInterval: 500,
        keepAliveTimeout: KEEP_ALIVE_MS,
        // Node would answer a missing Host by itself, without a problem; plugins/framing does.
        requireHostHeader: false
      })
      const onRequest = (request: IncomingMessage, response: ServerResponse) => {
        const pipeline = connections.get(request.socket)?.pipeline
        if (pipeline !== undefined) pipelining.receive(pipeline, request, response, handler)
      }
      server.on('connection', admit)
      server.on('request', onRequest)
      // Node would answer other expectations than 100-continue by itself; a server may ignore them (RFC 9110).
      server.on('checkExpectation', onRequest)
      server.on('error', onError)
      // Beyond that Node drops headers in silence, an Origin among them; plugins/framing refuses such a request.
      server.maxHeadersCount = MAX_HEADERS
      server.on('close', () => clearInterval(timer))
      return server
    },

    /** Answers bytes that are no request with `answer`, after the answers under way, and closes the connection. */
    refuseBytes (socket: Socket, answer: () => string): void {
      const connection = connections.get(socket)
      if (connection === undefined || !socket.writable) {
        socket.destroy()
        return
      }
      endAfterAnswers(connection.pipeline, () => {
        if (!socket.writable) return
        socket.write(answer())
        linger(socket, spend)
      })
    },

    /** The hooks that tell a connection how far its requests are. Registered after all that set `connection`. */
    hooks: fp(async app => {
      // The handler of an identity follows in the same turn. A kind of hook of its own costs closures.
      app.addHook('preValidation', ({ raw }, reply, done) => {
        const connection = connections.get(raw.socket)
        if (connection !== undefined) pipelining.checked(connection.pipeline, raw, app.routing)
        done()
      })
      app.addHook('onSend', ({ raw }, reply, payload, done) => {
        const pipeline = connections.get(raw.socket)?.pipeline
        if (app.isShuttingDown() || isLongUnread(raw) || (pipeline !== undefined && isLast(pipeline, raw))) {
          reply.header('connection', 'close')
          if (pipeline !== undefined) pipeline.isClosing = true
        } else if (pipeline !== undefined && reply.statusCode >= 400 && reply.getHeader('connection') === 'close') {
          // plugins/framing has set it, or Fastify after a body that could not be read.
          pipeline.isClosing = true
        }
        done(null, payload)
      })
    })
  }
}

/** True where more of a body follows, or may follow, than is read after its answer. */
function isLongUnread ({ complete, headers }: IncomingMessage): boolean {
  if (complete !== false) return false
  return 'transfer-encoding' in headers || Number(headers['content-length'] ?? 0) > MAX_IGNORED_BYTES
}
