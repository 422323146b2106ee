import { setTimeout as sleep } from 'node:timers/promises'
import closeWithGrace from 'close-with-grace'
import { isLoopback, type Config } from '../config.ts'
import type { createLog } from '../log.ts'
import { buildApp } from '../http/app.ts'
import { baseUrl, createMixpanel } from '../mixpanel/client.ts'
import { directoryOf, openConnection, openOutbox } from '../outbox/open.ts'
import { createRelay } from '../relay/relay.ts'
import { runAdminCommand } from './admin.ts'
import { serveAdminSocket } from './admin-socket.ts'

/** With Node's 511 a burst of a thousand new connections waits a second for TCP to try again. */
const BACKLOG = 4096

/** Connections to Mixpanel and Redis, the outbox, the log and Node's own files. */
const OTHER_FILES = 128

/** What the last answers, the outbox, the log and the connections may take after the callers' own time is up. */
const CLOSING_MS = 3000

/**
 * How many files this process may have open, from `/proc/self/limits`. Node has raised its limit to the most that it
 * was given. Infinity where there is none, or where `read` throws: elsewhere than on Linux.
 */
export function openFilesLimit (read: () => string): number {
  try {
    const limit = /^Max open files +(\d+)/m.exec(read())?.[1]
    return limit === undefined ? Infinity : Number(limit)
  } catch {
    return Infinity
  }
}

/** Loaded when it is first asked for, and made once. */
let document: Promise<{ document: object, yaml: string }> | undefined
export const openapiDocument = (config: Config) =>
  (document ??= import('../http/openapi.ts').then(({ openapi }) => openapi(config)))

/**
 * Starts the relay; resolves when it listens, and from then on a signal ends the process in order: at the latest after
 * SHUTDOWN_DELAY_MS + SHUTDOWN_TIMEOUT_MS + 3 s, at a second signal at once. Rejects with a sentence where it cannot
 * start. `openFiles` is how many files the process may have open. `end` does what a first signal does.
 */
export async function serve (
  requested: Config, { logger, logRequest }: ReturnType<typeof createLog>, openFiles = Infinity
): Promise<{ end: () => void }> {
  const connections = Math.max(1, Math.min(requested.MAX_CONNECTIONS, openFiles - OTHER_FILES))
  const config = { ...requested, MAX_CONNECTIONS: connections }
  if (connections < requested.MAX_CONNECTIONS) {
    logger.warn({ connections, open_files: openFiles }, 'fewer connections than MAX_CONNECTIONS: raise the file limit')
  }
  const redis = await openConnection(config, logger)
  const outbox = await openOutbox(config, redis, logger)
  const directory = directoryOf(config)
  const closeAdminSocket = directory === undefined || outbox === undefined
    ? undefined
    : await serveAdminSocket(directory, order => runAdminCommand(outbox, config, order)).catch(({ message }) =>
      logger.warn({ cause: message }, 'no socket in the outbox directory: its commands need the relay to be stopped'))
  const client = createMixpanel(config)
  const relay = createRelay(config, client, logger, outbox)
  relay.start()
  const app = await buildApp(config, {
    relay, redis, logger, logRequest, document: async () => (await openapiDocument(config)).document
  })
  const mixpanel = baseUrl(config)
  if (isLoopback(config.HOST)) logger.warn('anyone on this machine may identify anyone: no credentials are configured')
  else logger.warn('ALLOW_ANONYMOUS: anyone who reaches this address may identify anyone')
  const { protocol, hostname } = new URL(mixpanel)
  if (protocol === 'http:' && !isLoopback(hostname.replace(/^\[|\]$/g, ''))) {
    logger.warn('MIXPANEL_URL is not https: the token travels in the clear')
  }
  const url = await app.listen({ host: config.HOST, port: config.PORT, backlog: BACKLOG })

  const delay = config.SHUTDOWN_DELAY_MS + config.SHUTDOWN_TIMEOUT_MS + CLOSING_MS
  const { close } = closeWithGrace({ delay, logger, skip: ['beforeExit', 'SIGHUP'] }, async ({ signal, err }) => {
    if (err) logger.fatal({ err }, 'unhandled error')
    else logger.info({ signal }, 'shutdown started')
    app.beginShutdown()
    await sleep(config.SHUTDOWN_DELAY_MS)
    setTimeout(relay.stopWaiting, config.SHUTDOWN_TIMEOUT_MS * 0.8).unref()
    closeAdminSocket?.()
    await app.close()
    await Promise.all([outbox?.close(), client.close()])
    redis?.disconnect()
  })
  logger.info({ mixpanel, endpoint: config.MIXPANEL_ENDPOINT }, `Server listening at ${url}`)
  return { end: close }
}
