/**
 * The process. Signals come first: a process with id 1 ignores those that nothing handles, and the rest of this program
 * takes a quarter of a second to load.
 */
const END_SIGNALS = ['SIGTERM', 'SIGINT', 'SIGQUIT'] as const
const endStart = () => process.exit(0)
for (const signal of END_SIGNALS) process.on(signal, endStart)
// A terminal that closes ends nothing.
process.on('SIGHUP', () => {})
// Signal 10 would open Node's inspector on loopback, which the neighbours in a pod share.
process.on('SIGUSR1', () => {})

const { fstatSync, readFileSync } = await import('node:fs')
const { ConfigError, readConfig, SECRETS } = await import('./config.ts')
type Config = import('./config.ts').Config

const commands = new Map(Object.entries({
  serve: runServe,
  async healthcheck (config: Config) {
    const { healthcheck } = await import('./commands/healthcheck.ts')
    await healthcheck(config).then(console.log, ({ message }: Error) => {
      console.error(message)
      process.exitCode = 1
    })
  },
  async 'check-config' (config: Config) {
    const { urlOf } = await import('./commands/healthcheck.ts')
    const { baseUrl } = await import('./mixpanel/client.ts')
    console.log(`The configuration is valid: ${urlOf(config.HOST, config.PORT)} relays to ${baseUrl(config)}.`)
  },
  /** For operators, whether a relay is running or not. */
  async outbox (config: Config, order: string[]) {
    const { outboxCommand: command } = await import('./commands/outbox.ts')
    // Such as `outbox list | head`.
    process.stdout.on('error', () => process.exit(0))
    for await (const text of command(config, order)) process.stdout.write(text)
  },
  /** Prints `openapi.yaml`. */
  async openapi (config: Config) {
    const { openapiDocument: describe } = await import('./commands/serve.ts')
    console.log((await describe(config)).yaml)
  }
}))

async function runServe (config: Config): Promise<void> {
  const [{ createDestination, createLog, fileSink, streamSink }, { openFilesLimit, serve }] =
    await Promise.all([import('./log.ts'), import('./commands/serve.ts')])
  const stats = fstatSync(1)
  const isStream = stats.isFIFO() || stats.isSocket() || process.stdout.isTTY
  const destination = createDestination(isStream ? streamSink(process.stdout) : fileSink(1))
  process.on('exit', () => {
    destination.flush()
    // Node waits for a name server that does not answer before it lets go of its threads.
    const isStuck = process.getActiveResourcesInfo().includes('GetAddrInfoReqWrap')
    /* c8 ignore next -- of a process that is killed there is no coverage; test/slow/signals.test.ts */
    if (isStuck) process.kill(process.pid, 'SIGKILL')
  })
  const log = createLog(config.LOG_LEVEL, destination)
  const { end } = await serve(config, log, openFilesLimit(() => readFileSync('/proc/self/limits', 'utf8')))
  for (const signal of END_SIGNALS) process.off(signal, endStart)
  if (process.env.npm_lifecycle_event !== 'start') return
  const { whenOrphaned } = await import('./commands/npm-parent.ts')
  whenOrphaned(() => process.ppid, pid => readFileSync(`/proc/${pid}/stat`, 'utf8'), end)
}

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
  const isMistake = error instanceof ConfigError || error.name === 'UsageError'
  console.error(isMistake ? error.message : `The relay cannot go on: ${error.message}.`)
  process.exit(1)
})

export {}
