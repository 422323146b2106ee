import { readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import closeWithGrace from 'close-with-grace'
import { pino } from 'pino'
import { buildApp } from './http/app.ts'
import { ConfigError, isLoopback, readConfig, SECRETS, type Config } from './config.ts'
import { baseUrl, createMixpanel } from './mixpanel/client.ts'
import { command } from './commands/outbox.ts'
import { takeOrders } from './commands/admin-socket.ts'
import { directoryOf, openConnection, openOutbox } from './outbox/open.ts'
import { operate, OrderError } from './commands/admin.ts'
import { createRelay } from './relay/relay.ts'

const commands = new Map(Object.entries({
  serve,
  healthcheck,
  async 'check-config' (config: Config) {
    console.log(`The configuration is valid: ${urlOf(config.HOST, config.PORT)} relays to ${baseUrl(config)}.`)
  },
  /** For operators, whether a relay is running or not. */
  async outbox (config: Config, order: string[]) {
    // Such as `outbox list | head`.
    process.stdout.on('error', () => process.exit(0))
    for await (const text of command(config, order)) process.stdout.write(text)
  },
  /** Prints `openapi.yaml`. */
  async openapi (config: Config) {
    console.log((await describe(config)).yaml)
  }
}))

/** With Node's 511 a burst of a thousand new connections waits a second for TCP to try again. */
const BACKLOG = 4096

/** What the last answers, the outbox, the log and the connections may take after the callers' own time is up. */
const CLOSING_MS = 3000

/** A write costs as much as many lines do, so lines wait for others; a crash that runs no code loses them. */
const LOG_DELAY_MS = 100
const LOG_CHUNK = 32_768

/** Where the log goes: many lines in one asynchronous write, and at the end of the process none is missing. */
const log = {
  lines: '',
  stdout: pino.destination({ sync: false }),
  write (line: string) {
    if (log.lines === '') setTimeout(log.flush, LOG_DELAY_MS).unref()
    log.lines += line
    if (log.lines.length > LOG_CHUNK) log.flush()
  },
  flush () {
    if (log.lines !== '') log.stdout.write(log.lines)
    log.lines = ''
  }
}
process.on('exit', () => {
  log.flush()
  log.stdout.flushSync()
})

/** Loaded when it is first asked for, and made once. */
let description: Promise<{ document: object, yaml: string }> | undefined
const describe = (config: Config) =>
  (description ??= import('./http/openapi.ts').then(({ openapi }) => openapi(config)))

async function serve (config: Config): Promise<void> {
  const logger = pino({ level: config.LOG_LEVEL, base: null }, log)
  const redis = await openConnection(config, logger)
  const outbox = await openOutbox(config, redis, logger)
  const directory = directoryOf(config)
  const endOrders = directory === undefined || outbox === undefined
    ? undefined
    : await takeOrders(directory, order => operate(outbox, config, order)).catch(({ message }) =>
      logger.warn({ cause: message }, 'no socket in the outbox directory: its commands need the relay to be stopped'))
  const relay = createRelay(config, createMixpanel(config), logger, outbox)
  const app = await buildApp(config, { relay, redis, logger, document: async () => (await describe(config)).document })
  // Signal 10 would open Node's inspector on loopback, which the neighbours in a pod share.
  process.on('SIGUSR1', () => {})
  const delay = config.SHUTDOWN_DELAY_MS + config.SHUTDOWN_TIMEOUT_MS + CLOSING_MS
  closeWithGrace({ delay, logger, skip: ['beforeExit'] }, async ({ signal, err }) => {
    if (err) logger.fatal({ err }, 'bug')
    else logger.info({ signal }, 'draining')
    app.drain()
    await sleep(config.SHUTDOWN_DELAY_MS)
    setTimeout(relay.hurry, config.SHUTDOWN_TIMEOUT_MS * 0.8).unref()
    endOrders?.()
    await app.close()
    redis?.disconnect()
  })
  const mixpanel = baseUrl(config)
  if (isLoopback(config.HOST)) logger.warn('anyone on this machine may identify anyone: no credentials are configured')
  else logger.warn('ALLOW_ANONYMOUS: anyone who reaches this address may identify anyone')
  const { protocol, hostname } = new URL(mixpanel)
  if (protocol === 'http:' && !isLoopback(hostname.replace(/^\[|\]$/g, ''))) {
    logger.warn('MIXPANEL_URL is not https: the token travels in the clear')
  }
  const url = await app.listen({ host: config.HOST, port: config.PORT, backlog: BACKLOG })
  logger.info({ mixpanel, endpoint: config.MIXPANEL_ENDPOINT }, `Server listening at ${url}`)
}

/** For HEALTHCHECK: exit 0 if the relay that this configuration describes is alive. */
async function healthcheck ({ HOST, PORT }: Config): Promise<void> {
  const host = { '0.0.0.0': '127.0.0.1', '::': '::1' }[HOST] ?? HOST
  try {
    const answer = await fetch(`${urlOf(host, PORT)}/livez`, { signal: AbortSignal.timeout(2000) })
    if (!answer.ok) throw new Error(`/livez answered ${answer.status}`)
    console.log('The relay is alive.')
  } catch (error) {
    const { message } = (error as Error).cause as Error | undefined ?? error as Error
    console.error(`The relay is not alive: ${message}.`)
    process.exitCode = 1
  }
}

const urlOf = (host: string, port: number) => `http://${host.includes(':') ? `[${host}]` : host}:${port}`

/** The exit code is 0, or 1 after one sentence for each mistake on standard error. */
async function main (name = 'serve', args: string[]): Promise<void> {
  const run = commands.get(name)
  if (run === undefined) throw new ConfigError(`${name} is no command: use ${[...commands.keys()].join(', ')}.`)
  const config = readConfig(process.env, path => readFileSync(path, 'utf8'))
  // Children and diagnostic reports have no business with them.
  for (const secret of SECRETS) delete process.env[secret]
  await run(config, args)
}

main(process.argv[2], process.argv.slice(3)).catch((error: Error) => {
  const isMistake = error instanceof ConfigError || error instanceof OrderError
  console.error(isMistake ? error.message : `The relay cannot go on: ${error.message}.`)
  process.exit(1)
})
