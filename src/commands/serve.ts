import { setTimeout as sleep } from 'node:timers/promises'
import closeWithGrace from 'close-with-grace'
import { hasCredentials, hasUserTokens, plainUpstreams, type Config } from '../config.ts'
import { isLoopback } from '../environment.ts'
import type { createLog, Log } from '../log.ts'
import { buildApp } from '../http/app.ts'
import type { StatusSources } from '../http/status.ts'
import { openMetrics } from '../metrics.ts'
import { baseUrl, createMixpanel } from '../mixpanel/client.ts'
import { directoryOf, openConnection, openOutbox } from '../outbox/open.ts'
import { describeProxy, proxyFor } from '../proxy.ts'
import { redisOutage, useRedisCredentials } from '../redis.ts'
import { createRelay } from '../relay/relay.ts'
import { watchSecrets, type SecretFiles } from '../secrets.ts'
import { runAdminCommand } from './admin.ts'
import { serveAdminSocket } from './admin-socket.ts'

type OpenMetrics = Awaited<ReturnType<typeof openMetrics>>

/** With Node's default of 511, part of a burst of 1000 connections waits a second for TCP to retry. */
const BACKLOG = 4096

/** Files for connections to Mixpanel and Redis, the outbox, the log and Node itself. */
const OTHER_FILES = 128

/** Time after SHUTDOWN_TIMEOUT_MS for the last responses and to close the outbox, the log and connections. */
const CLOSING_MS = 3000

/**
 * Returns how many files this process may open, from `/proc/self/limits`; Node has raised the soft limit to the hard
 * one. Returns Infinity when there is no limit, or when `read` throws, as on systems other than Linux.
 */
export function openFilesLimit (read: () => string): number {
  try {
    const limit = /^Max open files +(\d+)/m.exec(read())?.[1]
    return limit === undefined ? Infinity : Number(limit)
  } catch {
    return Infinity
  }
}

/** The commands that change the outbox. */
const CHANGES = ['replay', 'drop', 'pause', 'resume']

let document: Promise<{ document: object, yaml: string }> | undefined
/** Resolves with the OpenAPI document, as an object and as YAML. It is loaded on the first call and made once. */
export const openapiDocument = (config: Config) =>
  (document ??= import('../http/openapi.ts').then(({ openapi }) => openapi(config)))

/** The version of the relay, how many log lines were dropped, and the number of files that its process may open. */
interface Process { version: string, droppedLogLines: () => number, openFiles?: number }

/**
 * Starts the relay and resolves when it listens. From then on a signal starts a shutdown, which takes at most
 * SHUTDOWN_DELAY_MS + SHUTDOWN_TIMEOUT_MS + 3 s; a second signal ends the process at once. Rejects with a sentence when
 * the relay cannot start. `secrets` are the files of secrets, which take effect when they change. `end` acts as a first
 * signal. `isWaitingForDisk` returns true while the outbox closes: if its disk hangs, so would an exit.
 */
export async function serve (
  requested: Config, { logger, logRequest }: ReturnType<typeof createLog>, secrets: SecretFiles,
  { version, droppedLogLines, openFiles = Infinity }: Process
): Promise<{ end: () => void, isWaitingForDisk: () => boolean }> {
  const connections = Math.max(1, Math.min(requested.MAX_CONNECTIONS, openFiles - OTHER_FILES))
  const config = { ...requested, MAX_CONNECTIONS: connections }
  if (connections < requested.MAX_CONNECTIONS) {
    const hint = 'raise the limit of open files'
    logger.warn({ hint, connections, open_files: openFiles }, 'fewer connections than MAX_CONNECTIONS')
  }
  const redis = await openConnection(config, logger)
  const metrics = config.METRICS_PORT === undefined ? undefined : await openMetrics(version)
  const outbox = await openOutbox(config, redis, logger, metrics)
  const directory = directoryOf(config)
  const closeAdminSocket = directory === undefined || outbox === undefined
    ? undefined
    : await serveAdminSocket(directory, args => {
      // Without its operands: an erasure names a user.
      if (CHANGES.includes(String(args[0]))) logger.warn({ action: args[0] }, 'outbox command')
      return runAdminCommand(outbox, config, args, metrics)
    })
      .catch(({ message: cause }) =>
        logger.warn({ cause, hint: 'stop the relay to run outbox commands' }, 'no socket in the outbox directory'))
  const client = createMixpanel(config, logger)
  const relay = createRelay(config, client, logger, outbox, metrics)
  relay.start()
  const tokens = await openUserTokens(config, logger)
  const app = await buildApp(config, {
    relay,
    redis,
    tokens,
    metrics,
    logger,
    logRequest,
    document: async () => (await openapiDocument(config)).document
  })
  const mixpanel = baseUrl(config)
  const proxy = proxyFor(config, mixpanel)
  for (const [fields, message] of weaknesses(config)) logger.warn(fields, message)
  const watch = watchSecrets({
    ...secrets,
    log: logger,
    metrics,
    onChange (changed) {
      if (outbox !== undefined && config.MIXPANEL_PROJECT_ID === undefined &&
          changed.MIXPANEL_TOKEN !== config.MIXPANEL_TOKEN) {
        const hint = 'before the next start set MIXPANEL_PROJECT_ID, or empty the outbox'
        logger.warn({ hint }, 'outbox bound to earlier token')
      }
      client.useSecrets(changed)
      app.useSecrets(changed)
      if (redis !== undefined && !useRedisCredentials(redis, String(config.REDIS_URL), String(changed.REDIS_URL))) {
        logger.error({ hint: 'only its user and password can change without a restart' }, 'REDIS_URL needs a restart')
      }
    }
  })

  const closeMetrics = metrics && await listenForMetrics(config, metrics, {
    config,
    version,
    relay,
    outbox,
    redis: redis && (() => redisOutage(redis)),
    jwks: tokens?.state,
    secrets: watch.state,
    droppedLogLines,
    load: app.load,
    isShuttingDown: app.isShuttingDown
  }, logger)

  // The last step: until `serve` returns, a signal ends the process at once.
  const url = await app.listen({ host: config.HOST, port: config.PORT, backlog: BACKLOG })

  let isClosingOutbox = false
  const delay = config.SHUTDOWN_DELAY_MS + config.SHUTDOWN_TIMEOUT_MS + CLOSING_MS
  const skip: closeWithGrace.Options['skip'] = ['beforeExit', 'SIGHUP', 'SIGUSR2']
  const { close } = closeWithGrace({ delay, logger, skip }, async ({ signal, err }) => {
    if (err) logger.fatal({ err }, 'unhandled error')
    else logger.info({ signal }, 'shutdown started')
    app.beginShutdown()
    await sleep(config.SHUTDOWN_DELAY_MS)
    setTimeout(relay.stopWaiting, config.SHUTDOWN_TIMEOUT_MS * 0.8).unref()
    watch.close()
    closeAdminSocket?.()
    await app.close()
    isClosingOutbox = true
    await Promise.all([outbox?.close(), client.close()])
    isClosingOutbox = false
    tokens?.close()
    redis?.disconnect()
    await closeMetrics?.()
  })
  const mode = {
    id_merge: config.MIXPANEL_ID_MERGE,
    hint: 'the settings of the project in Mixpanel show its mode (Identity Merge)'
  }
  logger.info(mode, 'mode of the project')
  const way = { mixpanel, endpoint: config.MIXPANEL_ENDPOINT, ...proxy && { proxy: describeProxy(proxy) } }
  logger.info(way, `Server listening at ${url}`)
  return { end: close, isWaitingForDisk: () => isClosingOutbox }
}

/** Serves METRICS_PORT. Resolves with a function that ends that; rejects when it cannot listen. */
async function listenForMetrics (
  { METRICS_HOST, METRICS_PORT: port, HOST }: Config, metrics: OpenMetrics, sources: StatusSources, log: Log
): Promise<() => Promise<void>> {
  const [{ buildMetricsApp }, { createStatus }] =
    await Promise.all([import('../http/metrics-app.ts'), import('../http/status.ts')])
  const app = buildMetricsApp({ metrics, status: createStatus(sources) })
  const url = await app.listen({ host: METRICS_HOST ?? HOST, port: port as number })
  log.info({ url }, 'metrics listening')
  return app.close
}

/** Resolves with the verifier of users' tokens, if the configuration has any. jose would lengthen every start. */
async function openUserTokens (config: Config, log: Log) {
  return hasUserTokens(config)
    ? (await import('../http/callers/user-tokens.ts')).createUserTokens(config, log)
    : undefined
}

/** Returns a warning for each thing that the configuration permits and an attacker, or an accident, could use. */
function weaknesses (config: Config): [fields: object, message: string][] {
  const callers = isLoopback(config.HOST) ? 'any process on this machine' : 'any caller that reaches this address'
  const open = { allow_anonymous: config.ALLOW_ANONYMOUS, risk: `${callers} may merge identities` }
  const rules: [isWeak: boolean, fields: object, message: string][] = [
    [!hasCredentials(config), open, 'no caller credentials'],
    [hasCredentials(config) && config.ALLOW_ANONYMOUS, open, 'callers without credentials allowed'],
    [hasUserTokens(config) && config.JWT_AUDIENCE === undefined,
      { risk: 'tokens that the issuer made for other services are valid' }, 'JWT_AUDIENCE not set'],
    [plainUpstreams(config).includes('MIXPANEL_URL'),
      { risk: 'the token travels in the clear' }, 'MIXPANEL_URL without https'],
    [config.OUTBOX !== 'off' && config.MIXPANEL_PROJECT_ID === undefined,
      { hint: 'before you change the token, set MIXPANEL_PROJECT_ID and restart' }, 'outbox bound to this token']
  ]
  return rules.flatMap(([isWeak, fields, message]) => isWeak ? [[fields, message] as [object, string]] : [])
}
