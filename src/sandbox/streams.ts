import type { FastifyReply } from 'fastify'
import type { ServerResponse } from 'node:http'
import type { createFeed } from './feed.ts'

/** Open pages. Each may hold `MAX_UNREAD` bytes of memory. */
export const MAX_STREAMS = 16
const MAX_UNREAD = 4 * 1024 * 1024

/** One update for all that arrives in that time: a page needs no more, and a load test costs no more. */
const UPDATE_MS = 100

/**
 * Streams of server-sent events for the pages. The first message of each has the whole state, so a page that connects
 * again neither misses an event nor shows one twice.
 */
export function createStreams (feed: ReturnType<typeof createFeed>) {
  const streams = new Set<ServerResponse>()
  let timer: NodeJS.Timeout | undefined

  function sendUpdate (): void {
    clearTimeout(timer)
    timer = undefined
    if (streams.size === 0) return
    const message = messageOf(feed.update(false))
    for (const stream of streams) {
      if (stream.writableLength > MAX_UNREAD) stream.destroy()
      else stream.write(message)
    }
  }

  return {
    /** Schedules an update. Without a page it does nothing. */
    changed (): void {
      if (streams.size > 0) timer ??= setTimeout(sendUpdate, UPDATE_MS)
    },

    /** Answers with a stream, which ends when the page is gone or does not read. */
    open (reply: FastifyReply): FastifyReply {
      if (streams.size >= MAX_STREAMS) {
        return reply.code(503).send({ error: `${MAX_STREAMS} pages are open already`, status: 0 })
      }
      sendUpdate()
      const { raw } = reply.hijack()
      raw.writeHead(200, { ...reply.getHeaders() as Record<string, string>, 'content-type': 'text/event-stream' })
      raw.write(`retry: 1000\n${messageOf(feed.update(true))}`)
      streams.add(raw)
      raw.on('close', () => {
        streams.delete(raw)
        if (streams.size === 0) feed.stop()
      })
      return reply
    },

    close: () => clearTimeout(timer)
  }
}

const messageOf = (update: object): string => `data: ${JSON.stringify(update)}\n\n`
