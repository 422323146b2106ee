import { readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import closeWithGrace from 'close-with-grace'
import { pino } from 'pino'
import { buildApp } from './app.ts'
import { ConfigError, isLoopback, readConfig, SECRETS, type Config } from './config.ts'
import { baseUrl, createMixpanel } from './mixpanel.ts'
import { createRelay } from './relay.ts'

const commands: Record<string, (config: Config) => Promise<void>> = {
  serve,
  healthcheck,
  async 'check-config' (config) {
    console.log(`The configuration is valid: http://${config.HOST}:${config.PORT} relays to ${baseUrl(config)}.`)
  },
  /** Prints `openapi.yaml`. */
  async openapi (config) {
    const { app } = await start(config)
    await app.ready()
    console.log(app.swagger({ yaml: true }).trimEnd())
    await app.close()
  }
}

async function start (config: Config) {
  const logger = pino({ level: config.LOG_LEVEL })
  const relay = createRelay(config, createMixpanel(config), logger)
  return { app: await buildApp(config, { relay, logger }), logger }
}

async function serve (config: Config): Promise<void> {
  const { app, logger } = await start(config)
  // Signal 10 would open Node's inspector on loopback, which the neighbours in a pod share.
  process.on('SIGUSR1', () => {})
  const delay = config.SHUTDOWN_DELAY_MS + config.SHUTDOWN_TIMEOUT_MS
  closeWithGrace({ delay, logger, skip: ['beforeExit'] }, async ({ signal, err }) => {
    if (err) logger.fatal({ err }, 'bug')
    else logger.info({ signal }, 'draining')
    app.drain()
    await sleep(config.SHUTDOWN_DELAY_MS)
    await app.close()
  })
  const mixpanel = baseUrl(config)
  logger.info({ mixpanel, endpoint: config.MIXPANEL_ENDPOINT }, 'relaying')
  if (isLoopback(config.HOST)) logger.warn('anyone on this machine may identify anyone: no credentials are configured')
  else logger.warn('ALLOW_ANONYMOUS: anyone who reaches this address may identify anyone')
  const { protocol, hostname } = new URL(mixpanel)
  if (protocol === 'http:' && !isLoopback(hostname.replace(/^\[|\]$/g, ''))) {
    logger.warn('MIXPANEL_URL is not https: the token travels in the clear')
  }
  await app.listen({ host: config.HOST, port: config.PORT })
}

/** For HEALTHCHECK: exit 0 if the relay that this configuration describes is alive. */
async function healthcheck ({ HOST, PORT }: Config): Promise<void> {
  const host = { '0.0.0.0': '127.0.0.1', '::': '[::1]' }[HOST] ?? (HOST.includes(':') ? `[${HOST}]` : HOST)
  const answer = await fetch(`http://${host}:${PORT}/livez`, { signal: AbortSignal.timeout(2000) })
  if (!answer.ok) throw new Error(`/livez answered ${answer.status}`)
  console.log('The relay is alive.')
}

/** The exit code is 0, or 1 after one sentence on standard error. */
async function main (name = 'serve'): Promise<void> {
  const command = commands[name]
  if (command === undefined) throw new ConfigError(`${name} is no command: use ${Object.keys(commands).join(', ')}.`)
  const config = readConfig(process.env, path => readFileSync(path, 'utf8'))
  // Children, diagnostic reports and /proc have no business with them.
  for (const secret of SECRETS) delete process.env[secret]
  await command(config)
}

main(process.argv[2]).catch((error: Error) => {
  console.error(error instanceof ConfigError ? error.message : `The relay cannot go on: ${error.message}.`)
  process.exit(1)
})
