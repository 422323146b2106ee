import { randomBytes } from 'node:crypto'
import type { IncomingMessage } from 'node:http'
import fp from 'fastify-plugin'
import { symbols, type Logger } from 'pino'

/** One line of the access log. A handler adds what it knows: the problem's code, its cause, the event's $insert_id. */
export interface LogLine {
  level: number
  time: number
  msg: string
  method: string
  /** The pattern, never the URL, whose query may hold anything; null where no route was found. */
  route: string | null
  status: number
  ms: number
  request_id: string
  caller: 'anonymous'
  code?: string
  cause?: string
  insert_id?: string
  identities?: number
  queued?: number
  failed?: number
}

declare module 'fastify' {
  interface FastifyReply { logLine: LogLine }
  /** `quiet`: the route's requests are not logged. */
  interface FastifyContextConfig { quiet?: boolean }
}

const instance = randomBytes(8).toString('hex')
let count = 0

/** The caller's `x-request-id` where it is fit for logs and headers, else a new one. */
export function requestId ({ headers }: Pick<IncomingMessage, 'headers'>): string {
  const given = headers['x-request-id']
  return typeof given === 'string' && /^[\w.:=@/+-]{1,128}$/.test(given) ? given : `${instance}-${++count}`
}

/**
 * What every request gets: an id, and a log line when it is answered, even if its caller has gone by then. These hooks
 * are on the path of every identity, so they make no promises.
 */
export const requests = fp<{ logger: Logger }>(async (app, { logger }) => {
  type WithStream = { [symbols.streamSym]: { write: (line: string) => void } }
  const { [symbols.streamSym]: stream } = logger as unknown as WithStream
  const level = logger.levels.values.info as number
  app.decorateReply('logLine', null as unknown as LogLine)

  app.addHook('onRequest', (request, reply, done) => {
    const { method, id } = request
    const route = request.routeOptions.url ?? null
    reply.logLine = {
      level, time: 0, method, route, status: 0, ms: 0, request_id: id, caller: 'anonymous', msg: 'answered'
    }
    reply.header('x-request-id', id)
    if (method === 'POST') reply.header('cache-control', 'no-store')
    done()
  })

  app.addHook('onSend', (request, reply, payload, done) => {
    if (!request.routeOptions.config.quiet && logger.isLevelEnabled('info')) {
      const line = reply.logLine
      line.time = Date.now()
      line.status = reply.statusCode
      line.ms = Math.round(reply.elapsedTime * 10) / 10
      // What pino would write; to let it do so costs four times as much.
      stream.write(`${JSON.stringify(line)}\n`)
    }
    done(null, payload)
  })
})
